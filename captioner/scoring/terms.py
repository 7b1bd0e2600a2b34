"""Read a list of terms (--terms) and find them in captions."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from captioner.errors import UsageError
from captioner.files import open_filesystem
from captioner.sources.tables import SAVE_AS_UTF8, decode_text

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # scripts that put no spaces between words
)


def read_terms(file: str) -> tuple[str, ...]:
    """Read one term a line; empty lines and lines that start with # are ignored. Raises UsageError."""
    try:
        filesystem, path = open_filesystem(file)
        with filesystem.open_input_stream(path) as stream:
            lines = decode_text(stream.read()).splitlines()
    except OSError as error:
        raise UsageError(f"--terms {file}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--terms {file}: it is not UTF-8 text; {SAVE_AS_UTF8}") from None
    terms = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not terms:
        raise UsageError(f"--terms {file}: has no terms; write one on each line")
    return terms


def term_finder(terms: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a text contains one of the terms.

    Case is ignored, and whether accents are composed. A term has to be at the start of a word: `gypsy` finds "Gypsys"
    but `ass` does not find "grass". In scripts without spaces a term may be anywhere.
    """
    if not terms:
        return lambda text: False
    terms = [unicodedata.normalize("NFC", term) for term in terms]
    alternatives = "|".join(_pattern(term) for term in sorted(terms, key=len, reverse=True))
    search = re.compile(alternatives, re.I).search
    starts = {term.split()[0].lower() for term in terms}

    def contains_term(text: str) -> bool:
        composed = unicodedata.normalize("NFC", text)
        lower = composed.lower()
        return any(start in lower for start in starts) and search(composed) is not None  # the pattern alone is slow

    return contains_term


def _pattern(term: str) -> str:
    words = r"\s+".join(re.escape(word) for word in term.split())
    at_word_start = re.match(rf"[^\W_{UNSPACED}]", term)
    return rf"(?<![^\W_]){words}" if at_word_start else words
