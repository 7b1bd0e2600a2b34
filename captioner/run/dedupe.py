"""Caption byte-equal images once.

Within a chunk the first of them is captioned and the others take its caption. Across chunks each worker remembers its
latest captions. Chunks never wait for each other, so copies in chunks of different workers, or in two chunks that one
worker processes at the same time, may be captioned again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

CaptionT = TypeVar("CaptionT")

MAX_REMEMBERED = 100_000  # captions per worker: about 50 MB


class CaptionMemory(Generic[CaptionT]):
    """A least-recently-used cache: sha256 of a file -> id and caption of the image that was captioned. Thread-safe."""

    def __init__(self, limit: int = MAX_REMEMBERED) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._captions: OrderedDict[str, tuple[str, CaptionT]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._captions)

    def get(self, sha256: str) -> tuple[str, CaptionT] | None:
        """Return (image id, caption), or None where that file is not remembered."""
        with self._lock:
            if sha256 in self._captions:
                self._captions.move_to_end(sha256)
            return self._captions.get(sha256)

    def add(self, sha256: str, image_id: str, caption: CaptionT) -> None:
        """Remember a caption; drop the least recently used one above the limit."""
        with self._lock:
            self._captions[sha256] = image_id, caption
            if len(self._captions) > self._limit:
                self._captions.popitem(last=False)


@dataclass(frozen=True)
class Copies(Generic[CaptionT]):
    """Indices of a chunk's rows by what has to be done for them.

    `unique`: to be captioned. `first_of`: copy -> the index in `unique` of the same file. `remembered`: copy of a file
    of an earlier chunk -> that image's id and caption.
    """

    unique: list[int] = field(default_factory=list)
    first_of: dict[int, int] = field(default_factory=dict)
    remembered: dict[int, tuple[str, CaptionT]] = field(default_factory=dict)


def find_copies(
    indices: Iterable[int], sha256s: list[str | None], memory: CaptionMemory[CaptionT] | None
) -> Copies[CaptionT]:
    """Return which of the rows at `indices` are copies. Without a memory, and without a sha256, a row is unique."""
    copies: Copies[CaptionT] = Copies()
    first_with: dict[str, int] = {}
    for index in indices:
        sha256 = sha256s[index]
        if memory is None or sha256 is None:
            copies.unique.append(index)
        elif sha256 in first_with:
            copies.first_of[index] = first_with[sha256]
        elif (remembered := memory.get(sha256)) is not None:
            copies.remembered[index] = remembered
        else:
            first_with[sha256] = index
            copies.unique.append(index)
    return copies
