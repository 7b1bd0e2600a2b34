"""Images in the cells of a table: bytes, a path, or nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from captioner.data import RawImage
from captioner.sources.reading import failed_read, raw_image, read_all, with_retry
from captioner.sources.root import Root


@dataclass(frozen=True, slots=True)
class FileCell:
    """The cell names a file, under the source's root or anywhere."""

    file: bytes


# The bytes themselves, the file they are in, nothing, or why the row could not be read.
Cell = bytes | FileCell | None | OSError


def make_cell(value: Any, folder: bytes = b"") -> Cell:
    """From the value of an image column: bytes, text (a path), or struct{bytes, path}. `folder`: of the table."""
    if isinstance(value, dict):
        data = value.get("bytes")
        value = data if data is not None else value.get("path")
    if isinstance(value, str):
        return FileCell(os.path.join(folder, os.fsencode(value))) if value else None
    return value


def read_cells(rows: pa.Table, cells: Sequence[Cell], uris: Sequence[str], root: Root) -> list[RawImage]:
    """The image in each cell, in order; those that are in files are read."""
    ids = rows.column("image_id").to_pylist()
    tasks = [partial(_read_cell, root, *given) for given in zip(ids, uris, cells, strict=True)]
    return read_all(tasks, root, in_archives=all(isinstance(cell, FileNotFoundError) for cell in cells))


def _read_cell(root: Root, image_id: str, uri: str, cell: Cell) -> RawImage:
    if isinstance(cell, FileCell):
        try:
            cell = with_retry(partial(root.read, cell.file))
        except OSError as error:
            cell = error
    if isinstance(cell, OSError):
        return failed_read(image_id, uri, cell)
    if cell is None:
        return RawImage(image_id, uri, None, "not_found", "the table holds no image here")
    return raw_image(image_id, uri, cell)
