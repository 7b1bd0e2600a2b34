"""The images to review and their order: about 80 bytes of temporary disk for each image, and one byte of memory."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime
from typing import IO, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.publishing.alt_text.texts import read_alt_texts
from captioner.publishing.review.standing_flags import flagged_rows
from captioner.scoring.judgements import lifts_of
from captioner.scoring.sample import rank
from captioner.store.journal import Review
from captioner.store.replan import RowIndices
from captioner.store.table import CaptionsTable

QueueKind = Literal["flagged", "random", "all"]
MAX_GROUP = 12  # images decided together: as many as a person can look at

_SCAN_SIZE = 65_536  # images
_SORTED_AT_ONCE = 1 << 22  # images, 100 MB of memory
_COLUMNS = ["image_id", "sha256", "logprob_mean", "flags", "created_at"]
_LOCATION = np.dtype([("part", "<i4"), ("row", "<i4")])
_FIELDS = np.dtype(
    [
        ("part", "<i4"),  # part of the table
        ("row", "<i4"),  # row in the part
        ("id", "<u8"),  # hash of the image id: identifies the image and gives the random order
        ("text", "<u8"),  # hash of the alt text
        ("created", "<i8"),  # creation time of the caption, microseconds
        ("sha256", "V32"),  # of the file
        ("flagged", "?"),
        ("lift", "<f4"),  # NaN where `captioner judge` has none
        ("weakness", "<u8"),  # small for images that the queue "flagged" shows first, see `_weakness`
    ]
)


class Queue:
    """All captioned images of a table; `index` is an image's position among them, in table order.

    `kind`: "flagged" puts flagged images first, then those with the lowest lift where they are judged (see
    `captioner.scoring.judgements`), then those with the lowest log-probability; "random" is the same random
    order for every reviewer and every start; "all" is the table's order. `reviews`: the decisions so far, by image id.
    `selected`: the rows of each part that are reviewed; None for all. Raises OutputError as `read_alt_texts` does.
    """

    def __init__(
        self,
        table: CaptionsTable,
        kind: QueueKind,
        reviews: dict[str, Review],
        selected: RowIndices | None = None,
    ) -> None:
        self.kind, self.selected = kind, selected
        self.seed = int(table.table_id, 16)
        self.decided: dict[int, Review] = {}  # the decision about each decided image, by index
        self.for_expert: set[int] = set()
        failed = _DiskColumn(_LOCATION)
        columns = {name: _DiskColumn(_FIELDS[name]) for name in _FIELDS.names or ()}
        for part, rows, alt_texts in read_alt_texts(table, _COLUMNS):
            kept = rows_to_review(part, alt_texts, selected)
            keys, ids = _keys(table, part, kept, rows, alt_texts, self.seed)
            failed.append(_failed(part, alt_texts))
            first = len(columns["id"])
            for name, column in columns.items():
                column.append(keys[name])
            for row, image_id in enumerate(ids) if reviews else ():
                review = reviews.get(image_id)
                if review and review.applies_to(_timestamp(keys["created"][row]), keys["sha256"][row].tobytes().hex()):
                    self.decided[first + row] = review
        self._keys = {name: column.array() for name, column in columns.items()}
        self._failed = failed.array()
        self._open = np.ones(len(self._keys["id"]), bool)
        self._open[list(self.decided)] = False
        self.for_expert.update(index for index, review in self.decided.items() if review.decision == "expert")
        self._by_id = _sorted_indices(self._keys["id"])
        self._order = self._ordered()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def undecided(self) -> npt.NDArray[np.bool_]:
        """Whether each image has no decision yet; bool [N]."""
        return self._open

    @property
    def flagged(self) -> npt.NDArray[np.bool_]:
        """Whether each alt text has a flag; bool [N]."""
        return cast(npt.NDArray[np.bool_], self._keys["flagged"])

    def location(self, index: int) -> tuple[int, int]:
        """Return the part of the table that holds an image, and its row in that part."""
        return int(self._keys["part"][index]), int(self._keys["row"][index])

    def lift(self, index: int) -> float | None:
        """Return how much better a caption fits its image than others by `captioner judge`; None where not judged."""
        lift = float(self._keys["lift"][index])
        return None if math.isnan(lift) else lift

    @property
    def num_failed(self) -> int:
        """The number of images without a caption, which are not among those to review."""
        return len(self._failed)

    def failed_location(self, number: int) -> tuple[int, int]:
        """Return the part of the table that holds an image without a caption, and its row in that part.

        `number`: of the image among those without a caption, from 0 in table order.
        """
        return int(self._failed["part"][number]), int(self._failed["row"][number])

    def index_of(self, image_id: str) -> int | None:
        """Return the index of an image; `None` when it has no caption in this table."""
        key = np.uint64(rank(image_id, self.seed))
        rank_index = int(np.searchsorted(self._keys["id"], key, sorter=self._by_id))
        index = int(self._by_id[rank_index]) if rank_index < len(self) else -1
        return index if index >= 0 and self._keys["id"][index] == key else None

    def set_decision(self, index: int, review: Review | None) -> None:
        """Set the decision about an image; `None` opens it again. One about an earlier caption or file is ignored."""
        created, sha256 = _timestamp(self._keys["created"][index]), self._keys["sha256"][index].tobytes().hex()
        if review is not None and review.applies_to(created, sha256):
            self.decided[index] = review
        else:
            self.decided.pop(index, None)
        self._open[index] = index not in self.decided
        if index in self.decided and self.decided[index].decision == "expert":
            self.for_expert.add(index)
        else:
            self.for_expert.discard(index)

    def decision(self, index: int) -> Review | None:
        """Return the decision about an image, if any."""
        return self.decided.get(index)

    def next(self, waiting: Collection[int], excluded: Collection[int]) -> int | None:
        """Return the next open image that is not excluded, then those in `waiting`; `None` at the end."""
        for start in range(0, len(self), _SCAN_SIZE):
            stop = min(start + _SCAN_SIZE, len(self))
            indices = np.arange(start, stop) if self._order is None else self._order[start:stop]
            for index in indices[self._open[indices]].tolist():
                if index not in excluded:
                    return int(index)
        remaining = [index for index in waiting if index not in excluded]
        return min(remaining, key=lambda index: int(self._keys["id"][index]), default=None)

    def same_text(self, index: int, excluded: Collection[int]) -> tuple[list[int], int]:
        """Return the other open images with the same alt text, at most MAX_GROUP - 1, and how many there are."""
        matches = self._open & (self._keys["text"] == self._keys["text"][index])
        matches[[index, *excluded]] = False
        indices = np.flatnonzero(matches)
        return indices[: MAX_GROUP - 1].tolist(), len(indices)

    def num_open(self) -> tuple[int, int]:
        """Return the number of open images, and of the flagged ones among them."""
        return int(self._open.sum()), int((self._open & self._keys["flagged"]).sum())

    def random_sample(self) -> list[Review]:
        """Return the decisions about all images up to the last one that was decided in the random queue.

        They are a simple random sample of the table, whatever queue each was decided in: images that were reviewed
        earlier in another queue belong to the sample when the random order has passed them.
        """
        reached = [self._keys["id"][index] for index, review in self.decided.items() if review.queue == "random"]
        if not reached:
            return []
        return [review for index, review in self.decided.items() if self._keys["id"][index] <= max(reached)]

    def _ordered(self) -> npt.NDArray[np.int64] | None:
        """Return the indices in the order of the queue; None where that is the table's."""
        if self.kind == "all":
            return None
        return self._by_id if self.kind == "random" else _sorted_indices(self._keys["weakness"], self._keys["id"])


