"""Batches of pictures of own sizes: the model's processor works on the next one while the device captions one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from captioner.data import Pixels


@dataclass(frozen=True)
class OwnBatch:
    """Pictures, and what the processor made of them all; a slice of it is made anew."""

    pictures: Pixels
    make: Callable[[Pixels], Any]
    made: Future[Any] | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, piece: slice) -> OwnBatch:
        return OwnBatch(self.pictures[piece], self.make)

    def result(self) -> Any:
        """What `make` gave, or raised."""
        return self.make(self.pictures) if self.made is None else self.made.result()


def batches(pictures: Pixels, size: int, make: Callable[[Pixels], Any]) -> Iterator[OwnBatch]:
    """`size` pictures in each; one is made ahead."""
    pieces = [pictures[first : first + size] for first in range(0, len(pictures), size)]
    with ThreadPoolExecutor(1) as ahead:
        made = ahead.submit(make, pieces[0])
        for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
            batch = OwnBatch(piece, make, made)
            if following is not None:
                made = ahead.submit(make, following)
            yield batch
