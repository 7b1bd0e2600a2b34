"""A set of image ids in bounded memory, which also finds the ids that occur twice."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

_BUCKETS = 64
_DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])
_BUFFERED = 65_536  # ids in memory before they are written to files

Digests = npt.NDArray[np.void]


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

    def add(self, ids: Sequence[str]) -> None:
        """Add ids to the set."""
        self._sorted = None
        self._pending.append(digests_of(ids))
        self._num_pending += len(ids)
        if self._num_pending >= self._buffered:
            self._flush()

    def duplicates(self) -> Digests:
        """Return the digests that were added more than once, each once."""
        repeated = [bucket[1:][bucket[1:] == bucket[:-1]] for bucket in self._buckets() if len(bucket) > 1]
        return np.unique(np.concatenate(repeated)) if repeated else np.empty(0, _DIGEST)

    def contains(self, ids: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return for each id whether it was added; bool [N]."""
        if self._sorted is None:
            self._sorted = [self._map_sorted(number, bucket) for number, bucket in enumerate(self._buckets())]
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
            bucket = np.fromfile(self._path(number), _DIGEST) if self._is_on_disk else pending[number]
            yield bucket[np.lexsort((bucket["low"], bucket["high"]))]

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


def _in_buckets(parts: list[Digests]) -> list[Digests]:
    """Return the digests of each bucket."""
    digests = np.concatenate([np.empty(0, _DIGEST), *parts])
    bucket_of = digests["high"] % _BUCKETS
    order = np.argsort(bucket_of, kind="stable")
    ends = np.searchsorted(bucket_of[order], np.arange(_BUCKETS + 1))
    return [digests[order[ends[number] : ends[number + 1]]] for number in range(_BUCKETS)]


def digests_of(ids: Sequence[str]) -> Digests:
    """Return the digests under which an IdIndex keeps these ids."""
    joined = b"".join(blake2b(image_id.encode(), digest_size=16).digest() for image_id in ids)
    return np.frombuffer(joined, _DIGEST)
