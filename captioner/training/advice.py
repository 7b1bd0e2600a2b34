"""What a person should know of a run while it trains: collapsed captions, and captions of an unusual length."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.config import TrainConfig
from captioner.console.text import shorten
from captioner.training.recipes import recipe_of
from captioner.training.schedule import evaluations

# A collapsed model writes one caption for most images, where people wrote different ones.
COLLAPSED_SHARE = 0.5
COLLAPSED = "the captions have collapsed"
MUCH_LONGER = 2.0  # times the words that a family's captions usually have


def is_collapsed(evaluation: dict[str, Any]) -> bool:
    """Return whether more than half of the captions of an evaluation are equal and the references are not.

    False before training: models that have not learned anything yet also repeat one caption.
    """
    equal, references = evaluation.get("eval_equal_share"), evaluation.get("eval_equal_references_share")
    if not evaluation["step"] or equal is None or references is None:
        return False
    return bool(equal > COLLAPSED_SHARE >= references)


def collapse_warning(history: list[dict[str, Any]], config: TrainConfig) -> str:
    """Return one line where the latest evaluation of a history is collapsed and the one before was not, or ""."""
    *earlier, latest = evaluations(history)
    if not is_collapsed(latest) or (earlier and is_collapsed(earlier[-1])):
        return ""
    repeated, _ = Counter(example["caption"] for example in latest["eval_captions"]).most_common(1)[0]
    caption = f'"{shorten(repeated, 60)}"' if repeated else "an empty text"
    hint = "" if config.training.stop_on_collapse else "; --stop-on-collapse ends such a run"
    return (
        f"{COLLAPSED}: at step {latest['step']:,} {latest['eval_equal_share']:.0%} of the eval images have the same"
        f" one, {caption}; train into another OUT with a --learning-rate below {config.training.learning_rate:g}, with"
        f" more --warmup-steps, or with more frequent --eval-steps to keep an earlier checkpoint{hint}"
    )


def warnings_of(history: list[dict[str, Any]]) -> list[str]:
    """Return the warnings in a history, in order."""
    return [entry["warning"] for entry in history if "warning" in entry]


def length_warning(train: pa.Table, config: TrainConfig, family: str) -> str:
    """Return one line where the training captions are much longer than the family's usual ones, or "".

    `train`: of PAIRS_SCHEMA. Lengths are in words.
    """
    usual = recipe_of(family).caption_words
    captions = pc.utf8_trim_whitespace(pc.list_flatten(train["reference_captions"]))
    median = pc.quantile(pc.list_value_length(pc.utf8_split_whitespace(captions)), 0.5)[0].as_py()
    if usual is None or median is None or median <= MUCH_LONGER * usual:
        return ""
    return (
        f"the captions have {median:.0f} words at the median, those that {family} models were trained on about {usual}:"
        f" give training more epochs, and raise --max-new-tokens (now {config.model.max_new_tokens}) where captions are"
        " cut in evaluation"
    )