class _DiskColumn:
    """A column of numbers in a temporary file, of which the system holds in memory what is used."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="captioner-review-")  # noqa: SIM115

    def __len__(self) -> int:
        return self._file.tell() // self._dtype.itemsize

    def append(self, values: npt.NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).data)

    def array(self) -> npt.NDArray[Any]:
        """Return all values; none can be appended from then on."""
        if not len(self):
            return np.empty(0, self._dtype)
        self._file.flush()
        return np.memmap(self._file, self._dtype, "r")


def _sorted_indices(keys: npt.NDArray[np.uint64], ties: npt.NDArray[np.uint64] | None = None) -> npt.NDArray[np.int64]:
    """Return the indices that sort keys, and equal ones by `ties`; int64 [N], in a temporary file.

    Sorts about _SORTED_AT_ONCE keys at the same time, which lie between two that a sample shows.
    """
    column = _DiskColumn(np.dtype(np.int64))
    sample = np.sort(keys[:: max(1, len(keys) // 65_536)])
    limits = np.unique(sample[:: max(1, len(sample) * _SORTED_AT_ONCE // max(1, len(keys)))])
    for number in range(len(limits)):
        low = limits[number] if number else np.uint64(0)
        high = limits[number + 1] if number + 1 < len(limits) else None
        indices = np.concatenate(list(_indices_between(keys, low, high)))
        by_key = (keys[indices],) if ties is None else (ties[indices], keys[indices])
        column.append(indices[np.lexsort(by_key)])
    return column.array()


def _indices_between(
    keys: npt.NDArray[np.uint64], low: np.uint64, high: np.uint64 | None
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the indices of keys from `low` to below `high`, in the order of the keys."""
    for first in range(0, len(keys), _SORTED_AT_ONCE):
        part = keys[first : first + _SORTED_AT_ONCE]
        yield first + np.flatnonzero(part >= low if high is None else (part >= low) & (part < high))


