"""The language of captions, by py3langid: a Bayes model of 140 languages whose 4.6 MB come in its wheel.

Captions are short, so a caption counts as one of another language only where that is far more probable. With these
limits none of 482 English texts (most of them captions of COCO) does, and 51 of 59 short captions in 21 other languages
do.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from captioner.errors import UsageError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

MIN_PROBABILITY = 0.5  # of the language of a caption
TIMES_AS_PROBABLE = 250  # how much more probable another language must be, for a caption to count as written in it
_SAME = {"nb": "no"}  # tags that the model has under another name


def language_of(text: str) -> str | None:
    """Return the language code of a caption, such as "en"; None when undecided."""
    code, probability = _most_probable(text)
    return code if probability >= MIN_PROBABILITY else None


def is_in_other_language(text: str, language: str) -> bool:
    """Return whether another language than this one, a code of `recognised_languages`, is far more probable."""
    code, probability = _most_probable(text)
    if code == language:  # most captions, for which the other languages, and sorting them, are not needed
        return False
    probabilities: dict[str, float] = dict(_identifier().rank(text))
    return probability > TIMES_AS_PROBABLE * probabilities[language]


def language_code(tag: str) -> str:
    """Return the language code of a tag such as "pt-BR". Raises UsageError when the model does not know it."""
    primary = tag.split("-")[0].lower()
    code = _SAME.get(primary, primary)
    if code not in recognised_languages():
        names = ", ".join(sorted(recognised_languages()))
        raise UsageError(f"--language {tag}: captions in this language are not recognised; recognised are: {names}")
    return code


def recognised_languages() -> set[str]:
    """Return the language codes that the model knows."""
    return set(_identifier().labels) - {"zxx"}  # no language at all


@lru_cache(maxsize=10_000)
def _most_probable(text: str) -> tuple[str, float]:
    """Return the most probable language code with its probability."""
    code, probability = _identifier().classify(text)
    return code, probability


@lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
