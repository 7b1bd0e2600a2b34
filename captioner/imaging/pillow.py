"""Pillow's exceptions as error codes, and its process-wide settings while an image is decoded."""

from __future__ import annotations

import contextlib
import re
import struct
import threading
import warnings
from collections.abc import Iterator

from PIL import Image

_MESSAGE_LENGTH = 200
_WORD = re.compile(r"[^\W\d_]{2,}")
_OBJECT_ADDRESS = re.compile(r"<[\w.]+ object at 0x[0-9a-f]+>")
_SAYS_TRUNCATED = re.compile(r"truncated|end of file")
_SAYS_UNSUPPORTED = re.compile(
    r"unsupported|not supported|not implemented|not installed|cannot handle|unknown (?!error)"
)


class ImageError(Exception):
    """Raised for an image that cannot be used.

    `code` is one of ERROR_CODES. `width`, `height`, `format`: from the header; 0 and "" where it cannot be read.
    """

    def __init__(self, code: str, message: str, width: int = 0, height: int = 0, format: str = "") -> None:
        super().__init__(code, message, width, height, format)
        self.code, self.message = code, message
        self.width, self.height, self.format = width, height, format


def code_of(error: BaseException, data: bytes) -> str:
    """Return the error code for an exception that a Pillow plugin raised on `data`.

    Missing and damaged bytes differ by the type of exception, by its cause, or only by its message.
    """
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    message = " ".join(str(cause) for cause in causes).lower()
    if isinstance(error, Image.DecompressionBombError):
        return "too_many_pixels"
    if any(isinstance(cause, EOFError | IndexError | struct.error) for cause in causes) or _SAYS_TRUNCATED.search(
        message
    ):
        return "truncated"
    if data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") + 8 > len(data):
        return "truncated"  # the message of the WebP decoder does not tell
    if isinstance(error, NotImplementedError) or _SAYS_UNSUPPORTED.search(message):
        return "unsupported_format"
    return "decode_error"


def one_line(error: BaseException | str) -> str:
    """Return the message for a table cell: one line without control characters, at most 200 characters."""
    first = error.args[0] if isinstance(error, BaseException) and error.args else None
    text = _OBJECT_ADDRESS.sub("file", first.decode("latin-1") if isinstance(first, bytes) else str(error))
    # Of Python's own: "Python int too large to convert to C ssize_t"; or "", "320" or "(3, 16)".
    is_no_sentence = isinstance(error, OverflowError | struct.error) or len(_WORD.findall(text)) < 2
    if isinstance(error, BaseException) and is_no_sentence:
        details = f"{type(error).__name__}: {text}".rstrip(": ")
        text = f"the file holds something that its decoder does not expect ({details})"
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _MESSAGE_LENGTH else text[: _MESSAGE_LENGTH - 1] + "…"


class _Shared:
    """The settings before the first thread changed them, which the last thread restores.

    `warnings.catch_warnings` (before Python 3.14) and Pillow's limit are process-wide: threads that overlap would
    restore them in the wrong order, so they share one change.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_threads = 0
        self.limit = Image.MAX_IMAGE_PIXELS
        self.warnings = warnings.catch_warnings()

    def enter(self, limit: int) -> None:
        with self.lock:
            if self.num_threads == 0:
                self.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limit
                self.warnings = warnings.catch_warnings()
                self.warnings.__enter__()
                warnings.simplefilter("ignore")
            self.num_threads += 1
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, limit)

    def leave(self) -> None:
        with self.lock:
            self.num_threads -= 1
            if self.num_threads == 0:
                Image.MAX_IMAGE_PIXELS = self.limit
                self.warnings.__exit__(None, None, None)


_shared = _Shared()


@contextlib.contextmanager
def decoding(max_pixels: int) -> Iterator[None]:
    """Let Pillow refuse images above `max_pixels`, those inside other files too, and ignore warnings.

    Pillow's default limit is 179 million pixels, less than a large scan has. It refuses above twice the limit.
    """
    _shared.enter((max_pixels + 1) // 2)
    try:
        yield
    finally:
        _shared.leave()
