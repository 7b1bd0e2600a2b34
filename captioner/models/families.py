"""The model families: which prompts they take, and who prepares their images. Nothing heavy is imported.

A family is the `model_type` of config.json. `captioner.models.loading` has the class of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Family:
    """A model family.

    `prompt`: "none" takes none; with "start" the caption continues the prompt; "task" and "question" need one and have
    a `default_prompt`. `tasks`: the task tokens that produce captions.
    `search`: "fast" is a search of this package, "generic" is transformers' `generate`.
    `pixels`: "fixed" images are resized to one size by this package, as the model's image processor would; images of
    "any" size go to the image processor itself.
    `text`: the section of config.json with the number of the text decoder's positions; "" where they are no limit.
    """

    name: str
    prompt: Literal["none", "start", "task", "question"]
    search: Literal["fast", "generic"] = "generic"
    pixels: Literal["fixed", "any"] = "fixed"
    text: str = ""
    default_prompt: str | None = None
    tasks: tuple[str, ...] = ()


QUESTION = "Describe the image in one sentence."
_FLORENCE_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")


def _chat(name: str) -> Family:
    return Family(name, "question", pixels="any", default_prompt=QUESTION)


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
