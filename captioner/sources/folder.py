"""A folder of images with all its sub-folders; also Hugging Face's ImageFolder, which has captions beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from captioner.data import Listing, RawImage
from captioner.sources.metadata import METADATA_NAMES, Metadata, find_references, load_metadata
from captioner.sources.plan_rows import BATCH_ROWS, names_as_ids, plan_table
from captioner.sources.reading import read_rows
from captioner.sources.root import Root, file_of_unit, is_captions_table, is_hidden, is_ignored, readable, unit_of_file


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A source in which every file counts as an image, unless `captioner.sources.root.is_ignored` rejects its name.

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
            batches = _walk(top.with_metadata(present).below(file_of_unit(unit)), deep=True)
        else:
            batches = _walk(top, deep=False)
        return (batch.listing() for batch in _merge(batches))

    def read(self, rows: pa.Table) -> list[RawImage]:
        return read_rows(rows, self.root)


@dataclass(slots=True)
class _Paths:
    """Up to BATCH_ROWS paths: images with their reference captions, and ignored files."""

    images: list[bytes] = field(default_factory=list)
    references: list[list[str] | None] = field(default_factory=list)
    ignored: list[bytes] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images) + len(self.ignored)

    def add(self, other: _Paths) -> None:
        self.images += other.images
        self.references += other.references
        self.ignored += other.ignored

    def listing(self) -> Listing:
        rows = plan_table(names_as_ids(self.images), self.images, references=self.references)
        return Listing(rows, [readable(name) for name in self.ignored])


@dataclass(frozen=True, slots=True)
class _Folder:
    """A directory that is being listed, and what it inherits from those above it."""

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
        """Whether a symlink leads back to a directory above."""
        return self.above[-1] in self.above[:-1]

    def with_metadata(self, files: Sequence[bytes]) -> _Folder:
        paths = [os.path.join(self.directory, name) for name in METADATA_NAMES if name in files]
        loaded = [load_metadata(self.root, path, self.reference_column) for path in paths if not self.hidden]
        return replace(self, metadata=(*loaded, *self.metadata)) if loaded else self

    def classify(self, names: Sequence[bytes]) -> _Paths:
        prefix = os.path.join(self.directory, b"")
        paths = _Paths()
        for name in names:
            ignore = self.hidden or is_ignored(name)
            (paths.ignored if ignore else paths.images).append(prefix + name)
        paths.references = find_references(self.metadata, paths.images)
        return paths


def _walk(top: _Folder, *, deep: bool) -> Iterator[_Paths]:
    """Yield paths depth first: the files of a directory, then its sub-directories in order."""
    stack = [top]
    while stack:
        folder = stack.pop()
        if folder.is_loop:
            yield _Paths(ignored=[folder.directory + b"/"])
            continue
        content = folder.root.scan(folder.directory)
        if folder.directory and is_captions_table(content.files, content.directories):
            yield _Paths(ignored=[folder.directory + b"/ (the OUT of a run)"])
            continue
        folder = folder.with_metadata(content.files)
        for start in range(0, len(content.files), BATCH_ROWS):
            yield folder.classify(content.files[start : start + BATCH_ROWS])
        yield _Paths(ignored=[os.path.join(folder.directory, name) for name in content.others])
        if deep:
            stack += [folder.below(name) for name in reversed(content.directories)]


def _merge(batches: Iterator[_Paths]) -> Iterator[_Paths]:
    """Merge many small batches into few large ones."""
    merged = _Paths()
    for batch in batches:
        if len(merged) and len(merged) + len(batch) > BATCH_ROWS:
            yield merged
            merged = _Paths()
        merged.add(batch)
    if len(merged):
        yield merged
