"""Which rows of a table are scored, and against what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileType

from captioner.data import STATUS_OK
from captioner.errors import UsageError
from captioner.files import open_filesystem
from captioner.scoring.references import References
from captioner.scoring.sample import Draw, rank
from captioner.store.plan import read_planned
from captioner.store.table import CaptionsTable


@dataclass(frozen=True)
class Question:
    """What to check: how many rows to score (of those that have references), drawn by `seed`; `terms` are flagged.

    `max_rows`: of a table with more rows only every n-th part is looked at, about so many rows in all.
    """

    references: References | None = None
    sample: int | Literal["all"] = 500
    seed: int = 0
    terms: tuple[str, ...] = ()
    max_rows: int | None = None


@dataclass(frozen=True)
class Eligible:
    """A row that can be scored."""

    index: int  # in its part
    place: int
    image_id: str
    caption: str
    references: list[str]


@dataclass
class Chooser:
    """Which rows are scored: those with a caption and references, of pictures the model was not trained on; of them
    the first of the seed's order."""

    table: CaptionsTable
    question: Question
    num_eligible: int = 0
    num_trained: int = 0
    _num_trained: int = 0
    _highest: int | None = None

    def __post_init__(self) -> None:
        self._trained = trained_pictures(self.table)

    def columns(self, wanted: list[str]) -> list[str]:
        """What to read of the captions table."""
        return wanted if self.question.references else [*wanted, "reference_captions"]

    def eligible(self, rows: pa.Table) -> Iterator[Eligible]:
        """The rows of a part that can be scored; counts them."""
        for row in self._with_references(rows):
            self.num_eligible += 1
            yield row

    def settle(self, drawn: Draw[None]) -> None:
        """Take what was drawn from all eligible rows. Raises UsageError where references fit nothing."""
        self.num_trained = self._num_trained
        given = self.question.references
        if given and given.unmatched()[0] == len(given.captions):
            raise UsageError(nothing_matches(given, self.table))
        self._highest = None if self.question.sample == "all" else drawn.highest if len(drawn) else -1

    def drawn(self, rows: pa.Table) -> list[Eligible]:
        """The rows of a part that are scored."""
        return [row for row in self._with_references(rows) if self._highest is None or row.place <= self._highest]

    def _with_references(self, rows: pa.Table) -> Iterator[Eligible]:
        given, seed = self.question.references, self.question.seed
        ids, statuses = rows["image_id"].to_pylist(), rows["status"].to_pylist()
        own = [None] * len(ids) if given else rows["reference_captions"].to_pylist()
        captions, digests = rows["caption"].to_pylist(), rows["sha256"].to_pylist()
        for index, image_id in enumerate(ids):
            known = given.find(image_id) if given else own[index]
            if not known or statuses[index] != STATUS_OK:
                continue
            if digests[index] in self._trained:
                self._num_trained += 1
                continue
            yield Eligible(index, rank(image_id, seed), image_id, captions[index], known)


def nothing_matches(references: References, table: CaptionsTable) -> str:
    """The message for references of other pictures: names of both sides."""
    number, examples = references.unmatched()
    example = read_planned(table, next(table.plans()[0].chunks()))["image_id"][0].as_py()
    return (
        f"--references {references.name}: none of its {number:,} names, such as {examples[0]!r}, is a picture of the "
        f"table, whose ids are like {example!r}"
    )


TRAINING_IMAGES = "training_images.parquet"


def trained_pictures(table: CaptionsTable) -> frozenset[str]:
    """sha256 of the pictures in the model directory's training_images.parquet; empty where there is none."""
    name = (table.info.get("model") or {}).get("name", "")
    if table.directory.exists("run.json"):
        name = (table.directory.read_json("run.json").get("model") or {}).get("path") or name
    if not name:
        return frozenset()
    filesystem, path = open_filesystem(f"{name}/{TRAINING_IMAGES}")
    if filesystem.get_file_info(path).type != FileType.File:
        return frozenset()
    column: pa.ChunkedArray = pq.read_table(filesystem.open_input_file(path), columns=["sha256"])["sha256"]
    return frozenset(column.drop_null().to_pylist())
