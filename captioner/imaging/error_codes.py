"""Why an image cannot be used: Pillow's many exceptions as one, with a code of `captioner.data.ERROR_CODES`."""

from __future__ import annotations

import re
import struct

from PIL import Image

_MESSAGE_LENGTH = 200
_OBJECT_ADDRESS = re.compile(r"<[\w.]+ object at 0x[0-9a-f]+>")
_SAYS_TRUNCATED = re.compile(r"truncated|end of file")
_SAYS_UNSUPPORTED = re.compile(
    r"unsupported|not supported|not implemented|not installed|cannot handle|unknown (?!error)"
)


class ImageError(Exception):
    """An image that cannot be used.

    `code` is one of ERROR_CODES. `width`, `height`, `format`: what the header told; 0 and "" where it told nothing.
    """

    def __init__(self, code: str, message: str, width: int = 0, height: int = 0, format: str = "") -> None:
        super().__init__(code, message, width, height, format)
        self.code, self.message = code, message
        self.width, self.height, self.format = width, height, format


def code_of(error: BaseException, data: bytes) -> str:
    """The code for what a Pillow plugin raised on `data`.

    Pillow tells missing bytes from damaged ones by the kind of exception, by its cause, or only by its words.
    """
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    words = " ".join(str(cause) for cause in causes).lower()
    if isinstance(error, Image.DecompressionBombError):
        return "too_many_pixels"
    if any(isinstance(cause, EOFError | IndexError | struct.error) for cause in causes) or _SAYS_TRUNCATED.search(
        words
    ):
        return "truncated"
    if data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") + 8 > len(data):
        return "truncated"  # WebP: its decoder only says that it failed
    if isinstance(error, NotImplementedError) or _SAYS_UNSUPPORTED.search(words):
        return "unsupported_format"
    return "decode_error"


def one_line(error: BaseException | str) -> str:
    """What went wrong, for a table cell: no control characters, at most 200 characters."""
    text = _OBJECT_ADDRESS.sub("file", str(error) or type(error).__name__)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _MESSAGE_LENGTH else text[: _MESSAGE_LENGTH - 1] + "…"
