"""What a stream of texts holds, in bounded memory: its most frequent texts, and how many different ones."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import blake2b


class Frequent:
    """Counts texts (Misra and Gries 1982); above `capacity` distinct ones the rare are forgotten.

    A count is too low by at most `error`; while nothing was forgotten (`error` 0) counts are exact.
    """

    def __init__(self, capacity: int = 20_000) -> None:
        self._capacity = capacity
        self._counts: Counter[str] = Counter()
        self._distinct = Distinct()
        self.error = 0

    def add(self, counts: Mapping[str, int]) -> None:
        self._distinct.add(counts)
        for text, count in counts.items():
            self._counts[text] += count
            if len(self._counts) > 2 * self._capacity:
                self._forget()

    def _forget(self) -> None:
        least = self._counts.most_common(self._capacity + 1)[-1][1]
        self._counts = Counter({text: count - least for text, count in self._counts.items() if count > least})
        self.error += least

    def most_common(self, number: int | None = None) -> list[tuple[str, int]]:
        """By count, then by text."""
        ordered = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        return ordered[:number]

    def __len__(self) -> int:
        """Distinct texts; where `error` is not 0 an estimate, off by 1.6 % (one standard error)."""
        return self._distinct.estimate() if self.error else len(self._counts)


class Distinct:
    """How many different texts there were, from the `size` lowest of their hashes (Bar-Yossef et al. 2002).

    Exact up to `size`; above, the standard error is 1 / sqrt(size - 2) of the number.
    """

    def __init__(self, size: int = 4_096) -> None:
        self._size = size
        self._lowest: list[int] = []  # a heap of negative hashes: the highest is on top
        self._kept: set[int] = set()

    def add(self, texts: Iterable[str]) -> None:
        for text in texts:
            number = int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
            if number in self._kept:
                continue
            if len(self._kept) < self._size:
                heapq.heappush(self._lowest, -number)
            elif number < -self._lowest[0]:
                self._kept.discard(-heapq.heapreplace(self._lowest, -number))
            else:
                continue
            self._kept.add(number)

    def estimate(self) -> int:
        if len(self._kept) < self._size:
            return len(self._kept)
        return round((self._size - 1) * 2**64 / -self._lowest[0])
