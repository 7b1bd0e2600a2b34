"""Make text from data safe to print: names, captions and messages of other people's files."""

from __future__ import annotations

import re
import shlex

# Characters that move the cursor, change colours, turn the reading direction or break the line.
_SPACES = re.compile(r"[\t\n\v\f\r\x85\u2028\u2029]+")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")  # stand for bytes of file names that are not UTF-8


def printable(text: object) -> str:
    """Return `str(text)` as one line without control characters.

    Line breaks and tabs become a space, bytes that are not UTF-8 become U+FFFD, every other character stays.
    """
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", _SPACES.sub(" ", str(text))))


def valid_unicode(text: str) -> str:
    """Return `text` with a question mark for each half of a surrogate pair, which no UTF-8 text may hold.

    Servers and browsers send them where they cut a text.
    """
    return text.encode(errors="replace").decode()


def counted(count: float, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 image", "1,200 images", "0.5 GPUs".

    `plural`: where it is not the noun with an s.
    """
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun if count == 1 else plural or noun + 's'}"


def shell_command(*words: str) -> str:
    """Return a command of the captioner as it is typed in a shell."""
    return shlex.join(["captioner", *words])


def shorten(text: str, max_length: int) -> str:
    """Return `text` cut to `max_length` characters, with an ellipsis when it is longer."""
    return text if len(text) <= max_length else text[: max_length - 1] + "…"
