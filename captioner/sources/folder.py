"""A folder of images with all its sub-folders; also Hugging Face's ImageFolder, which has captions beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from captioner.data import Listing, RawImage
from captioner.sources.metadata import (
    METADATA_NAMES,
    CaptionFiles,
    ForeignMetadataError,
    Metadata,
    find_references,
    load_metadata,
    names_of_caption_files,
    undecodable_note,
    unmatched,
)
from captioner.sources.plan_rows import BATCH_ROWS, names_as_ids, plan_table
from captioner.sources.reading import read_rows
from captioner.sources.root import (
    Root,
    UnlistableError,
    file_of_unit,
    is_captions_table,
    is_excluded,
    is_hidden,
    is_ignored,
    readable,
    unit_of_file,
)


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A source in which every file counts as an image, unless `captioner.sources.root.is_ignored` rejects its name.

    Units: "" is the root's own files; then each first-level sub-folder with everything below it.
    """

    name: str
    root: Root
    reference_column: str | None = None
    exclude: tuple[str, ...] = ()  # globs: what is below an excluded folder is not even listed
    reason: str = ""  # why the source was taken for a folder
    only: bytes = b""  # the one file of the root that is the source; b"": all

    def units(self) -> Sequence[str]:
        directories = [] if self.only else self.root.scan().directories
        return ["", *(unit_of_file(name) for name in directories if not is_excluded(name + b"/", self.exclude))]

    def kept_fields(self) -> list[pa.Field]:
        return []

    def list_unit(self, unit: str) -> Iterator[Listing]:
        top = _Folder(self.root, self.reference_column, self.exclude, above=(self.root.identity(b""),))
        if unit:
            present = [name for name in METADATA_NAMES if self.root.exists(name)]
            top, _ = top.with_metadata(present)  # what is odd about it is a note of the unit ""
            batches = _walk(top, [file_of_unit(unit)], deep=True)
        elif self.only:
            batches = self._list_only(top)
        else:
            batches = _walk(top, [], deep=False)
        return (batch.listing() for batch in _merge(batches))

    def _list_only(self, top: _Folder) -> Iterator[_Paths]:
        """Yield the one file of the source, with its captions in files beside it."""
        names = [*METADATA_NAMES, *names_of_caption_files(self.only)]
        present = [name for name in names if self.root.exists(name)]
        folder, notes = top.with_metadata(present)
        yield _Paths(notes=notes)
        yield from folder.classify([self.only, *(name for name in present if name not in METADATA_NAMES)])

    def read(self, rows: pa.Table) -> list[RawImage]:
        return read_rows(rows, self.root)


@dataclass(slots=True)
class _Paths:
    """Up to BATCH_ROWS paths: images with their reference captions, and ignored files."""

    images: list[bytes] = field(default_factory=list)
    references: list[list[str] | None] = field(default_factory=list)
    ignored: list[bytes] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images) + len(self.ignored)

    def add(self, other: _Paths) -> None:
        self.images += other.images
        self.references += other.references
        self.ignored += other.ignored
        self.notes += other.notes

    def listing(self) -> Listing:
        rows = plan_table(names_as_ids(self.images), self.images, references=self.references)
        return Listing(rows, [readable(name) for name in self.ignored], self.notes)


