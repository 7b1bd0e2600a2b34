"""A set of image ids in bounded memory, which also finds the ids that occur twice."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_BUCKETS = 64
_DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])
_BUFFERED = 262_144  # ids in memory, 4 MB, before they are written to files

_MAX_MIXED = 256  # bytes; longer ids get their digests one by one
# Of this process: nobody can make ids that collide.
_KEYS = np.frombuffer(secrets.token_bytes(16 * (_MAX_MIXED // 8 + 1)), "<u8").reshape(2, -1)
_PRIME = np.uint64(0x9E3779B97F4A7C15)

Digests = npt.NDArray[np.void]
Ids: TypeAlias = Sequence[str] | pa.Array | pa.ChunkedArray


class IdIndex:
    """A set of strings, kept as 16-byte digests: up to `buffered` in memory, more in 64 temporary files.

    100 million ids take 1.6 GB of disk and 25 MB of memory while one bucket is sorted. Two different ids share a digest
    with a probability below 1e-22 at that size.
    """

    def __init__(self, buffered: int = _BUFFERED) -> None:
        self._buffered = buffered
        self._folder = tempfile.TemporaryDirectory(prefix="captioner-ids-")
        self._pending: list[Digests] = []
        self._num_pending = 0
        self._is_on_disk = False
        self._sorted: list[Digests] | None = None

    def __enter__(self) -> IdIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sorted = None
        self._folder.cleanup()

    def add(self, ids: Ids) -> None:
        """Add ids to the set."""
        self._sorted = None
        self._pending.append(digests_of(ids))
        self._num_pending += len(ids)
        if self._num_pending >= self._buffered:
            self._flush()

    def duplicates(self) -> Digests:
        """Return the digests that were added more than once, each once."""
        repeated = [np.empty(0, _DIGEST)]
        for bucket in self._buckets():
            high = np.sort(bucket["high"])
            if (high[1:] == high[:-1]).any():  # sorting all of a digest takes four times as long
                bucket = bucket[_order_of(bucket)]
                repeated.append(bucket[1:][bucket[1:] == bucket[:-1]])
        return np.unique(np.concatenate(repeated))

    def contains(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return for each id whether it was added; bool [N]."""
        if self._sorted is None:
            buckets = enumerate(self._buckets())
            self._sorted = [self._map_sorted(number, bucket[_order_of(bucket)]) for number, bucket in buckets]
        wanted = digests_of(ids)
        is_added = np.zeros(len(wanted), bool)
        bucket_of = wanted["high"] % _BUCKETS
        for number in np.unique(bucket_of):
            bucket = self._sorted[number]
            indices = np.flatnonzero(bucket_of == number)
            nearest = np.searchsorted(bucket["high"], wanted["high"][indices])
            nearest = np.minimum(nearest, max(len(bucket) - 1, 0))
            if len(bucket):
                is_added[indices] = bucket[nearest] == wanted[indices]
        return is_added

    def _buckets(self) -> Iterator[Digests]:
        if self._is_on_disk and self._pending:
            self._flush()
        pending = _in_buckets(self._pending)
        for number in range(_BUCKETS):
            yield np.fromfile(self._path(number), _DIGEST) if self._is_on_disk else pending[number]

    def _map_sorted(self, number: int, bucket: Digests) -> Digests:
        """Write a sorted bucket of a set on disk to its file, and map that instead of holding it in memory."""
        if not self._is_on_disk or not len(bucket):
            return bucket
        bucket.tofile(self._path(number))
        return np.memmap(self._path(number), _DIGEST, mode="r")

    def _flush(self) -> None:
        """Append the digests in memory to the files of their buckets."""
        for number, digests in enumerate(_in_buckets(self._pending)):
            with self._path(number).open("ab") as file:
                digests.tofile(file)
        self._pending, self._num_pending, self._is_on_disk = [], 0, True

    def _path(self, number: int) -> Path:
        return Path(self._folder.name) / f"{number:02d}"


def _order_of(digests: Digests) -> npt.NDArray[np.int64]:
    return np.lexsort((digests["low"], digests["high"]))


def _in_buckets(parts: list[Digests]) -> list[Digests]:
    """Return the digests of each bucket."""
    digests = np.concatenate([np.empty(0, _DIGEST), *parts])
    bucket_of = (digests["high"] % _BUCKETS).astype(np.uint8)  # small numbers are sorted in a fifth of the time
    order = np.argsort(bucket_of, kind="stable")
    ends = np.searchsorted(bucket_of[order], np.arange(_BUCKETS + 1))
    return [digests[order[ends[number] : ends[number + 1]]] for number in range(_BUCKETS)]


def digests_of(ids: Ids) -> Digests:
    """Return the digests under which an IdIndex of this process keeps these ids."""
    column = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids, pa.string())
    batches = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return np.concatenate([np.empty(0, _DIGEST), *map(_digests_of_batch, batches)])


def _digests_of_batch(ids: pa.StringArray) -> Digests:
    digests = np.empty(len(ids), _DIGEST)
    if not len(ids):
        return digests
    _, offsets, data = ids.buffers()
    ends = np.frombuffer(offsets, np.int32, len(ids) + 1, 4 * ids.offset).astype(np.int64)
    text = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    digests["high"], digests["low"] = _mixed(text[ends[0] : ends[-1]], ends[:-1] - ends[0], np.diff(ends))
    for index in np.flatnonzero(np.diff(ends) > _MAX_MIXED):
        digest = blake2b(ids[int(index)].as_py().encode(), digest_size=16, key=_KEYS.tobytes()[:32]).digest()
        digests[index] = np.frombuffer(digest, _DIGEST)[0]
    return digests


def _mixed(
    text: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return two hashes of each of the texts that lie in `text`; of those longer than _MAX_MIXED, of their beginning.

    Words of 8 bytes are mixed one after the other with secret keys.
    """
    padded = np.concatenate([text, np.zeros(8, np.uint8)])
    word_at = np.ndarray((len(padded) - 7,), "<u8", padded, strides=(1,))
    first = lengths.astype(np.uint64) * _PRIME
    high, low = first + _KEYS[0, -1], first + _KEYS[1, -1]
    for number in range(-(-min(int(lengths.max()), _MAX_MIXED) // 8)):
        rows = np.flatnonzero(lengths > 8 * number)
        words = word_at[starts[rows] + 8 * number]
        num_outside = np.maximum(8 * (number + 1) - lengths[rows], 0).astype(np.uint64)
        words &= np.uint64(2**64 - 1) >> (np.uint64(8) * num_outside)
        for mixed, keys in ((high, _KEYS[0]), (low, _KEYS[1])):
            mixed[rows] = _mix(mixed[rows], words, keys[number])
    return high, low


def _mix(mixed: npt.NDArray[np.uint64], words: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    mixed = (mixed ^ (words + key)) * (key | np.uint64(1))
    mixed ^= mixed >> np.uint64(29)
    mixed *= _PRIME
    mixed ^= mixed >> np.uint64(32)
    return mixed
