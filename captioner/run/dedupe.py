"""Images that are there more than once, byte for byte, are captioned once.

Within a chunk the first one is captioned and the others take its caption. Across chunks each worker remembers the
captions it made lately. No chunk waits for another, so copies in chunks of different workers, or in two that one worker
has under way at once, may be captioned anew.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

CaptionT = TypeVar("CaptionT")

REMEMBERED = 100_000  # captions each worker remembers: some 50 MB


class CaptionMemory(Generic[CaptionT]):
    """sha256 of a file -> id and caption of the image that was captioned. Forgets what was longest unused. Several
    threads may use one at once."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[str, CaptionT]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, sha256: str) -> tuple[str, CaptionT] | None:
        with self._lock:
            if sha256 in self._known:
                self._known.move_to_end(sha256)
            return self._known.get(sha256)

    def add(self, sha256: str, image_id: str, caption: CaptionT) -> None:
        with self._lock:
            self._known[sha256] = image_id, caption
            if len(self._known) > self._limit:
                self._known.popitem(last=False)


@dataclass(frozen=True)
class Copies(Generic[CaptionT]):
    """Places of a chunk: `new`, to be captioned; `of`, copies and the place in `new` they are copies of; `known`,
    copies of what an earlier chunk had, with that image's id and caption."""

    new: list[int]
    of: dict[int, int]
    known: dict[int, tuple[str, CaptionT]]


def find_copies(
    places: Iterable[int], sha256s: list[str | None], memory: CaptionMemory[CaptionT] | None
) -> Copies[CaptionT]:
    """Share `places` out. Without a memory every image is new, and so is one without a sha256."""
    found: Copies[CaptionT] = Copies([], {}, {})
    first: dict[str, int] = {}
    for place in places:
        sha256 = sha256s[place]
        if memory is None or sha256 is None:
            found.new.append(place)
        elif sha256 in first:
            found.of[place] = first[sha256]
        elif (known := memory.get(sha256)) is not None:
            found.known[place] = known
        else:
            first[sha256] = place
            found.new.append(place)
    return found
