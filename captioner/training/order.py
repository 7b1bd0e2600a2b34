"""Which pair is read at which step: one seeded order for all workers, whatever their number.

The order is one permutation of the training pairs for each epoch, concatenated. Optimiser step s of a run with global
batch size G takes positions s * G to (s + 1) * G, and each worker takes its share of them. So every batch is full,
every pair occurs exactly once in an epoch, and a run can resume at any step.
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
PAIRS_PER_TABLE = 32


@dataclass(frozen=True, slots=True)
class Share:
    """A worker's part of each step's batch. `batch_size`: pairs of one forward pass of one worker."""

    rank: int
    world_size: int
    batch_size: int
    accumulation: int = 1

    @property
    def global_batch_size(self) -> int:
        return self.world_size * self.batch_size * self.accumulation

    def positions(self, step: int) -> npt.NDArray[np.int64]:
        """Return this worker's positions in the global order for a step, int64 [accumulation * batch_size]."""
        first = step * self.global_batch_size + self.rank * self.batch_size
        starts = first + np.arange(self.accumulation) * (self.world_size * self.batch_size)
        return (starts[:, None] + np.arange(self.batch_size)).reshape(-1)


class GlobalOrder:
    """The pairs of a table in training order, each with the caption that is trained in its epoch."""

    def __init__(self, pairs: pa.Table, seed: int, choice: CaptionChoice) -> None:
        self._pairs, self._seed, self._choice = pairs, seed, choice
        counts = pc.list_value_length(pairs["reference_captions"]).to_numpy()
        # The row of each entry: with "all" an entry is one caption of an image, else an image.
        self._rows = np.repeat(np.arange(len(pairs)), counts) if choice == "all" else np.arange(len(pairs))
        self._first_entries = np.cumsum(counts) - counts

    def __len__(self) -> int:
        """Return the number of entries of one epoch."""
        return len(self._rows)

    def take(self, positions: npt.NDArray[np.int64]) -> pa.Table:
        """Return the pairs at ascending positions of the order, with a column `caption`."""
        epochs, offsets = np.divmod(positions, len(self))
        entries = np.concatenate(
            [_permutation(self._seed, int(e), len(self))[offsets[epochs == e]] for e in np.unique(epochs)]
        )
        rows = self._pairs.take(self._rows[entries])
        references = rows["reference_captions"].to_pylist()
        indices = self._caption_indices(rows["image_id"].to_pylist(), epochs, entries, list(map(len, references)))
        captions = [texts[index] for texts, index in zip(references, indices, strict=True)]
        return rows.append_column("caption", pa.array(captions, pa.string()))

    def _caption_indices(
        self, ids: list[str], epochs: npt.NDArray[np.int64], entries: npt.NDArray[np.int64], counts: list[int]
    ) -> list[int]:
        """Return which of its captions each row is trained with."""
        if self._choice == "random":
            rows = zip(ids, epochs, counts, strict=True)
            return [caption_index(self._seed, int(epoch), image_id, count) for image_id, epoch, count in rows]
        if self._choice == "all":
            indices: list[int] = (entries - self._first_entries[self._rows[entries]]).tolist()
            return indices
        return [0] * len(ids)

    def tables(self, share: Share, first_step: int, last_step: int) -> Iterator[pa.Table]:
        """Yield this worker's pairs of steps [first_step, last_step), about PAIRS_PER_TABLE at a time."""
        steps = max(1, PAIRS_PER_TABLE // (share.batch_size * share.accumulation))
        for first in range(first_step, last_step, steps):
            yield self.take(np.concatenate([share.positions(s) for s in range(first, min(first + steps, last_step))]))


def caption_index(seed: int, epoch: int, image_id: str, count: int) -> int:
    """Return which of its `count` captions an image has in an epoch: a hash, so the same on every worker."""
    digest = blake2b(f"{seed}:{epoch}:{image_id}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)
