"""Open DATA as sources of images with captions, list their pairs and read their images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa

from captioner.config import SourceConfig, TrainConfig, TrainDataConfig, settings_of
from captioner.data import PLAN_SCHEMA, ImageBatch, Listing, PixelSpec, RawImage, Source
from captioner.errors import UsageError
from captioner.imaging.sandbox.decoder import GuardedDecoder
from captioner.sources import open_source, reopen_source
from captioner.sources.reading import read_images, rows_may_all_fail
from captioner.store.creating import table_exists
from captioner.store.parallel_listing import list_units
from captioner.store.table import open_table, plan_part_name

ROWS_PER_TABLE = 64
SOURCE_FLAGS = ("split", "image_column", "id_column", "reference_column")

# What a run stores of each pair: where its image is read from, its captions, and what examining it showed.
PAIRS_SCHEMA = pa.schema(
    [
        *PLAN_SCHEMA,
        pa.field("data", pa.int8(), nullable=False),  # index into `PairSources.sources`
        pa.field("sha256", pa.string()),
        pa.field("num_truncated", pa.int32(), nullable=False),  # captions longer than the model allows
        pa.field("error_code", pa.string(), nullable=False),  # "" = usable
        pa.field("error_message", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class PairSources:
    """The sources of a run: DATA, then --eval-data and --test-data where they are given. Picklable."""

    sources: tuple[Source, ...]
    max_pixels: int

    def read(self, rows: pa.Table) -> list[RawImage]:
        """Return the images of PAIRS_SCHEMA rows, in order."""
        images: list[RawImage | None] = [None] * len(rows)
        plan = rows.select(PLAN_SCHEMA.names)
        indices_by_source: dict[int, list[int]] = {}
        for index, number in enumerate(rows["data"].to_pylist()):
            indices_by_source.setdefault(number, []).append(index)
        for number, indices in indices_by_source.items():
            with rows_may_all_fail():  # --max-failed limits the failures of all rows together
                raws = read_images(self.sources[number], plan.take(indices))
            for index, image in zip(indices, raws, strict=True):
                images[index] = image
        return [image for image in images if image is not None]

    def decode(self, rows: pa.Table, spec: PixelSpec) -> ImageBatch:
        """Return the decoded images of PAIRS_SCHEMA rows, in order.

        A child process decodes them, so an image that crashes or hangs its decoder is a failed row.
        """
        from captioner.imaging import decode_images

        images = self.read(rows)
        with _decoder(spec, self.max_pixels) as decoder:
            return decode_images(images, spec, self.max_pixels, decoder)


# Decoders that no thread uses, by their settings. They are kept, because a child takes a second to start.
_free_decoders: dict[tuple[PixelSpec, int], list[GuardedDecoder]] = {}


@contextmanager
def _decoder(spec: PixelSpec, max_pixels: int) -> Iterator[GuardedDecoder]:
    """Yield a decoder that no other thread uses meanwhile. Those with other settings are closed."""
    key = spec, max_pixels
    if key not in _free_decoders:
        _free_decoders.clear()
    free = _free_decoders.setdefault(key, [])
    try:
        decoder = free.pop()
    except IndexError:
        decoder = GuardedDecoder(spec, max_pixels, SourceConfig().decode_timeout)
    try:
        yield decoder
    finally:
        free.append(decoder)


def open_pair_sources(config: TrainDataConfig) -> PairSources:
    """Open DATA and, where they are given, --eval-data and --test-data. Raises SourceError or UsageError."""
    if not config.path:
        raise UsageError("no DATA given; name a folder with metadata.jsonl, tars, Parquet, a dataset or captions table")
    others = [path for path in (config.eval_data, config.test_data) if path]
    sources = [_open(config.path, config), *(_open(path, config, refuse_flags=False) for path in others)]
    return PairSources(tuple(sources), config.max_pixels)


def _open(path: str, config: TrainDataConfig, refuse_flags: bool = True) -> Source:
    """Open a source of pairs. Flags that only other sources of the run can take are ignored, or refused."""
    settings = {name: getattr(config, name) for name in SOURCE_FLAGS}
    if not table_exists(path):
        return open_source(SourceConfig(path=path, **settings), refuse_flags)
    for setting in settings_of(TrainConfig) if refuse_flags else ():
        if settings.get(setting.field) is not None:
            raise UsageError(f"{setting.flag}: {path} is a captions table, which has its own source and references")
    return CaptionsTableSource(path, reopen_source(open_table(path).info["source"]))


@dataclass(frozen=True, slots=True)
class CaptionsTableSource:
    """A captions table as a source of pairs: its references, with the images of the source it was made from."""

    name: str
    source: Source

    def units(self) -> list[str]:
        table = open_table(self.name)
        plans = [plan for plan in table.plans() if plan.adds_parts]
        return [plan_part_name(plan.generation, part) for plan in plans for part in sorted(plan.parts)]

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


def list_pairs(
    sources: PairSources, limit: int | None, notify: Callable[[str], None] = lambda note: None
) -> Iterator[pa.Table]:
    """Yield everything the sources list, ROWS_PER_TABLE rows at a time. `limit`: rows taken of DATA.

    `notify` is called with what a person should know of the sources.
    """
    for number, source in enumerate(sources.sources):
        remaining = limit if number == 0 else None
        for rows in _tables_of(source, notify):
            rows = rows if remaining is None else rows.slice(0, remaining)
            remaining = None if remaining is None else remaining - len(rows)
            yield rows.append_column(PAIRS_SCHEMA.field("data"), pa.array([number] * len(rows), pa.int8()))
            if remaining == 0:
                break


def _tables_of(source: Source, notify: Callable[[str], None] = lambda note: None) -> Iterator[pa.Table]:
    for _, listing in list_units(source, source.units()):
        for note in listing.notes:
            notify(note)
        rows = listing.rows.select(PLAN_SCHEMA.names)
        for first in range(0, len(rows), ROWS_PER_TABLE):
            yield rows.slice(first, ROWS_PER_TABLE).combine_chunks()
