"""A draw of rows that depends on their ids and a seed, and on nothing else: not on shards, workers or batches."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Generic, TypeVar

RowT = TypeVar("RowT")


def rank(image_id: str, seed: int) -> int:
    """The place of a row in the seed's order of all ids: 64 bits of a hash."""
    return int.from_bytes(blake2b(f"{seed}:{image_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest())


class Draw(Generic[RowT]):
    """The `size` rows of lowest rank among those offered, in bounded memory."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[int, str, RowT]] = []  # of negative ranks: the highest rank is on top

    def offer(self, place: int, image_id: str, row: RowT) -> None:
        """`place`: the row's `rank`, or any number to draw the lowest of."""
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, (-place, image_id, row))
        elif self._heap and -place > self._heap[0][0]:
            heapq.heapreplace(self._heap, (-place, image_id, row))

    def offer_all(self, rows: Iterable[tuple[int, str, RowT]]) -> None:
        for place, image_id, row in rows:
            self.offer(place, image_id, row)

    @property
    def highest(self) -> int | None:
        """The rank of the last row drawn; `None` where fewer were offered than may be drawn: then all are in."""
        return -self._heap[0][0] if self._heap and len(self._heap) == self._size else None

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[RowT]:
        """Lowest rank first."""
        return (row for _, _, row in sorted(self._heap, key=lambda item: (-item[0], item[1])))