def rows_to_review(part: int, alt_texts: pa.Table, selected: RowIndices | None) -> npt.NDArray[np.int64]:
    """Return the rows of a part that have an alt text, of those that are `selected`; None for all."""
    with_text = np.flatnonzero(pc.is_valid(alt_texts["alt_text"]).to_numpy())
    return with_text if selected is None else np.intersect1d(with_text, selected.get(part, with_text[:0]))


def _keys(
    table: CaptionsTable, part: int, kept: npt.NDArray[np.int64], rows: pa.Table, alt_texts: pa.Table, seed: int
) -> tuple[npt.NDArray[np.void], list[str]]:
    """Return the keys of a part's images to review (dtype _FIELDS), and their ids."""
    rows, alt_texts = rows.take(kept), alt_texts.take(kept)
    ids = rows["image_id"].to_pylist()
    keys = np.zeros(len(kept), _FIELDS)
    keys["part"], keys["row"] = part, kept
    keys["id"] = _ranks(ids, seed)
    keys["text"] = _ranks(alt_texts["alt_text"].to_pylist(), seed)
    keys["created"] = rows["created_at"].cast(pa.int64()).to_numpy()
    digests = pc.fill_null(rows["sha256"], "0" * 64).to_pylist()
    keys["sha256"] = np.frombuffer(bytes.fromhex("".join(digests)), "V32")
    keys["flagged"] = flagged_rows(rows["flags"], alt_texts)
    logprobs = pc.fill_null(rows["logprob_mean"], float("nan")).to_numpy()
    keys["lift"] = lifts_of(table, part, rows)
    keys["weakness"] = _weakness(keys["flagged"], keys["lift"], logprobs)
    return keys, ids


def _failed(part: int, alt_texts: pa.Table) -> npt.NDArray[np.void]:
    """Return where the images of a part are that have no caption (dtype _LOCATION)."""
    rows = np.flatnonzero(pc.is_null(alt_texts["alt_text"]).to_numpy())
    locations = np.zeros(len(rows), _LOCATION)
    locations["part"], locations["row"] = part, rows
    return locations


def _weakness(
    flagged: npt.NDArray[np.bool_], lifts: npt.NDArray[np.floating[Any]], logprobs: npt.NDArray[np.floating[Any]]
) -> npt.NDArray[np.uint64]:
    """Return numbers that are sorted as the queue "flagged" is: uint64 [N].

    One bit for the flag, 31 for the lift (last where it was not judged), 32 for the log-probability (first where the
    model gave none).
    """
    by_lift = _as_sortable(np.where(np.isnan(lifts), np.inf, lifts)) >> np.uint64(1)
    by_logprob = _as_sortable(np.where(np.isnan(logprobs), -np.inf, logprobs))
    return (~flagged).astype(np.uint64) << np.uint64(63) | by_lift << np.uint64(32) | by_logprob


def _as_sortable(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint64]:
    """Return integers below 2**32 in the order of the float32 values."""
    bits = (values.astype(np.float32) + np.float32(0)).view(np.uint32)  # which makes -0.0 to 0.0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)


def _ranks(texts: Iterable[str], seed: int) -> npt.NDArray[np.uint64]:
    return np.fromiter((rank(text, seed) for text in texts), np.uint64)


def _timestamp(microseconds: int) -> datetime:
    return datetime.fromtimestamp(int(microseconds) / 1e6, UTC)
