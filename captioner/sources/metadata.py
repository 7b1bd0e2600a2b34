"""Captions beside a folder of images: the `metadata.jsonl|csv|parquet` of Hugging Face's ImageFolder."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa

from captioner.errors import SourceError
from captioner.sources.columns import reference_column_of, references_of
from captioner.sources.root import Root
from captioner.sources.tables import UnreadableTableError, open_table, read_batches

METADATA_NAMES = (b"metadata.jsonl", b"metadata.csv", b"metadata.parquet")


@dataclass(frozen=True, slots=True)
class Metadata:
    """Reference captions of the images in a directory and below. The text stays in Arrow, to save memory.

    Paths are those below the directory, as `_path_of` writes them.
    """

    prefix: bytes  # of paths in this directory
    row_of: dict[bytes, int]  # path -> its first row of `captions`
    more_rows: dict[bytes, list[int]]  # path -> its other rows
    captions: pa.ChunkedArray  # list<string>

    def find(self, paths: Sequence[bytes]) -> list[list[str] | None]:
        """Return the captions of each path: of all its lines, in their order."""
        keys = [self._key_of(path[len(self.prefix) :]) for path in paths]
        rows = [self.row_of.get(key) for key in keys]
        captions: list[list[str] | None] = self.captions.take(pa.array(rows, pa.int64())).to_pylist()
        for index, key in enumerate(keys) if self.more_rows else ():
            for row in self.more_rows.get(key, ()):
                captions[index] = [*(captions[index] or ()), *(self.captions[row].as_py() or ())] or None
        return captions

    def _key_of(self, path: bytes) -> bytes:
        """Return the key of a file on disk, whose name may be composed in another way, or hold a real backslash."""
        return path if path in self.row_of else _composed(path)


def find_references(metadata: Sequence[Metadata], paths: Sequence[bytes]) -> list[list[str] | None]:
    """Return for each path the captions of the nearest metadata file that has any."""
    if not metadata:
        return [None] * len(paths)
    nearest, *others = (table.find(paths) for table in metadata)
    for farther in others:
        nearest = [first if first is not None else second for first, second in zip(nearest, farther, strict=True)]
    return nearest


class ForeignMetadataError(SourceError):
    """A file that has the name of metadata and is none: it does not name files."""


def load_metadata(root: Root, file: bytes, reference_column: str | None) -> Metadata:
    """Read a metadata file; cached until the file changes.

    Raises ForeignMetadataError where it does not name files, or nobody can tell, and SourceError where it does and
    cannot be read, or lacks the column asked for.
    """
    try:
        return _load(root, file, reference_column, root.stamp(file))
    except UnreadableTableError as error:
        if _names_files(root, file):
            raise
        raise ForeignMetadataError(str(error)) from None


def _names_files(root: Root, file: bytes) -> bool:
    """Return whether the beginning of a damaged file has the name of the column that metadata need."""
    try:
        return b"file_name" in root.read(file, 0, 1 << 16)
    except OSError:
        return False


@lru_cache(maxsize=8)
def _load(root: Root, file: bytes, reference_column: str | None, stamp: object) -> Metadata:
    table = open_table(root, file)
    if "file_name" not in table.schema.names:
        columns = ", ".join(table.schema.names[:20])
        raise ForeignMetadataError(f"{root.uri(file)}: no column 'file_name'; it has: {columns}")
    column = reference_column_of(table.schema, reference_column, root.uri(file))
    row_of: dict[bytes, int] = {}
    more_rows: dict[bytes, list[int]] = {}
    captions: list[pa.Array] = []
    rows = 0
    for batch in read_batches(root, file, table, ["file_name", column] if column else ["file_name"], column):
        for row, name in enumerate(batch["file_name"].to_pylist(), start=rows):
            path = _path_of(str(name))
            if row_of.setdefault(path, row) != row:
                more_rows.setdefault(path, []).append(row)
            if "\\" in str(name):
                row_of.setdefault(os.fsencode(str(name)), row)
        captions.append(references_of(batch, column))
        rows += len(batch)
    all_captions = pa.chunked_array(captions, pa.list_(pa.string()))
    return Metadata(os.path.join(os.path.dirname(file), b""), row_of, more_rows, all_captions)


def _path_of(name: str) -> bytes:
    """Return the path that a metadata file means: "./b.png" and "sub\\c.png" are b.png and sub/c.png."""
    return _composed(os.fsencode(posixpath.normpath(name.replace("\\", "/"))))


def _composed(path: bytes) -> bytes:
    """Return a path with letters and their accents in one character each (Unicode's NFC)."""
    return path if path.isascii() else os.fsencode(unicodedata.normalize("NFC", os.fsdecode(path)))
