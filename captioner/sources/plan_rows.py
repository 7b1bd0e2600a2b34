"""Build the batches of a listing, and wrap sources: filters."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from captioner.data import PLAN_SCHEMA, Listing, RawImage, Source, names_of
from captioner.sources.root import readable

BATCH_ROWS = 4096


def plan_table(
    image_id: Sequence[str] | pa.Array,
    file: Sequence[bytes] | pa.Array,
    *,
    offset: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
    row: Sequence[int] | pa.Array | None = None,
    references: Sequence[list[str] | None] | pa.Array | None = None,
    kept: pa.Table | None = None,
) -> pa.Table:
    """Return rows of PLAN_SCHEMA, then the kept columns. Columns that are not given, and the page, are null."""
    values_of = (image_id, file, offset, size, row, references, None)
    columns = [
        pa.nulls(len(image_id), field.type) if values is None else _as_array(values, field.type)
        for field, values in zip(PLAN_SCHEMA, values_of, strict=True)
    ]
    table = pa.Table.from_arrays(columns, schema=PLAN_SCHEMA)
    if kept is not None:
        for field, values in zip(kept.schema, kept.columns, strict=True):
            table = table.append_column(field, values)
    return table


def names_as_ids(names: Sequence[bytes]) -> pa.Array:
    """Return readable names; fast where all of them are UTF-8."""
    try:
        return pa.array(names, pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([readable(name) for name in names], pa.string())


def _as_array(values: Sequence[object] | pa.Array, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return values.cast(kind) if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, kind)


@dataclass(frozen=True, slots=True)
class WrappedSource:
    """Base of sources that change how another source is listed or read."""

    source: Source

    @property
    def name(self) -> str:
        return self.source.name

    def units(self) -> Sequence[str]:
        return self.source.units()

    def kept_fields(self) -> list[pa.Field]:
        return self.source.kept_fields()


@dataclass(frozen=True, slots=True)
class FilteredSource(WrappedSource):
    """A source with only the images whose ids match `include` and do not match `exclude`.

    Both are shell globs over the whole id, in which `*` also matches slashes.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def list_unit(self, unit: str) -> Iterator[Listing]:
        for listing in self.source.list_unit(unit):
            ids = listing.rows.column("image_id").to_pylist()
            yield replace(listing, rows=listing.rows.filter(pa.array(self._is_selected(ids), pa.bool_())))

    def read(self, rows: pa.Table) -> list[RawImage]:
        return self.source.read(rows)

    def _is_selected(self, ids: list[str]) -> list[bool]:
        include, exclude = _any_glob(self.include or ("*",)), _any_glob(self.exclude)
        return [
            any(map(include.match, names_of(image_id)))
            and not (self.exclude and any(map(exclude.match, names_of(image_id))))
            for image_id in ids
        ]


def _any_glob(globs: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(glob) for glob in globs))
