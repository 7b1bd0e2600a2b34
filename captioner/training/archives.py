"""DATA as archives of pictures with captions: opened, listed and read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from captioner.config import SourceConfig, TrainDataConfig
from captioner.data import PLAN_SCHEMA, Listing, RawImage, Source
from captioner.errors import SourceError, UsageError
from captioner.sources import open_source
from captioner.sources.reading import read_images
from captioner.store.ids import IdIndex, digests_of
from captioner.store.parallel_listing import list_units
from captioner.store.table import open_table, plan_part_name, table_exists

ROWS_PER_TABLE = 64

# What the run keeps of each pair: enough to read the picture again, its captions, and which DATA it is of.
PAIRS_SCHEMA = pa.schema(
    [
        *PLAN_SCHEMA,
        pa.field("data", pa.int8(), nullable=False),  # index into `Archives`
        pa.field("sha256", pa.string()),
        pa.field("num_truncated", pa.int32(), nullable=False),  # captions longer than the model allows
        pa.field("error_code", pa.string(), nullable=False),  # "" = usable
        pa.field("error_message", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Archives:
    """The opened DATA of a run: train, then eval and test where they are archives of their own. Picklable."""

    sources: tuple[Source, ...]
    max_pixels: int

    def read(self, rows: pa.Table) -> list[RawImage]:
        """The pictures of PAIRS_SCHEMA rows, in order."""
        raws: list[RawImage | None] = [None] * len(rows)
        plan = rows.select(PLAN_SCHEMA.names)
        places_of: dict[int, list[int]] = {}
        for place, number in enumerate(rows["data"].to_pylist()):
            places_of.setdefault(number, []).append(place)
        for number, places in places_of.items():
            for place, raw in zip(places, self.sources[number].read(plan.take(places)), strict=True):
                raws[place] = raw
        return [raw for raw in raws if raw is not None]


def open_archives(config: TrainDataConfig) -> Archives:
    """Open DATA and, where they are given, --eval-data and --test-data. Raises SourceError or UsageError."""
    if not config.path:
        raise UsageError("no DATA given; name a folder with metadata.jsonl, tars, Parquet, a dataset or captions table")
    paths = [config.path, *(path for path in (config.eval_data, config.test_data) if path)]
    return Archives(tuple(_open(path, config) for path in paths), config.max_pixels)


def _open(path: str, config: TrainDataConfig) -> Source:
    if table_exists(path):
        table = open_table(path)
        return TableOfCaptions(path, open_source(SourceConfig.model_validate(table.info["source"])))
    wanted = {"split", "image_column", "id_column", "reference_column"}
    return open_source(SourceConfig(path=path, **config.model_dump(include=wanted)))


@dataclass(frozen=True, slots=True)
class TableOfCaptions:
    """A captions table as a source of pairs: its pictures, read where its own source has them, and their references."""

    name: str
    source: Source

    def units(self) -> list[str]:
        table = open_table(self.name)
        founding = [plan for plan in table.plans() if plan.adds_parts]
        return [plan_part_name(plan.generation, part) for plan in founding for part in sorted(plan.parts)]

    def kept_fields(self) -> list[pa.Field]:
        return []

    def list_unit(self, unit: str) -> Iterator[Listing]:
        rows = open_table(self.name).directory.read_table(unit)
        for field in PLAN_SCHEMA:
            if field.name not in rows.schema.names:  # a table of an earlier version
                rows = rows.append_column(field, pa.nulls(len(rows), field.type))
        yield Listing(rows.select(PLAN_SCHEMA.names), [])

    def read(self, rows: pa.Table) -> list[RawImage]:
        return read_images(self.source, rows)


def list_pairs(archives: Archives, limit: int | None) -> Iterator[pa.Table]:
    """Everything the archives list, ROWS_PER_TABLE rows at a time. `limit` is for DATA itself.

    Raises SourceError for an id that occurs twice in one archive.
    """
    for number, source in enumerate(archives.sources):
        left = limit if number == 0 else None
        with IdIndex() as seen:
            for rows in _tables_of(source):
                rows = rows if left is None else rows.slice(0, left)
                left = None if left is None else left - len(rows)
                seen.add(rows["image_id"].to_pylist())
                yield rows.append_column(PAIRS_SCHEMA.field("data"), pa.array([number] * len(rows), pa.int8()))
                if left == 0:
                    break
            _refuse_duplicates(source, seen)


def _tables_of(source: Source) -> Iterator[pa.Table]:
    for _, listing in list_units(source, source.units()):
        rows = listing.rows.select(PLAN_SCHEMA.names)
        for first in range(0, len(rows), ROWS_PER_TABLE):
            yield rows.slice(first, ROWS_PER_TABLE).combine_chunks()


def _refuse_duplicates(source: Source, seen: IdIndex) -> None:
    doubled = seen.duplicates()
    if not len(doubled):
        return
    for rows in _tables_of(source):
        ids = rows["image_id"].to_pylist()
        for image_id, digest in zip(ids, digests_of(ids), strict=True):
            if digest in doubled:
                raise SourceError(f"{source.name}: the id {image_id!r} occurs more than once; make ids unique")
