"""A Hugging Face dataset: what `save_to_disk` wrote, or a hub id."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import pyarrow as pa

from captioner.config import SourceConfig
from captioner.data import Listing, RawImage
from captioner.errors import SourceError
from captioner.files import did_you_mean
from captioner.sources.cells import make_cell, read_cells
from captioner.sources.columns import Columns, choose_columns, table_rows
from captioner.sources.plan_rows import BATCH_ROWS
from captioner.sources.reading import changed_image, have_changed, with_stamp
from captioner.sources.root import Root
from captioner.sources.splits import ALL, DEFAULT

UNIT_ROWS = 64 * BATCH_ROWS
SAVED_NAMES = (b"dataset_info.json", b"state.json", b"dataset_dict.json")


@dataclass(frozen=True, slots=True)
class HuggingFaceSource:
    """`location`: a directory or a hub id. Ids without an id column are `<split>#<row>`. Units are ranges of rows."""

    name: str
    location: str
    split: str
    columns: Columns

    @staticmethod
    def open(config: SourceConfig, location: str) -> HuggingFaceSource:
        split = config.split or _default_split(location)
        schema = _arrow(load_split(location, split))[:0].schema
        return HuggingFaceSource(config.path, location, split, choose_columns(schema, config, config.path))

    def units(self) -> Sequence[str]:
        rows = len(load_split(self.location, self.split))
        return [f"{start}-{min(start + UNIT_ROWS, rows)}" for start in range(0, rows, UNIT_ROWS)]

    def kept_fields(self) -> list[pa.Field]:
        return list(self.columns.kept)

    def list_unit(self, unit: str) -> Iterator[Listing]:
        start, stop = map(int, unit.split("-"))
        dataset = load_split(self.location, self.split)
        stamp = self.stamp(os.fsencode(self.split))
        columns = _arrow(dataset.select_columns(self.columns.described))
        for first in range(start, stop, BATCH_ROWS):
            batch = columns[first : min(first + BATCH_ROWS, stop)]
            if not self.columns.described:  # the batch has rows but no column, and so no length
                batch = pa.table({"": pa.nulls(min(first + BATCH_ROWS, stop) - first)})
            rows = table_rows(batch, self.columns, os.fsencode(self.split), self.split, first)
            yield Listing(with_stamp(rows, stamp), [])

    def read(self, rows: pa.Table) -> list[RawImage]:
        row_numbers = rows.column("row").to_pylist()
        dataset = load_split(self.location, self.split)
        images = _arrow(dataset.select_columns([self.columns.image]))
        existing = [row for row in dict.fromkeys(row_numbers) if row < len(images)]
        values = dict(zip(existing, images[existing].column(0).to_pylist(), strict=True)) if existing else {}
        cells = [make_cell(values.get(row)) for row in row_numbers]
        uris = [f"{self.location}/{self.split}#{row}" for row in row_numbers]
        raws = read_cells(rows, cells, uris, Root(self.location if os.path.isdir(self.location) else "/"))
        return [
            changed_image(raw, f"{self.location} is not the dataset that was planned") if has_changed else raw
            for raw, has_changed in zip(raws, have_changed(rows, self.stamp), strict=True)
        ]

    def stamp(self, split: bytes) -> str | None:
        """Return what identifies a dataset that was saved to disk; None of one from the hub, which has its revision."""
        if not os.path.isdir(self.location):
            return None
        dataset = load_split(self.location, os.fsdecode(split))
        files = [cached["filename"] for cached in dataset.cache_files]
        stamps = " ".join(Root("/").stamp(os.fsencode(file)) or "-" for file in files)
        return blake2b(f"{len(dataset)} {stamps}".encode(), digest_size=16).hexdigest()


def _arrow(dataset: Any) -> Any:
    """Return the dataset with slices that are Arrow tables, in which images are not decoded."""
    return dataset.with_format("arrow")


def load_split(location: str, split: str) -> Any:
    """Open one split, memory-mapped: cheap, and never read completely.

    Raises SourceError where there is no such dataset or split.
    """
    return _load_split(location, split, _stamp(location))


def _default_split(location: str) -> str:
    """Return the only split of a dataset, or else `train`."""
    names = list(_load(location, _stamp(location)))
    return names[0] if len(names) == 1 else DEFAULT


def _stamp(location: str) -> tuple[int, ...]:
    """Return when a saved dataset was last written, for the caches below."""
    saved = [os.path.join(os.fsencode(location), name) for name in SAVED_NAMES]
    return tuple(os.stat(file).st_mtime_ns for file in saved if os.path.exists(file))


@lru_cache(maxsize=4)
def _load_split(location: str, split: str, stamp: tuple[int, ...]) -> Any:
    import datasets

    splits = _load(location, stamp)
    if split == ALL:
        try:
            return datasets.concatenate_datasets(list(splits.values()))
        except ValueError as error:
            names, reason = ", ".join(splits), " ".join(str(error).split())
            raise SourceError(f"{location}: --split all: {names} have columns of other types: {reason}") from None
    if split not in splits:
        raise SourceError(f"{location}: no split {split!r}; choose one of {', '.join(splits)} with --split")
    return splits[split]


@lru_cache(maxsize=4)
def _load(location: str, stamp: tuple[int, ...]) -> dict[str, Any]:
    """Return the datasets of all splits; one that was saved without a split is `train`."""
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_from_disk(location) if os.path.isdir(location) else datasets.load_dataset(location)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        missing = "" if os.path.isdir(location) else "no such file or directory, and "
        reason = " ".join(str(error).split()) + (did_you_mean(location) if missing else "")
        raise SourceError(f"{location}: {missing}cannot be loaded as a Hugging Face dataset: {reason}") from None
    return dataset if isinstance(dataset, dict) else {str(dataset.split or DEFAULT): dataset}
