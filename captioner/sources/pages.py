"""A row for each page of a multi-page TIFF: --pages all."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pyarrow as pa

from captioner.data import PAGE, PLAN_SCHEMA, Listing, RawImage, Source
from captioner.imaging.tiff import SUFFIXES, extract, page_offsets
from captioner.sources.plan_rows import WrappedSource
from captioner.sources.reading import concurrency
from captioner.sources.root import Root


class _FilesSource(Source, Protocol):
    @property
    def root(self) -> Root: ...


@dataclass(frozen=True, slots=True)
class PagedSource(WrappedSource):
    """A source of files in which each page of a TIFF that has several is an image of its own: `scan.tif#page=1`, ...

    Listing opens the files whose names end in .tif or .tiff and follows their chains of directories; no pixel is
    read. Known captions of a file go to its first page. A page is read as a TIFF of its own: that is what `sha256` and
    `num_bytes` are of.
    """

    source: _FilesSource

    def list_unit(self, unit: str) -> Iterator[Listing]:
        for listing in self.source.list_unit(unit):
            yield Listing(self._with_pages(listing.rows), listing.ignored)

    def read(self, rows: pa.Table) -> list[RawImage]:
        """The files are read once each, whatever the number of their pages."""
        keys = list(zip(rows["file"].to_pylist(), rows["offset"].to_pylist(), strict=True))
        first_of = {key: place for place, key in reversed(list(enumerate(keys)))}
        files = sorted(first_of.values())
        ids, pages = rows["image_id"].to_pylist(), rows["page_at"].to_pylist()
        whole = rows.take(pa.array(files))
        names = [ids[n] if pages[n] is None else ids[n].rpartition(PAGE)[0] for n in files]
        whole = whole.set_column(0, PLAN_SCHEMA.field("image_id"), pa.array(names, pa.string()))
        found = dict(zip(files, self.source.read(whole), strict=True))
        return [
            _page(found[first_of[key]], image_id, page) for key, image_id, page in zip(keys, ids, pages, strict=True)
        ]

    def _with_pages(self, rows: pa.Table) -> pa.Table:
        with ThreadPoolExecutor(concurrency()) as pool:
            offsets = list(pool.map(self._pages_of, rows.select(["image_id", "file", "offset"]).to_pylist()))
        places = [place for place, several in enumerate(offsets) for _ in several]
        numbers = [number for several in offsets for number in range(1, len(several) + 1)]
        pages = [page for several in offsets for page in several]
        rows = rows.take(pa.array(places, pa.int64()))
        ids, captions = rows["image_id"].to_pylist(), rows["reference_captions"].to_pylist()
        columns = {
            "image_id": [
                one if page is None else f"{one}{PAGE}{number}"
                for one, page, number in zip(ids, pages, numbers, strict=True)
            ],
            "page_at": pages,
            "reference_captions": [
                known if number == 1 else None for known, number in zip(captions, numbers, strict=True)
            ],
        }
        for name, values in columns.items():
            field = PLAN_SCHEMA.field(name)
            rows = rows.set_column(rows.schema.get_field_index(name), field, pa.array(values, field.type))
        return rows

    def _pages_of(self, row: dict[str, Any]) -> list[int | None]:
        """Offsets of the pages of a TIFF with several; one `None` for any other file. A file that cannot be opened is
        one image: reading it will say why."""
        if not _is_tiff(row["image_id"]) and not _is_tiff(row["file"]):
            return [None]
        start = row["offset"] or 0
        try:
            with self.source.root.open(row["file"]) as stream:

                def read(offset: int, size: int) -> bytes:
                    stream.seek(start + offset)
                    return stream.read(size)

                found = page_offsets(read)
        except (OSError, OverflowError):
            return [None]
        return [*found] if len(found) > 1 else [None]


def _page(file: RawImage, image_id: str, page_at: int | None) -> RawImage:
    if page_at is None:
        return file
    raw = replace(file, image_id=image_id, uri=file.uri + PAGE + image_id.rpartition(PAGE)[2])
    if raw.data is None:
        return raw
    try:
        return replace(raw, data=extract(raw.data, page_at))
    except ValueError as error:
        return replace(raw, data=None, error_code="truncated", error_message=str(error))


def _is_tiff(name: str | bytes) -> bool:
    text = name if isinstance(name, str) else name.decode("utf-8", "replace")
    return text.lower().endswith(SUFFIXES)
