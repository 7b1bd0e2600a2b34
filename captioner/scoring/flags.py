"""Flags for suspicious captions, which need neither a reference nor the image."""

from __future__ import annotations

import math
import re

import regex

from captioner.scoring.chat_habits import HABITS, KINDS, chat_habits
from captioner.scoring.normalise import separate_characters

# Flags of one caption, stored in its row of the captions table.
CAPTION_FLAGS = {
    "empty": "no text",
    "truncated": "cut off at the token limit",
    "no_logprob": "the model gave no finite log-probability",
    "logprob_not_given": "the model server gives no log-probabilities",  # in tables of earlier versions
    "repeated": "repeats a word or phrase",
    "special_tokens": "contains special or [unused] tokens",
    "image_of": "starts with words like “image of”, which tell a reader of alt text nothing",
    "over_125": "longer than 125 characters, the recommended limit for alt text",
    "over_250": "longer than 250 characters",
} | HABITS
# Flags of a caption compared with the others of its run, stored in OUT/checks.
RUN_FLAGS = {
    "same_caption": "the same caption for many different images",
    "low_confidence": "among the lowest log-probabilities of this run",
    "other_language": "in another language than --language, or than the rest of the run",
    "listed_term": "contains a term of the list given with --terms",
}
ALL_FLAGS = CAPTION_FLAGS | RUN_FLAGS
# Names that people see in place of those that tables store, where these are short or have a second meaning: an image
# file can be truncated too (`captioner.data.ERROR_CODES`). Tables keep the stored names, so that earlier ones open.
_SHOWN_NAMES = {
    "truncated": "cut off",
    "no_logprob": "no log-probability",
    "image_of": "starts with “image of”",
    "over_125": "over 125 characters",
    "over_250": "over 250 characters",
}

# Flags that say a caption is wrong whatever the image shows; the others are a matter of style, length or rank.
FAULTS = frozenset(
    {"empty", "truncated", "no_logprob", "repeated", "special_tokens", "refusal", "repeats_prompt"}
    | {"same_caption", "other_language", "listed_term"}
)

SPECIAL_TOKENS = re.compile(
    r"\[(?:unused\d+|unk|pad|cls|sep|mask)\]|<(?:/?s|pad|unk|bos|eos|mask|image|\|[^|>]*\|)>|\ufffd", re.I
)
_IMAGE_OF = re.compile(
    r"\W*(?:(?:this|here|there)\s+is\s+)?(?:an?\s+|the\s+|this\s+)?(?:close[\s-]?up\s+|black and white\s+|\w+\s+)?"
    rf"{KINDS}\s+(?:of|showing|depicting)\b",
    re.I,
)
_TOKENS = regex.compile(r"\w+|[^\w\s]")
MAX_PHRASE_WORDS = 6


def flag_name(flag: str) -> str:
    """Return the name of a stored flag as people see it: "cut off" for truncated."""
    return _SHOWN_NAMES.get(flag, flag.replace("_", " "))


def caption_flags(text: str, logprob_mean: float | None = 0.0, finished: bool = True, prompt: str = "") -> list[str]:
    """Return the flags of one caption, in the order of CAPTION_FLAGS.

    `logprob_mean`: NaN when the model gave none, None when it never gives any. `finished`: the end token came within
    the limit. `prompt`: the question that a chat model was asked.
    """
    habits = chat_habits(text, prompt)
    applies = {
        "empty": not text.strip(),
        "truncated": not finished,
        "no_logprob": logprob_mean is not None and not math.isfinite(logprob_mean),
        "repeated": is_repetitive(text),
        "special_tokens": SPECIAL_TOKENS.search(text) is not None,
        "image_of": _IMAGE_OF.match(text) is not None,
        "over_125": len(text) > 125,
        "over_250": len(text) > 250,
    } | {name: name in habits for name in HABITS}
    return [flag for flag in CAPTION_FLAGS if applies.get(flag)]


def is_repetitive(text: str) -> bool:
    """Return whether a word, or a phrase of up to 6 words, comes three times in a row; see `split_words`.

    Twice is fine: "a red square, a red square and a ring" may be a correct caption.
    """
    words = _TOKENS.findall(separate_characters(text.lower()))
    if len(words) - len(set(words)) < 2:
        return False  # no word comes three times
    return any(_repeats(words, size) for size in range(1, MAX_PHRASE_WORDS + 1))


def _repeats(words: list[str], size: int) -> bool:
    """Return whether a phrase of `size` words comes three times in a row."""
    run = 0
    for index in range(size, len(words)):
        run = run + 1 if words[index] == words[index - size] else 0
        if run == 2 * size:
            return True
    return False
