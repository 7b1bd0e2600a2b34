"""Sample rows by their ids and a seed alone, so that shards, workers and batches do not change the sample."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from hashlib import blake2b
from typing import Generic, TypeVar

RowT = TypeVar("RowT")


def rank(image_id: str, seed: int) -> int:
    """Return the position of an id in the seed's order of all ids: 64 bits of a hash."""
    return int.from_bytes(blake2b(f"{seed}:{image_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest())


class LowestRanks(Generic[RowT]):
    """Keeps the `size` rows with the lowest ranks among those offered; iterates lowest rank first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[int, str, RowT]] = []  # negative ranks, so that the highest rank is on top

    def offer(self, row_rank: int, image_id: str, row: RowT) -> None:
        """Add a row if its rank is among the lowest. `row_rank`: from `rank`, or any number to sort by."""
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, (-row_rank, image_id, row))
        elif self._heap and -row_rank > self._heap[0][0]:
            heapq.heapreplace(self._heap, (-row_rank, image_id, row))

    @property
    def max_rank(self) -> int | None:
        """The highest rank kept; `None` when fewer than `size` rows were offered, since then all are kept."""
        return -self._heap[0][0] if self._heap and len(self._heap) == self._size else None

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[RowT]:
        return (row for _, _, row in sorted(self._heap, key=lambda item: (-item[0], item[1])))
