"""Select the rows of a table that are scored, with their references."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileType

from captioner.data import STATUS_OK
from captioner.errors import UsageError
from captioner.files import open_filesystem
from captioner.models.weights import TRAINING_IMAGES
from captioner.scoring.references import References
from captioner.scoring.sample import LowestRanks, rank
from captioner.store.plan import read_planned
from captioner.store.table import RUN_FILE, CaptionsTable


@dataclass(frozen=True)
class CheckSpec:
    """What to check.

    `sample`: how many of the rows with references to score, drawn by `seed`. `terms`: captions with one are flagged.
    `language`: code of that which captions should be in; that of most captions without it.
    `max_rows`: of a larger table only every n-th part is read, about this many rows in all.
    """

    references: References | None = None
    sample: int | Literal["all"] = 500
    seed: int = 0
    terms: tuple[str, ...] = ()
    language: str | None = None
    max_rows: int | None = None


@dataclass(frozen=True)
class EligibleRow:
    """A row that can be scored."""

    index: int  # in its part
    rank: int  # in the seed's order
    image_id: str
    caption: str
    references: list[str]


@dataclass
class RowSelector:
    """Selects the rows to score: with a caption and references, not training images, the first in the seed's order.

    `num_eligible`: rows that can be scored. `num_trained`: rows left out because their images are training images.
    """

    table: CaptionsTable
    spec: CheckSpec
    num_eligible: int = 0
    num_trained: int = 0
    _max_rank: int | None = None

    def __post_init__(self) -> None:
        self._trained = trained_images(self.table)

    def columns(self, names: list[str]) -> list[str]:
        """Return these columns and those that the selection needs."""
        return names if self.spec.references else [*names, "reference_captions"]

    def eligible(self, rows: pa.Table) -> Iterator[EligibleRow]:
        """Yield and count the rows of a part that can be scored."""
        for row, is_trained in self._with_references(rows):
            self.num_trained += is_trained
            self.num_eligible += not is_trained
            if not is_trained:
                yield row

    def set_sample(self, sample: LowestRanks[None]) -> None:
        """Set the sample drawn from all eligible rows. Raises UsageError when the references match no image."""
        references = self.spec.references
        if references and references.unmatched()[0] == len(references.captions):
            raise UsageError(no_match_message(references, self.table))
        self._max_rank = None if self.spec.sample == "all" else sample.max_rank if len(sample) else -1

    def sampled(self, rows: pa.Table) -> list[EligibleRow]:
        """Return the rows of a part that are in the sample."""
        return [
            row
            for row, is_trained in self._with_references(rows)
            if not is_trained and (self._max_rank is None or row.rank <= self._max_rank)
        ]

    def _with_references(self, rows: pa.Table) -> Iterator[tuple[EligibleRow, bool]]:
        """Yield the rows with a caption and references, each with whether its image is a training image."""
        references, seed = self.spec.references, self.spec.seed
        ids, statuses = rows["image_id"].to_pylist(), rows["status"].to_pylist()
        from_source = [None] * len(ids) if references else rows["reference_captions"].to_pylist()
        captions, digests = rows["caption"].to_pylist(), rows["sha256"].to_pylist()
        for index, image_id in enumerate(ids):
            row_references = references.find(image_id) if references else from_source[index]
            if not row_references or statuses[index] != STATUS_OK:
                continue
            row = EligibleRow(index, rank(image_id, seed), image_id, captions[index], row_references)
            yield row, digests[index] in self._trained


def no_match_message(references: References, table: CaptionsTable) -> str:
    """Return the error message for references that match no image, with example names of both."""
    number, examples = references.unmatched()
    example = read_planned(table, next(table.plans()[0].chunks()))["image_id"][0].as_py()
    return (
        f"{references.title}: none of its names ({number:,}, such as {examples[0]!r}) is an image of the "
        f"table, whose ids are like {example!r}; give references with image ids or file names of the table"
    )


def trained_images(table: CaptionsTable) -> frozenset[str]:
    """Return the sha256 of the images in the model's training_images.parquet; empty when there is none.

    Of a LoRA adapter and of the base model that it was merged into, where both have one.
    """
    model = table.directory.read_record(RUN_FILE).get("model") or {}
    name = (table.info.get("model") or {}).get("name")
    directories = {model.get("path") or name, model.get("adapter")}
    return images_seen_by(directories)


def images_seen_by(directories: Iterable[str | None]) -> frozenset[str]:
    """Return the sha256 of the training images of the models and adapters in these directories."""
    return frozenset().union(*(_training_images(directory) for directory in directories if directory))


def _training_images(directory: str) -> list[str]:
    filesystem, path = open_filesystem(f"{directory}/{TRAINING_IMAGES}")
    if filesystem.get_file_info(path).type != FileType.File:
        return []
    column: pa.ChunkedArray = pq.read_table(filesystem.open_input_file(path), columns=["sha256"])["sha256"]
    return list(column.drop_null().to_pylist())
