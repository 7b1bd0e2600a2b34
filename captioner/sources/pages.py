"""A row for each page of a multi-page TIFF: --pages all."""

from __future__ import annotations

import os
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
    """A source of files in which each page of a multi-page TIFF is a separate image: `scan.tif#page=1`, ...

    Listing opens the files with the suffixes of TIFFs and reads their directories, no pixels. The reference captions of
    a file belong to its first page. A page is read as a TIFF with one page: `sha256` and `num_bytes` are of that.
    """

    source: _FilesSource

    def list_unit(self, unit: str) -> Iterator[Listing]:
        for listing in self.source.list_unit(unit):
            yield replace(listing, rows=self._with_pages(listing.rows))

    def read(self, rows: pa.Table) -> list[RawImage]:
        """Read each file once, whatever the number of its pages."""
        keys = list(zip(rows["file"].to_pylist(), rows["offset"].to_pylist(), strict=True))
        first_of = {key: index for index, key in reversed(list(enumerate(keys)))}
        files = sorted(first_of.values())
        ids, pages = rows["image_id"].to_pylist(), rows["page_at"].to_pylist()
        whole = rows.take(pa.array(files))
        names = [ids[index] if pages[index] is None else ids[index].rpartition(PAGE)[0] for index in files]
        whole = whole.set_column(0, PLAN_SCHEMA.field("image_id"), pa.array(names, pa.string()))
        images = dict(zip(files, self.source.read(whole), strict=True))
        return [
            _page(images[first_of[key]], image_id, page) for key, image_id, page in zip(keys, ids, pages, strict=True)
        ]

    def _with_pages(self, rows: pa.Table) -> pa.Table:
        with ThreadPoolExecutor(concurrency()) as pool:
            pages_of = list(pool.map(self._pages_of, rows.select(["image_id", "file", "offset", "size"]).to_pylist()))
        indices = [index for index, pages in enumerate(pages_of) for _ in pages]
        numbers = [number for pages in pages_of for number in range(1, len(pages) + 1)]
        offsets = [offset for pages in pages_of for offset in pages]
        rows = rows.take(pa.array(indices, pa.int64()))
        ids, captions = rows["image_id"].to_pylist(), rows["reference_captions"].to_pylist()
        columns = {
            "image_id": [
                image_id if offset is None else f"{image_id}{PAGE}{number}"
                for image_id, offset, number in zip(ids, offsets, numbers, strict=True)
            ],
            "page_at": offsets,
            "reference_captions": [
                references if number == 1 else None for references, number in zip(captions, numbers, strict=True)
            ],
        }
        for name, values in columns.items():
            field = PLAN_SCHEMA.field(name)
            rows = rows.set_column(rows.schema.get_field_index(name), field, pa.array(values, field.type))
        return rows

    def _pages_of(self, row: dict[str, Any]) -> list[int | None]:
        """Return the offsets of the pages of a multi-page TIFF; a single `None` for any other file.

        A file that cannot be opened is one image, whose row will have the reason.
        """
        if not _is_tiff(row["image_id"]) and not _is_tiff(row["file"]):
            return [None]
        start = row["offset"] or 0
        try:
            with self.source.root.open(row["file"]) as stream:
                end = stream.seek(0, os.SEEK_END) if row["size"] is None else start + row["size"]

                def read(offset: int, size: int) -> bytes:
                    stream.seek(start + offset)
                    return stream.read(max(0, min(size, end - stream.tell())))

                offsets = page_offsets(read)
        except (OSError, OverflowError):
            return [None]
        return [*offsets] if len(offsets) > 1 else [None]


def _page(file: RawImage, image_id: str, page_at: int | None) -> RawImage:
    if page_at is None:
        return replace(file, image_id=image_id)  # several rows may name one file
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
