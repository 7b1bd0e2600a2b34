"""Read a list of terms (--terms) and find them in captions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from captioner.errors import UsageError

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # scripts that put no spaces between words
)


def read_terms(file: str) -> tuple[str, ...]:
    """Read one term a line; empty lines and lines that start with # are ignored. Raises UsageError."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--terms {file}: cannot be read: {error}") from None
    terms = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not terms:
        raise UsageError(f"--terms {file}: has no terms; write one on each line")
    return terms


def term_finder(terms: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a text contains one of the terms.

    Case is ignored, and a term has to be at the start of a word: `gypsy` finds "Gypsys" but `ass` does not find
    "grass". In scripts without spaces a term may be anywhere.
    """
    if not terms:
        return lambda text: False
    alternatives = "|".join(_pattern(term) for term in sorted(terms, key=len, reverse=True))
    search = re.compile(alternatives, re.I).search
    starts = {term.split()[0].lower() for term in terms}

    def contains_term(text: str) -> bool:
        lower = text.lower()
        return any(start in lower for start in starts) and search(text) is not None  # the pattern alone is slow

    return contains_term


def _pattern(term: str) -> str:
    words = r"\s+".join(re.escape(word) for word in term.split())
    at_word_start = re.match(rf"[^\W_{UNSPACED}]", term)
    return rf"(?<![^\W_]){words}" if at_word_start else words
