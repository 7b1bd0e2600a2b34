"""Captions beside images: the `metadata.jsonl|csv|parquet` of Hugging Face's ImageFolder, and text files."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa

from captioner.console.text import counted
from captioner.errors import SourceError
from captioner.sources.columns import as_captions, reference_column_of, references_of
from captioner.sources.reading import concurrency
from captioner.sources.root import Root, UnlistableError, is_excluded, is_hidden, is_ignored, readable
from captioner.sources.tables import UnreadableTableError, decode_text, encoding_of, open_table, read_batches

CAPTION_SUFFIXES = (b".caption", b".txt")  # of text files beside images, as tools for training write them
MAX_CAPTION_BYTES = 1 << 16  # a longer text is not a caption
METADATA_NAMES = (b"metadata.jsonl", b"metadata.csv", b"metadata.parquet")


@dataclass(frozen=True, slots=True)
class Metadata:
    """Reference captions of the images in a directory and below. The text stays in Arrow, to save memory.

    Paths are those below the directory, as `_path_of` writes them.
    """

    file: bytes  # path of the metadata
    row_of: dict[bytes, int]  # path -> its first row of `captions`
    more_rows: dict[bytes, list[int]]  # path -> its other rows
    captions: pa.ChunkedArray  # list<string>

    @property
    def prefix(self) -> bytes:
        """What paths of images in the directory begin with."""
        return os.path.join(os.path.dirname(self.file), b"")

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
    """Raised for a file with the name of a metadata file that does not name files."""


def unmatched(metadata: Metadata, root: Root, exclude: Sequence[str] = ()) -> list[bytes]:
    """Return the paths in a metadata file that are of no image of the source, without those that are excluded."""
    rows_by_directory: dict[bytes, dict[bytes, int]] = {}
    for path, row in metadata.row_of.items():
        if b"\\" in path:  # which stands for another path, too, maybe one of several lines
            row = metadata.row_of.get(_path_of(os.fsdecode(path)), row)
        if not is_excluded(metadata.prefix + path, exclude):
            directory, name = os.path.split(path)
            rows_by_directory.setdefault(directory, {})[name] = row
    without_image: dict[int, bytes] = {}
    matched: set[int] = set()
    for directory, row_of in rows_by_directory.items():
        images = _images_in(root, metadata.prefix, directory)
        for name, row in row_of.items():
            if name in images:
                matched.add(row)
            else:
                without_image.setdefault(row, os.path.join(directory, name))
    return [path for row, path in without_image.items() if row not in matched]


def _images_in(root: Root, prefix: bytes, directory: bytes) -> set[bytes]:
    """Return the names of images in a directory, as they are and composed; none outside of the source."""
    if os.path.isabs(directory) or any(part == b".." or is_hidden(part) for part in directory.split(b"/")):
        return set()
    try:
        names = [name for name in root.scan(prefix + directory).files if not is_ignored(name)]
    except UnlistableError:
        return set()
    return {*names, *map(_composed, names)}


def load_metadata(root: Root, file: bytes, reference_column: str | None) -> Metadata:
    """Read a metadata file; cached until the file changes.

    Raises ForeignMetadataError where it does not name files, or nobody can tell, and SourceError where it does and
    cannot be read, or lacks the column asked for.
    """
    try:
        return _load(root, file, reference_column, root.stamp(file))
    except UnreadableTableError as error:
        if not _names_files(root, file):
            raise ForeignMetadataError(str(error)) from None
        raise SourceError(f"{error}; repair it, or leave it out with --exclude {readable(file)!r}") from None


def _names_files(root: Root, file: bytes) -> bool:
    """Return whether the beginning of a damaged file has the name of the column that metadata need."""
    try:
        head = root.read(file, 0, 1 << 16)
        return "file_name" in head.decode(encoding_of(head), "replace")
    except OSError:
        return False


@lru_cache(maxsize=8)
def _load(root: Root, file: bytes, reference_column: str | None, stamp: object) -> Metadata:
    table = open_table(root, file, reference_column)
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
            path = _path_of(os.fsdecode(name) if isinstance(name, bytes) else str(name or ""))
            if row_of.setdefault(path, row) != row:
                more_rows.setdefault(path, []).append(row)
            if "\\" in str(name):
                row_of.setdefault(os.fsencode(str(name)), row)
        captions.append(references_of(batch, column))
        rows += len(batch)
    all_captions = pa.chunked_array(captions, pa.list_(pa.string()))
    return Metadata(file, row_of, more_rows, all_captions)


def _path_of(name: str) -> bytes:
    """Return the path that a metadata file means: "./b.png" and "sub\\c.png" are b.png and sub/c.png."""
    return _composed(os.fsencode(posixpath.normpath(name.replace("\\", "/"))))


def _composed(path: bytes) -> bytes:
    """Return a path with letters and their accents in one character each (Unicode's NFC)."""
    return path if path.isascii() else os.fsencode(unicodedata.normalize("NFC", os.fsdecode(path)))


def names_of_caption_files(image: bytes) -> list[bytes]:
    """Return the names that a text file with captions of an image may have."""
    return [base + suffix for base in (os.path.splitext(image)[0], image) for suffix in CAPTION_SUFFIXES]


class CaptionFiles:
    """The captions in text files beside the images of a directory: a.caption, a.txt and a.png.txt of a.png.

    `used`: the files that hold captions of an image. `undecodable`: those that hold text in another encoding.
    """

    def __init__(self, root: Root, directory: bytes, files: Sequence[bytes], exclude: Sequence[str] = ()) -> None:
        self._root, self._prefix = root, os.path.join(directory, b"")
        # By the name with its suffix in small letters.
        self._names = {
            stem + suffix.lower(): name
            for name in files
            for stem, suffix in [os.path.splitext(name)]
            if suffix.lower() in CAPTION_SUFFIXES and not is_excluded(self._prefix + name, exclude)
        }
        self.used: set[bytes] = set()
        self.undecodable: set[bytes] = set()

    def find(self, images: Sequence[bytes]) -> list[list[str] | None]:
        """Return the captions of each image, by its name in the directory."""
        files_of = [self._files_of(image) for image in images]
        files = list({file for files in files_of for file in files})
        with ThreadPoolExecutor(concurrency()) as pool:
            captions_in = dict(zip(files, pool.map(self._read, files), strict=True))
        self.used.update(file for file, captions in captions_in.items() if captions)
        captions_of = ([text for file in files for text in captions_in[file] or ()] for files in files_of)
        return [list(dict.fromkeys(captions)) or None for captions in captions_of]

    def _files_of(self, image: bytes) -> list[bytes]:
        return [self._names[name] for name in names_of_caption_files(image) if name in self._names]

    def _read(self, name: bytes) -> list[str] | None:
        try:
            data = self._root.read(self._prefix + name, 0, MAX_CAPTION_BYTES + 1)
        except (OSError, SourceError):
            return None  # the image counts among those without captions
        try:
            return captions_in_text(data) if len(data) <= MAX_CAPTION_BYTES else None
        except UnicodeDecodeError:
            self.undecodable.add(name)
            return None


def undecodable_note(names: Sequence[str]) -> str:
    """Return a line about texts in another encoding."""
    examples = ", ".join(map(repr, names[:3]))
    return f"captions in {counted(len(names), 'text file')} are not UTF-8 and not used, e.g. {examples}"


def captions_in_text(data: bytes, by_line: bool = True) -> list[str] | None:
    """Return the captions in a text, one on each line or one in all; None where it has no words, as boxes have none.

    Raises UnicodeDecodeError where it is neither UTF-8 nor UTF-16 with its mark.
    """
    text = decode_text(data)
    return as_captions([part for part in (text.splitlines() if by_line else [text]) if any(map(str.isalpha, part))])
