"""Which pictures are reviewed and in what order: a few numbers for each picture, whatever the size of the table."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.publishing.alt_text.schemas import Review
from captioner.publishing.alt_text.texts import holds, read_alt_texts
from captioner.publishing.review.standing_flags import flagged_rows
from captioner.scoring.sample import rank
from captioner.store.table import CaptionsTable

QueueKind = Literal["flagged", "random", "all"]
MAX_GROUP = 12  # pictures decided as one: as many as a person can look at

_SCANNED = 65_536
_COLUMNS = ["image_id", "logprob_mean", "flags", "created_at"]
_FIELDS = np.dtype(
    [
        ("part", "<i4"),  # of the table
        ("row", "<i4"),  # in the part
        ("id", "<u8"),  # rank of the image id in the random order: its key here as well
        ("text", "<u8"),  # hash of the alt text
        ("created", "<i8"),  # the caption's time, microseconds
        ("flagged", "?"),
        ("logprob", "<f4"),  # -inf where the model gave none
    ]
)


class Queue:
    """All captioned pictures of a table; `place` is a picture's number among them, in the table's order.

    Holds about 50 bytes a picture. `kind`: "flagged" puts flagged pictures first, then the least certain; "random" is
    the same random order for every reviewer and every start; "all" is the table's order. `reviews`: what was decided
    so far, by image id. Raises OutputError as `read_alt_texts` does.
    """

    def __init__(self, table: CaptionsTable, kind: QueueKind, reviews: dict[str, Review]) -> None:
        self.kind = kind
        self.seed = int(table.table_id, 16)
        self._decided: dict[int, Review] = {}
        self.for_expert: set[int] = set()
        parts: list[npt.NDArray[np.void]] = []
        for part, rows, made in read_alt_texts(table, _COLUMNS):
            keys, ids = _keys(part, rows, made, self.seed)
            first = sum(map(len, parts))
            parts.append(keys)
            for at, image_id in enumerate(ids) if reviews else ():
                review = reviews.get(image_id)
                if review and holds(review, _moment(keys["created"][at])):
                    self._decided[first + at] = review
        self._keys = np.concatenate(parts) if parts else np.empty(0, _FIELDS)
        self._open = np.ones(len(self._keys), bool)
        self._open[list(self._decided)] = False
        self.for_expert.update(place for place, review in self._decided.items() if review.decision == "expert")
        self._by_id = np.argsort(self._keys["id"], kind="stable")
        self._order = self._ordered()

    def __len__(self) -> int:
        return len(self._keys)

    def where(self, place: int) -> tuple[int, int]:
        """Part of the table, and row in it."""
        return int(self._keys["part"][place]), int(self._keys["row"][place])

    def place_of(self, image_id: str) -> int | None:
        """`None` for a picture that is not, or no longer, captioned here."""
        key = np.uint64(rank(image_id, self.seed))
        at = int(np.searchsorted(self._keys["id"], key, sorter=self._by_id))
        place = int(self._by_id[at]) if at < len(self) else -1
        return place if place >= 0 and self._keys["id"][place] == key else None

    def decide(self, place: int, review: Review | None) -> None:
        """What holds for a picture from now on; `None`: nothing any more."""
        if review is not None and holds(review, _moment(self._keys["created"][place])):
            self._decided[place] = review
        else:
            self._decided.pop(place, None)
        self._open[place] = place not in self._decided
        if place in self._decided and self._decided[place].decision == "expert":
            self.for_expert.add(place)
        else:
            self.for_expert.discard(place)

    def decision(self, place: int) -> Review | None:
        return self._decided.get(place)

    def next(self, waiting: Collection[int], left_out: Collection[int]) -> int | None:
        """The next open picture that is not left out; then those `waiting` (for an expert); `None` at the end."""
        for start in range(0, len(self), _SCANNED):
            some = self._order[start : start + _SCANNED]
            for place in some[self._open[some]].tolist():
                if place not in left_out:
                    return int(place)
        rest = [place for place in waiting if place not in left_out]
        return min(rest, key=lambda place: int(self._keys["id"][place]), default=None)

    def same_text(self, place: int, left_out: Collection[int]) -> tuple[list[int], int]:
        """Other open pictures with the same alt text: as many as make a group, and how many there are."""
        free = self._open & (self._keys["text"] == self._keys["text"][place])
        free[[place, *left_out]] = False
        found = np.flatnonzero(free)
        return found[: MAX_GROUP - 1].tolist(), len(found)

    def num_open(self) -> tuple[int, int]:
        """Open pictures, and those of them that are flagged."""
        return int(self._open.sum()), int((self._open & self._keys["flagged"]).sum())

    def random_sample(self) -> list[Review]:
        """The decisions about the first pictures of the random order, as far as the random queue has come.

        That is a simple random sample of the table's pictures, whatever queue each was decided in: those that were
        flagged and decided before are part of it, where their turn was.
        """
        reached = [self._keys["id"][place] for place, review in self._decided.items() if review.queue == "random"]
        if not reached:
            return []
        return [review for place, review in self._decided.items() if self._keys["id"][place] <= max(reached)]

    def _ordered(self) -> npt.NDArray[np.int64]:
        if self.kind == "all":
            return np.arange(len(self))
        if self.kind == "random":
            return self._by_id
        return np.lexsort((self._keys["id"], self._keys["logprob"], ~self._keys["flagged"]))


def _keys(part: int, rows: pa.Table, made: pa.Table, seed: int) -> tuple[npt.NDArray[np.void], list[str]]:
    """The keys of a part's captioned pictures, and their ids."""
    kept = np.flatnonzero(pc.is_valid(made["alt_text"]).to_numpy())
    rows, made = rows.take(kept), made.take(kept)
    ids = rows["image_id"].to_pylist()
    keys = np.zeros(len(kept), _FIELDS)
    keys["part"], keys["row"] = part, kept
    keys["id"] = _ranks(ids, seed)
    keys["text"] = _ranks(made["alt_text"].to_pylist(), seed)
    keys["created"] = rows["created_at"].cast(pa.int64()).to_numpy()
    keys["flagged"] = flagged_rows(rows["flags"], made)
    logprob = pc.fill_null(rows["logprob_mean"], float("nan")).to_numpy()
    keys["logprob"] = np.where(np.isnan(logprob), -np.inf, logprob)
    return keys, ids


def _ranks(texts: Iterable[str], seed: int) -> npt.NDArray[np.uint64]:
    return np.fromiter((rank(text, seed) for text in texts), np.uint64)


def _moment(microseconds: int) -> datetime:
    return datetime.fromtimestamp(int(microseconds) / 1e6, UTC)
