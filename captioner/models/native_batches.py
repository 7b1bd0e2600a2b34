"""Batches of images of own sizes: the model's processor works on the next one while the device captions one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from captioner.data import Pixels
from captioner.run.prefetch import one_ahead


@dataclass(frozen=True)
class ProcessedBatch:
    """Images, and what the processor made of them all; a slice of it is made anew."""

    pictures: Pixels
    make: Callable[[Pixels], Any]
    made: Any = None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, piece: slice) -> ProcessedBatch:
        return ProcessedBatch(self.pictures[piece], self.make)

    def result(self) -> Any:
        """What `make` gave."""
        return self.make(self.pictures) if self.made is None else self.made


def batches(
    pictures: Pixels, size: int, make: Callable[[Pixels], Any]
) -> AbstractContextManager[Iterator[ProcessedBatch]]:
    """`size` images in each; one is made ahead, the first at once."""
    pieces = (pictures[first : first + size] for first in range(0, len(pictures), size))
    return one_ahead(ProcessedBatch(piece, make, make(piece)) for piece in pieces)
