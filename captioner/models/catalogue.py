"""What `captioner models` lists: the families, and well-known checkpoints of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`size`: of the weights in float32, in GB."""

    name: str
    language: str
    licence: str
    size: float


@dataclass(frozen=True, slots=True)
class Family:
    """`engine`: "fast" is a search of our own, "generic" transformers' `generate`. `prompt`: "optional" or "none"."""

    name: str
    engine: str
    prompt: str
    checkpoints: tuple[Checkpoint, ...]


CATALOGUE = (
    Family(
        "git",
        "fast",
        "optional",
        (
            Checkpoint("starter", "English", "Apache-2.0", 0.005),
            Checkpoint("microsoft/git-base-coco", "English", "MIT", 0.7),
            Checkpoint("microsoft/git-large-coco", "English", "MIT", 1.6),
        ),
    ),
    Family(
        "blip",
        "generic",
        "optional",
        (
            Checkpoint("Salesforce/blip-image-captioning-base", "English", "BSD-3-Clause", 1.0),
            Checkpoint("Salesforce/blip-image-captioning-large", "English", "BSD-3-Clause", 1.9),
        ),
    ),
    Family(
        "vision-encoder-decoder",
        "generic",
        "none",
        (Checkpoint("nlpconnect/vit-gpt2-image-captioning", "English", "Apache-2.0", 1.0),),
    ),
)

HOW_TO_FETCH = """\
For machines without network, fetch a checkpoint once and give its directory to --model:
  hf download microsoft/git-base-coco --include '*.json' '*.txt' '*.safetensors' --local-dir models/git-base-coco
Weights must be safetensors; the licence is that of the checkpoint's own card, which may have changed."""


def table() -> str:
    """The catalogue as lines of text."""
    row = "{:<24}{:<9}{:<10}{:<42}{:<10}{:<14}{:>8}".format
    lines = [row("family", "search", "prompt", "checkpoint", "language", "licence", "size")]
    for family in CATALOGUE:
        for one in family.checkpoints:
            size = f"{one.size:g} GB" if one.size >= 0.1 else f"{one.size * 1000:g} MB"
            lines.append(row(family.name, family.engine, family.prompt, one.name, one.language, one.licence, size))
    return "\n".join(lines) + f"\n\n{HOW_TO_FETCH}"
