"""The families of models: how each is spoken to, what its pictures go through. Facts only; nothing heavy is loaded.

A family is the `model_type` of config.json. `captioner.models.loading` knows the class of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Family:
    """How the models of one family are prompted and run.

    `search`: "fast" is one of our own, "generic" transformers' `generate`. `pixels`: "ours" are resized here, as the
    model's image processor says; "own" go through that processor itself. `text`: the section of config.json with the
    text decoder's number of positions; "" where it is no limit.

    `prompt`: "none" takes none; of "start" the caption goes on from it; "task" and "question" need one, and have a
    `default_prompt`. `tasks`: the only task tokens that make captions.
    """

    name: str
    prompt: Literal["none", "start", "task", "question"]
    search: Literal["fast", "generic"] = "generic"
    pixels: Literal["ours", "own"] = "ours"
    text: str = ""
    default_prompt: str | None = None
    tasks: tuple[str, ...] = ()


QUESTION = "Describe the image in one sentence."
_FLORENCE_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")


def _chat(name: str) -> Family:
    return Family(name, "question", pixels="own", default_prompt=QUESTION)


_ALL = (
    Family("git", "start", search="fast", text="."),
    Family("blip", "start", text="text_config"),
    Family("blip-2", "start"),
    Family("vision-encoder-decoder", "none", text="decoder"),
    Family("florence2", "task", text="text_config", default_prompt=_FLORENCE_TASKS[0], tasks=_FLORENCE_TASKS),
    _chat("idefics3"),
    _chat("smolvlm"),
    _chat("qwen2_vl"),
    _chat("qwen2_5_vl"),
)
FAMILY_BY_NAME = {family.name: family for family in _ALL}
FAMILIES = tuple(FAMILY_BY_NAME)
