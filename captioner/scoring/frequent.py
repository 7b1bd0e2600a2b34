"""The most frequent texts of a stream in bounded memory (Misra and Gries 1982)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class Frequent:
    """Counts texts; above `capacity` distinct ones the rare are forgotten.

    A count is too low by at most `error`; while nothing was forgotten (`error` 0) counts are exact.
    """

    def __init__(self, capacity: int = 100_000) -> None:
        self._capacity = capacity
        self._counts: Counter[str] = Counter()
        self.error = 0

    def add(self, counts: Mapping[str, int]) -> None:
        self._counts.update(counts)
        if len(self._counts) > 2 * self._capacity:
            least = self._counts.most_common(self._capacity + 1)[-1][1]
            self._counts = Counter({text: count - least for text, count in self._counts.items() if count > least})
            self.error += least

    def most_common(self, number: int | None = None) -> list[tuple[str, int]]:
        """By count, then by text."""
        ordered = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        return ordered[:number]

    def __len__(self) -> int:
        """Distinct texts: at least so many where `error` is not 0."""
        return len(self._counts)
