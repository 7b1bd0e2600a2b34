"""Which pair is read when: one seeded order for all workers, whatever their number.

The order is one permutation of the training pairs for each epoch, one after the other without a gap. Optimiser step s
of a run with global batch size G takes positions s * G to (s + 1) * G; each worker takes its share of them. So every
batch is full, every pair comes exactly once in an epoch, and a run goes on at any step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

CaptionChoice = Literal["random", "first", "all"]
PICTURES_PER_TABLE = 32


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of each step's batch a worker takes. `batch_size`: of one forward pass of one worker."""

    rank: int
    world_size: int
    batch_size: int
    accumulation: int = 1

    @property
    def global_batch_size(self) -> int:
        return self.world_size * self.batch_size * self.accumulation

    def positions(self, step: int) -> npt.NDArray[np.int64]:
        """Positions in the global order of this worker's part of step `step`, int64 [accumulation * batch_size]."""
        first = step * self.global_batch_size + self.rank * self.batch_size
        starts = first + np.arange(self.accumulation) * (self.world_size * self.batch_size)
        return (starts[:, None] + np.arange(self.batch_size)).reshape(-1)


class GlobalOrder:
    """The pairs of a table in training order, each with the caption drawn for it."""

    def __init__(self, pairs: pa.Table, seed: int, choice: CaptionChoice) -> None:
        self._pairs, self._seed, self._choice = pairs, seed, choice
        counts = pc.list_value_length(pairs["reference_captions"]).to_numpy()
        # With "all" an entry is one caption of a picture, else a picture.
        self._entries = np.repeat(np.arange(len(pairs)), counts) if choice == "all" else np.arange(len(pairs))
        self._starts = np.cumsum(counts) - counts

    def __len__(self) -> int:
        """Entries of one epoch."""
        return len(self._entries)

    def take(self, positions: npt.NDArray[np.int64]) -> pa.Table:
        """The pairs at these positions of the order, with a column `caption`."""
        epochs, places = np.divmod(positions, len(self))
        entries = np.concatenate(
            [_permutation(self._seed, int(e), len(self))[places[epochs == e]] for e in _runs(epochs)]
        )
        rows = self._pairs.take(self._entries[entries])
        captions, ids = rows["reference_captions"].to_pylist(), rows["image_id"].to_pylist()
        if self._choice == "random":
            numbers = [drawn(self._seed, int(e), i, len(c)) for e, i, c in zip(epochs, ids, captions, strict=True)]
        elif self._choice == "all":
            numbers = (entries - self._starts[self._entries[entries]]).tolist()
        else:
            numbers = [0] * len(rows)
        chosen = [some[number] for some, number in zip(captions, numbers, strict=True)]
        return rows.append_column("caption", pa.array(chosen, pa.string()))

    def tables(self, share: Share, first_step: int, last_step: int) -> Iterator[pa.Table]:
        """Yield the pairs of a worker for steps [first_step, last_step), in tables of whole steps."""
        steps = max(1, PICTURES_PER_TABLE // (share.batch_size * share.accumulation))
        for first in range(first_step, last_step, steps):
            yield self.take(np.concatenate([share.positions(s) for s in range(first, min(first + steps, last_step))]))


def drawn(seed: int, epoch: int, image_id: str, count: int) -> int:
    """Which of `count` captions a picture has in an epoch: a hash, the same on every worker."""
    digest = blake2b(f"{seed}:{epoch}:{image_id}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _runs(epochs: npt.NDArray[np.int64]) -> list[int]:
    """The epochs that occur; positions rise, so do they."""
    return sorted(set(epochs.tolist()))
