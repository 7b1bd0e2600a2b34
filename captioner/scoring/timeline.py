"""When the rows of a run were made, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

MOST_BUCKETS = 4_096


class Timeline:
    """Rows by time, in buckets of `width` seconds: 1 at first, doubled whenever there are too many buckets."""

    def __init__(self, most: int = MOST_BUCKETS) -> None:
        self._most = most
        self._rows: Counter[int] = Counter()  # number of the bucket since the epoch -> rows
        self.width = 1

    def add(self, rows: Mapping[int, int]) -> None:
        """`rows`: second since the epoch -> rows made in it."""
        for second, count in rows.items():
            self._rows[second // self.width] += count
        while len(self._rows) > self._most:
            self._halve()

    def _halve(self) -> None:
        self.width *= 2
        merged: Counter[int] = Counter()
        for bucket, count in self._rows.items():
            merged[bucket // 2] += count
        self._rows = merged

    def to_list(self) -> list[tuple[int, int]]:
        """(first second of the bucket, rows) of each bucket with rows, in order."""
        return [(bucket * self.width, count) for bucket, count in sorted(self._rows.items())]
