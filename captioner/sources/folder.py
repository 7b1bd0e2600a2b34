"""A folder of images, with all its sub-folders; Hugging Face's ImageFolder is one with captions beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from captioner.data import Listing, RawImage
from captioner.sources.metadata import METADATA_NAMES, Metadata, find_references, load_metadata
from captioner.sources.plan_rows import BATCH_ROWS, names_as_ids, plan_table
from captioner.sources.reading import read_rows
from captioner.sources.root import Root, file_of_unit, is_hidden, is_ignored, readable, unit_of_file


@dataclass(frozen=True, slots=True)
class FolderSource:
    """Every file is an image by its name, except those that `files.is_ignored` tells.

    Units: "" is the root's own files; then each first-level sub-folder with everything below it.
    """

    name: str
    root: Root
    reference_column: str | None = None

    def units(self) -> Sequence[str]:
        return ["", *(unit_of_file(directory) for directory in self.root.scan().directories)]

    def kept_fields(self) -> list[pa.Field]:
        return []

    def list_unit(self, unit: str) -> Iterator[Listing]:
        top = _Folder(self.root, self.reference_column, above=(self.root.identity(b""),))
        if unit:
            present = [name for name in METADATA_NAMES if self.root.exists(name)]
            found = _walk(top.with_metadata(present).below(file_of_unit(unit)), deep=True)
        else:
            found = _walk(top, deep=False)
        return (piece.listing() for piece in _merge(found))

    def read(self, rows: pa.Table) -> list[RawImage]:
        return read_rows(rows, self.root)


@dataclass(slots=True)
class _Found:
    """Up to BATCH_ROWS paths: images with their known captions, and what was passed over."""

    images: list[bytes] = field(default_factory=list)
    references: list[list[str] | None] = field(default_factory=list)
    ignored: list[bytes] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images) + len(self.ignored)

    def add(self, other: _Found) -> None:
        self.images += other.images
        self.references += other.references
        self.ignored += other.ignored

    def listing(self) -> Listing:
        rows = plan_table(names_as_ids(self.images), self.images, references=self.references)
        return Listing(rows, [readable(name) for name in self.ignored])


@dataclass(frozen=True, slots=True)
class _Folder:
    """One directory on the way down, and what it inherits from those above."""

    root: Root
    reference_column: str | None
    directory: bytes = b""
    hidden: bool = False
    above: tuple[object, ...] = ()  # identities of this directory and those above it
    metadata: tuple[Metadata, ...] = ()  # nearest first

    def below(self, name: bytes) -> _Folder:
        directory = os.path.join(self.directory, name)
        return replace(
            self,
            directory=directory,
            hidden=self.hidden or is_hidden(name),
            above=(*self.above, self.root.identity(directory)),
        )

    @property
    def is_loop(self) -> bool:
        """Whether a symlink led back to a directory above."""
        return self.above[-1] in self.above[:-1]

    def with_metadata(self, files: Sequence[bytes]) -> _Folder:
        paths = [os.path.join(self.directory, name) for name in METADATA_NAMES if name in files]
        loaded = [load_metadata(self.root, path, self.reference_column) for path in paths if not self.hidden]
        return replace(self, metadata=(*loaded, *self.metadata)) if loaded else self

    def sort_out(self, names: Sequence[bytes]) -> _Found:
        prefix = os.path.join(self.directory, b"")
        found = _Found()
        for name in names:
            passed_over = self.hidden or is_ignored(name)
            (found.ignored if passed_over else found.images).append(prefix + name)
        found.references = find_references(self.metadata, found.images)
        return found


def _walk(top: _Folder, *, deep: bool) -> Iterator[_Found]:
    """Depth first: the files of a directory, then its sub-directories in order."""
    stack = [top]
    while stack:
        folder = stack.pop()
        if folder.is_loop:
            yield _Found(ignored=[folder.directory + b"/"])
            continue
        held = folder.root.scan(folder.directory)
        folder = folder.with_metadata(held.files)
        for start in range(0, len(held.files), BATCH_ROWS):
            yield folder.sort_out(held.files[start : start + BATCH_ROWS])
        yield _Found(ignored=[os.path.join(folder.directory, name) for name in held.others])
        if deep:
            stack += [folder.below(name) for name in reversed(held.directories)]


def _merge(pieces: Iterator[_Found]) -> Iterator[_Found]:
    """Few large pieces out of many small ones."""
    batch = _Found()
    for piece in pieces:
        if len(batch) and len(batch) + len(piece) > BATCH_ROWS:
            yield batch
            batch = _Found()
        batch.add(piece)
    if len(batch):
        yield batch
