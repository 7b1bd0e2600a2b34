"""The model families: which prompts they take, and who prepares their images. Nothing heavy is imported.

A family is the `model_type` of config.json. `captioner.models.loading` has the class of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Family:
    """A model family.

    `prompt`: "none" takes none; with "start" the caption continues the prompt; "task", "question" (asked in a chat) and
    "prefix" (text before the caption, in the words the model was trained with) need one and have a `default_prompt`.
    `tasks`: the task tokens that produce captions.
    `search`: "fast" is a search of this package, "generic" is transformers' `generate`.
    `pixels`: "fixed" images are resized to one size by this package, as the model's image processor would; images of
    "any" size go to the image processor itself. `limit`: how that processor limits them: the length of the longer side,
    the area, or "" where it has no such limit or another one.
    `processor`: the class of the processor in transformers; "" for the one that the directory names or, where it names
    none, that of the model type.
    `text`: the section of config.json with the number of the text decoder's positions; "" where they are no limit.
    """

    name: str
    prompt: Literal["none", "start", "task", "question", "prefix"]
    search: Literal["fast", "generic"] = "generic"
    pixels: Literal["fixed", "any"] = "fixed"
    limit: Literal["edge", "area", ""] = ""
    processor: str = ""
    text: str = ""
    default_prompt: str | None = None
    tasks: tuple[str, ...] = ()


QUESTION = "Describe the image in one sentence."
_FLORENCE_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")


def _chat(name: str, limit: Literal["edge", "area", ""] = "", processor: str = "") -> Family:
    return Family(name, "question", pixels="any", limit=limit, processor=processor, default_prompt=QUESTION)


_ALL = (
    Family("git", "start", search="fast", text="."),
    Family("blip", "start", text="text_config"),
    Family("blip-2", "start"),
    Family("vision-encoder-decoder", "none", text="decoder"),
    Family("florence2", "task", text="text_config", default_prompt=_FLORENCE_TASKS[0], tasks=_FLORENCE_TASKS),
    _chat("idefics3", limit="edge"),
    # SmolVLM's own processor differs only for video, for which it needs one more package.
    _chat("smolvlm", limit="edge", processor="Idefics3Processor"),
    _chat("qwen2_vl", limit="area"),
    _chat("qwen2_5_vl", limit="area"),
    _chat("qwen3_vl", limit="area"),
    _chat("qwen3_vl_moe", limit="area"),
    _chat("qwen3_5", limit="area"),
    _chat("gemma3"),
    _chat("gemma4"),
    _chat("llava"),
    _chat("llava_next"),
    _chat("llava_onevision"),
    _chat("internvl"),
    _chat("glm4v"),
    _chat("aya_vision"),
    _chat("ovis2"),
    _chat("minicpmv4_6"),
    _chat("deepseek_vl"),
    # The prompt of its model card.
    Family("paligemma", "prefix", pixels="any", default_prompt="caption en"),
)
FAMILY_BY_NAME = {family.name: family for family in _ALL}
FAMILIES = tuple(FAMILY_BY_NAME)


def family_of(model_type: str) -> Family:
    """Return the family of a model type; for a type that is not in the table, a chat model with nothing special."""
    return FAMILY_BY_NAME.get(model_type) or _chat(model_type)