@dataclass(frozen=True, slots=True)
class _Folder:
    """A directory that is being listed, and what it inherits from those above it."""

    root: Root
    reference_column: str | None
    exclude: tuple[str, ...] = ()
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

    def with_metadata(self, files: Sequence[bytes]) -> tuple[_Folder, list[str]]:
        """Return the folder with the captions of its metadata, and notes about files that are not metadata."""
        loaded, notes = [], []
        for name in METADATA_NAMES if not self.hidden else ():
            path = os.path.join(self.directory, name)
            if name in files and not is_excluded(path, self.exclude):
                try:
                    loaded.append(load_metadata(self.root, path, self.reference_column))
                except ForeignMetadataError as error:
                    notes.append(f"skipped, it holds no captions of images: {error}")
        return replace(self, metadata=(*loaded, *self.metadata)) if loaded else self, notes

    def excludes(self, name: bytes) -> bool:
        """Return whether --exclude leaves out all that is in a sub-directory."""
        return is_excluded(os.path.join(self.directory, name, b""), self.exclude)

    def unmatched_note(self, metadata: Metadata) -> str:
        """Return a line about names in a metadata file that match no image; "" where all match."""
        paths = unmatched(metadata, self.root, self.exclude)
        if not paths:
            return ""
        num_names = len(set(metadata.row_of.values()))
        return (
            f"{readable(metadata.file)}: {len(paths):,} of its {num_names:,} names match no image, e.g. {_shown(paths)}"
        )

    def classify(self, names: Sequence[bytes]) -> Iterator[_Paths]:
        """Yield the images among the files of the directory, with their captions; then the other files.

        Files whose captions are used are neither.
        """
        images = [name for name in names if not self.hidden and not is_ignored(name)]
        # With --reference-column captions are those of a column.
        texts = CaptionFiles(self.root, self.directory, [] if self.reference_column else names, self.exclude)
        for start in range(0, len(images), BATCH_ROWS):
            yield self._captioned(images[start : start + BATCH_ROWS], texts)
        captions = {metadata.file for metadata in self.metadata}
        used = texts.used | {name for name in names if os.path.join(self.directory, name) in captions}
        others = sorted({*names} - {*images} - used)
        for start in range(0, len(others), BATCH_ROWS):
            batch = others[start : start + BATCH_ROWS]
            yield _Paths(ignored=[os.path.join(self.directory, name) for name in batch])
        if texts.undecodable:
            paths = sorted(os.path.join(self.directory, name) for name in texts.undecodable)
            yield _Paths(notes=[undecodable_note([readable(path) for path in paths])])

    def _captioned(self, images: Sequence[bytes], texts: CaptionFiles) -> _Paths:
        """Return images with their captions: of metadata, else of text files beside them."""
        paths = [os.path.join(self.directory, name) for name in images]
        references = find_references(self.metadata, paths)
        without = [index for index, captions in enumerate(references) if captions is None]
        for index, captions in zip(without, texts.find([images[index] for index in without]), strict=True):
            references[index] = captions
        return _Paths(paths, references)


def _shown(paths: Sequence[bytes]) -> str:
    return ", ".join(repr(readable(path)) for path in paths[:3])


def _walk(top: _Folder, names: Sequence[bytes], *, deep: bool) -> Iterator[_Paths]:
    """Yield the paths of a folder, or of those below it that have these names, depth first.

    First come the files of a directory, then its sub-directories in order. A directory below `top` that cannot be
    listed is skipped and noted.
    """
    stack: list[tuple[_Folder, bytes]] = [(top, name) for name in reversed(names)] or [(top, b"")]
    while stack:
        parent, name = stack.pop()
        try:
            folder = parent.below(name) if name else parent
            if folder.is_loop:
                yield _Paths(ignored=[folder.directory + b"/"])
                continue
            content = folder.root.scan(folder.directory)
        except UnlistableError as error:
            if not name:
                raise
            path = os.path.join(parent.directory, name, b"")
            yield _Paths(ignored=[path], notes=[f"skipped, with everything in it: {_short(str(error))}"])
            continue
        if folder.directory and is_captions_table(content.files, content.directories):
            yield _Paths(ignored=[folder.directory + b"/ (the OUT of a run)"])
            continue
        inherited = len(folder.metadata)
        folder, notes = folder.with_metadata(content.files)
        own = folder.metadata[: len(folder.metadata) - inherited]
        yield _Paths(notes=[*notes, *filter(None, map(folder.unmatched_note, own))])
        yield from folder.classify(content.files)
        yield _Paths(ignored=[os.path.join(folder.directory, name) for name in content.others])
        if deep:
            below = [name for name in content.directories if not folder.excludes(name)]
            stack += [(folder, name) for name in reversed(below)]


def _short(message: str) -> str:
    """Return a message without the middle of a path of thousands of characters."""
    return message if len(message) <= 300 else f"{message[:120]} ... {message[-120:]}"


def _merge(batches: Iterator[_Paths]) -> Iterator[_Paths]:
    """Merge many small batches into few large ones."""
    merged = _Paths()
    for batch in batches:
        if len(merged) and len(merged) + len(batch) > BATCH_ROWS:
            yield merged
            merged = _Paths()
        merged.add(batch)
    if len(merged) or merged.notes:
        yield merged
