"""Pillow's process-wide settings as decoding needs them, put back afterwards."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

from PIL import Image


class _Shared:
    """What the process had before the first thread came in, for the last one out to put back.

    `warnings.catch_warnings` (before Python 3.14) and Pillow's limit are process-wide: threads that overlap would put
    them back in the wrong order, so they share one change.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.limit = Image.MAX_IMAGE_PIXELS
        self.warnings = warnings.catch_warnings()

    def enter(self, limit: int) -> None:
        with self.lock:
            if self.inside == 0:
                self.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limit
                self.warnings = warnings.catch_warnings()
                self.warnings.__enter__()
                warnings.simplefilter("ignore")
            self.inside += 1
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, limit)

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                Image.MAX_IMAGE_PIXELS = self.limit
                self.warnings.__exit__(None, None, None)


_shared = _Shared()


@contextlib.contextmanager
def decoding(max_pixels: int) -> Iterator[None]:
    """Inside, Pillow refuses images above `max_pixels`, those inside other files too, and nothing warns.

    Pillow's own limit is 179 million pixels, less than a large scan has. It refuses above twice the number it is given.
    """
    _shared.enter((max_pixels + 1) // 2)
    try:
        yield
    finally:
        _shared.leave()
