"""Set Pillow's process-wide settings for decoding, and restore them afterwards."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

from PIL import Image


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
