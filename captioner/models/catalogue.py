"""The table that `captioner models` prints: the families, and well-known checkpoints of each."""

from __future__ import annotations

from dataclasses import dataclass

from captioner.models.families import FAMILY_BY_NAME, QUESTION


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on the hub, or the starter. `size`: of its float32 weights, in GB."""

    name: str
    language: str
    licence: str
    size: float


# Sizes and licences from the checkpoints' own pages in 2026; where sources disagree about a licence, _SEE_CARD.
_SEE_CARD = "see its card"
_TASKS = FAMILY_BY_NAME["florence2"].tasks
CATALOGUE: dict[str, tuple[Checkpoint, ...]] = {
    "git": (
        Checkpoint("starter", "English", "Apache-2.0", 0.005),
        Checkpoint("microsoft/git-base-coco", "English", "MIT", 0.7),
        Checkpoint("microsoft/git-large-coco", "English", "MIT", 1.6),
    ),
    "blip": (
        Checkpoint("Salesforce/blip-image-captioning-base", "English", "BSD-3-Clause", 1.0),
        Checkpoint("Salesforce/blip-image-captioning-large", "English", "BSD-3-Clause", 1.9),
    ),
    "blip-2": (
        Checkpoint("Salesforce/blip2-opt-2.7b", "English", _SEE_CARD, 15.0),
        Checkpoint("Salesforce/blip2-flan-t5-xl", "English", "MIT", 15.8),
    ),
    "vision-encoder-decoder": (Checkpoint("nlpconnect/vit-gpt2-image-captioning", "English", "Apache-2.0", 1.0),),
    "florence2": (
        Checkpoint("florence-community/Florence-2-base", "English", _SEE_CARD, 0.9),
        Checkpoint("florence-community/Florence-2-large", "English", _SEE_CARD, 3.1),
    ),
    "idefics3": (
        Checkpoint("HuggingFaceTB/SmolVLM-256M-Instruct", "English", "Apache-2.0", 1.0),
        Checkpoint("HuggingFaceM4/Idefics3-8B-Llama3", "English", "Apache-2.0", 33.9),
    ),
    "smolvlm": (
        Checkpoint("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "English", "Apache-2.0", 2.0),
        Checkpoint("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "English", "Apache-2.0", 9.0),
    ),
    "qwen2_vl": (Checkpoint("Qwen/Qwen2-VL-2B-Instruct", "many", "Apache-2.0", 8.8),),
    "qwen2_5_vl": (
        Checkpoint("Qwen/Qwen2.5-VL-3B-Instruct", "many", "Qwen Research", 15.0),
        Checkpoint("Qwen/Qwen2.5-VL-7B-Instruct", "many", "Apache-2.0", 33.2),
    ),
}

LEGEND = f"""\
search   fast: a search of captioner's own with the token ids of transformers' generate; generic: generate
pixels   fixed: images are resized to one size as by the model's image processor (--preprocess fast, or processor
         for exactly its pixels); any: images of any size go to the model's image processor itself, as do those of
         other families where its settings are not supported here
prompt   none: takes none; start: the caption continues --prompt; question: asked of a chat model (default
         {QUESTION!r}); task: {", ".join(_TASKS)},
         or a question in words (default {_TASKS[0]})
size     of the weights in float32; half of it in bfloat16. Qwen Research is a licence for non-commercial use."""

HOW_TO_DOWNLOAD = """\
For machines without network, download a checkpoint once and give its directory to --model:
  hf download microsoft/git-base-coco --exclude '*.bin' --exclude '*.h5' --exclude '*/*' --local-dir models/git
Weights must be safetensors; the licence is that of the checkpoint's own card, which may have changed."""


def table() -> str:
    """Return the catalogue as lines of text."""
    row = "{:<23}{:<8}{:<7}{:<9}{:<43}{:<9}{:<14}{:>7}".format
    lines = [row("family", "search", "pixels", "prompt", "checkpoint", "language", "licence", "size")]
    for name, checkpoints in CATALOGUE.items():
        family = FAMILY_BY_NAME[name]
        for checkpoint in checkpoints:
            size = checkpoint.size
            lines.append(
                row(
                    family.name,
                    family.search,
                    family.pixels,
                    family.prompt,
                    checkpoint.name,
                    checkpoint.language,
                    checkpoint.licence,
                    f"{size:g} GB" if size >= 0.1 else f"{size * 1000:g} MB",
                )
            )
    return "\n".join(lines) + f"\n\n{LEGEND}\n\n{HOW_TO_DOWNLOAD}"
