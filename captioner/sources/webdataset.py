"""WebDataset: tars in which files with the same name up to the first dot are one sample. Nothing is unpacked."""

from __future__ import annotations

import itertools
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import BinaryIO

import pyarrow as pa

from captioner.console.text import counted
from captioner.data import Listing, RawImage
from captioner.errors import SourceError
from captioner.sources.columns import REFERENCE_NAMES, as_captions
from captioner.sources.metadata import MAX_CAPTION_BYTES, captions_in_text, undecodable_note
from captioner.sources.plan_rows import BATCH_ROWS, plan_table
from captioner.sources.reading import read_rows, with_stamp
from captioner.sources.root import (
    FETCH_LFS,
    LFS_POINTER,
    Root,
    file_of_unit,
    is_hidden,
    is_transient,
    readable,
    unit_of_file,
)
from captioner.sources.tables import parse_json
from captioner.sources.tar_members import Damage, EndMark, Zeros, walk

IMAGE_SUFFIXES = frozenset(
    b"jpg jpeg jpe jfif png apng webp gif bmp dib tif tiff avif avifs heic heif jp2 j2k jpx "
    b"ppm pgm pbm pnm tga ico psd mpo".split()
)
# Suffixes of other members that samples commonly have.
OTHER_SUFFIXES = frozenset(
    b"cls cls2 index inx id txt text transcript caption json jsonl yaml yml csv tsv xml xmp html md pdf parquet "
    b"npy npz pth pt pyd pickle pkl msgpack mp bin ten tb safetensors mp3 wav flac ogg m4a mp4 webm mkv avi mov".split()
)
COMPRESSED_SUFFIXES = (b".tar.gz", b".tgz", b".tar.bz2", b".tar.xz", b".tar.zst", b".tar.lz4")
MAX_TEXT_BYTES = 16 << 20  # of a .json member; a longer one holds no captions
HELD_LISTINGS = 16  # of one tar, each of at least BATCH_ROWS members
_COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")


@dataclass(frozen=True, slots=True)
class WebDatasetSource:
    """Tars as a source. `tars`: paths under the root, in order; each is one unit."""

    name: str
    root: Root
    tars: tuple[bytes, ...]
    reference_column: str | None = None
    reason: str = ""  # why the source was taken for tars

    def units(self) -> Sequence[str]:
        return [unit_of_file(tar) for tar in self.tars]

    def kept_fields(self) -> list[pa.Field]:
        return []

    def list_unit(self, unit: str) -> Iterator[Listing]:
        """List the images of a tar; damage is a row that will fail.

        One of several tars that cannot be opened, or is not a tar, is a single row that will fail. Of members with the
        same name, as `tar -r` leaves them, the last one is listed: in a tar of fewer than HELD_LISTINGS listings, which
        are held back until the end of the tar is known. In a larger tar, the same name twice is the same id twice.
        """
        tar, versions = file_of_unit(unit), _Versions()
        listings = self._listings(tar, versions.noted, [])
        held = list(itertools.islice(listings, HELD_LISTINGS))
        if versions.newest and len(held) < HELD_LISTINGS:
            yield from self._listings(tar, versions.in_place, [versions.note(readable(tar))])
        else:
            yield from itertools.chain(held, listings)

    def _listings(self, tar: bytes, arranged: _Arranged, notes: list[str]) -> Iterator[Listing]:
        """Yield the rows of a tar whose members are first given to `arranged`; `notes`: of the tar, so far."""
        batch = _Batch(tar, self.root.stamp(tar))
        try:
            # The members of a sample follow each other in the tar: the format requires it.
            members = arranged(_members(self.root, tar, notes))
            for _, sample in itertools.groupby(members, key=attrgetter("key")):
                batch.add_sample(list(sample), self.reference_column)
                if len(batch) >= BATCH_ROWS:
                    yield batch.listing(notes)
                    batch, notes[:] = _Batch(tar, batch.stamp), []
        except _UnreadableTarError as error:
            if len(self.tars) == 1 or all(name.lower().endswith(COMPRESSED_SUFFIXES) for name in self.tars):
                raise SourceError(str(error)) from None
            batch = _Batch(tar, batch.stamp)
            batch.add_sample([_damaged_member(Damage(0, error.size), None, error.size)], None)
            yield batch.listing([*notes, str(error)])
        else:
            yield batch.listing(notes)

    def read(self, rows: pa.Table) -> list[RawImage]:
        return read_rows(rows, self.root)


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of a tar. `offset`, `size`: of its data. `text`: content of .txt, .caption and .json members."""

    name: bytes
    offset: int
    size: int
    is_file: bool
    text: bytes | None = None
    is_damage: bool = False  # no member, but bytes without any; `size` is then negative

    @property
    def key(self) -> bytes:
        directory, base = os.path.split(self.name)
        return os.path.join(directory, base.removeprefix(b"._").partition(b".")[0])

    @property
    def suffix(self) -> bytes:
        return os.path.splitext(self.name)[1][1:].lower()

    @property
    def may_be_image(self) -> bool:
        hidden = any(is_hidden(part) for part in self.name.split(b"/") if part not in (b".", b".."))
        return self.is_file and self.suffix not in OTHER_SUFFIXES and not hidden


_Arranged = Callable[[Iterator[_Member]], Iterator[_Member]]


class _Versions:
    """The members of a tar that have a newer version in it: another one of the same name, nearer to the end.

    `newest`: by name, the last member of those that occur several times. Links and devices are no versions: GNU tar
    writes a file that is added twice as a link to itself.
    """

    def __init__(self) -> None:
        self.newest: dict[bytes, _Member] = {}
        self._names: set[bytes] = set()
        self._num_older = 0

    def noted(self, members: Iterator[_Member]) -> Iterator[_Member]:
        """Yield the members as they are, and note those that occur several times."""
        for member in members:
            if member.is_file or member.is_damage:
                if member.name in self._names:
                    self.newest[member.name] = member
                    self._num_older += 1
                self._names.add(member.name)
            yield member

    def in_place(self, members: Iterator[_Member]) -> Iterator[_Member]:
        """Yield every name once: the newest version where the first one is, in its sample, as if it were unpacked."""
        placed = set()
        for member in members:
            if member.name not in self.newest or not (member.is_file or member.is_damage):
                yield member
            elif member.name not in placed:
                placed.add(member.name)
                yield self.newest[member.name]

    def note(self, tar: str) -> str:
        """Return a line about the members that are not used."""
        names = ", ".join(repr(readable(name)) for name in itertools.islice(self.newest, 3))
        older = counted(self._num_older, "older member is", "older members are")
        return f"{tar}: {older} superseded by a later one of the same name, as when tar unpacks it, e.g. {names}"


@dataclass(slots=True)
class _Batch:
    """The rows of a batch of samples."""

    tar: bytes
    stamp: str | None  # see `Root.stamp`
    images: list[_Member] = field(default_factory=list)
    references: list[list[str] | None] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    undecodable: list[str] = field(default_factory=list)  # texts in another encoding

    def __len__(self) -> int:
        return len(self.images) + len(self.ignored)

    def add_sample(self, members: Sequence[_Member], reference_column: str | None) -> None:
        """Add a row for each image of a sample. Where members have known image suffixes, others are no images."""
        candidates = [member for member in members if member.may_be_image]
        images = [member for member in candidates if member.suffix in IMAGE_SUFFIXES] or candidates
        images += [member for member in members if member.is_damage]
        captions_in = self._captions(members, reference_column) if images else {}
        captions = list(dict.fromkeys(text for texts in captions_in.values() for text in texts)) or None
        self.images += images
        self.references += [captions] * len(images)
        used = {*captions_in, *map(id, images)}
        self.ignored += [self._label(member.name) for member in members if id(member) not in used]

    def _captions(self, members: Sequence[_Member], reference_column: str | None) -> dict[int, list[str]]:
        """Return the captions in .caption, .json and .txt members, by the id() of those that have any, in this order.

        A text is one caption, also of several lines. Of a reference column they are only those in the .json.
        """
        captions_in: dict[int, list[str]] = {}
        for member in sorted(members, key=attrgetter("suffix")):
            captions = None
            if member.text is not None and member.suffix == b"json":
                captions = _captions_in_json(member.text, reference_column)
            elif member.text is not None and reference_column is None and len(member.text) <= MAX_CAPTION_BYTES:
                try:
                    captions = captions_in_text(member.text, by_line=False)
                except UnicodeDecodeError:
                    self.undecodable.append(self._label(member.name))
            if captions:
                captions_in[id(member)] = captions
        return captions_in

    def listing(self, notes: Sequence[str]) -> Listing:
        rows = plan_table(
            [self._label(member.name) for member in self.images],
            [self.tar] * len(self.images),
            offset=[member.offset for member in self.images],
            size=[member.size for member in self.images],
            references=self.references,
        )
        notes = [*notes, undecodable_note(self.undecodable)] if self.undecodable else list(notes)
        return Listing(with_stamp(rows, self.stamp), self.ignored, notes)

    def _label(self, name: bytes) -> str:
        return f"{readable(self.tar)}/{readable(name)}"


def _captions_in_json(text: bytes, reference_column: str | None) -> list[str] | None:
    try:
        values = parse_json(text)
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    names = [reference_column] if reference_column else REFERENCE_NAMES
    return next((captions for name in names if (captions := as_captions(values.get(name)))), None)


class _UnreadableTarError(Exception):
    """A file that cannot be opened, or is not a tar. `size`: its bytes, 0 where not known."""

    def __init__(self, message: str, size: int = 0) -> None:
        super().__init__(message)
        self.size = size


def _members(root: Root, tar: bytes, notes: list[str]) -> Iterator[_Member]:
    """Yield every entry of a tar except directories, and damage. Adds to `notes` where the tar is empty or cut.

    Raises _UnreadableTarError, or SourceError where the store does not answer.
    """
    try:
        with root.open(tar) as stream:
            _refuse_compressed(root, tar, stream.read(8))
            yield from _walk(stream, readable(tar), root.uri(tar), notes)
    except OSError as error:
        message = f"{root.uri(tar)}: cannot be read: {error.strerror or error}"
        if is_transient(error):
            raise SourceError(message) from None
        raise _UnreadableTarError(message) from None


def _walk(stream: BinaryIO, name: str, uri: str, notes: list[str]) -> Iterator[_Member]:
    size = stream.seek(0, os.SEEK_END)
    is_empty, has_end_mark = True, False
    last: _Member | None = None  # held back, because damage may cut it short
    for entry in walk(stream):
        if isinstance(entry, EndMark):
            has_end_mark = True
            continue
        if isinstance(entry, Zeros):
            zeros = f"zeros from byte {entry.start:,} to {entry.end:,}, and members after them"
            notes.append(f"{name}: {zeros}; unless tars were joined there, what images were there is lost")
            continue
        if isinstance(entry, Damage):
            if is_empty and (entry.start, entry.end) == (0, size):
                stream.seek(0)
                is_pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
                raise _UnreadableTarError(
                    f"{uri}: not a tar; {FETCH_LFS if is_pointer else 'repair it or remove it'}", size
                )
            notes.append(f"{name}: damaged from byte {entry.start:,} to {entry.end:,}; what images were there is lost")
            member = _damaged_member(entry, last, size)
            last = None if last is not None and last.offset == member.offset else last
        else:
            member = _member(*entry)
        if last is not None:
            yield last
        is_dir = not isinstance(entry, Damage) and entry[0].isdir()
        is_empty, last = False, None if is_dir else member
    if last is not None:
        yield last
    if not size:
        raise _UnreadableTarError(f"{uri}: not a tar: the file is empty; repair it or remove it")
    if is_empty:
        notes.append(f"{name}: an empty tar: it has no member")
    elif not has_end_mark:
        notes.append(f"{name}: it has no end mark; it may have been cut off")


def _damaged_member(damage: Damage, last: _Member | None, size: int) -> _Member:
    """Return what stands in the plan for bytes without a member: a row that fails, with a negative size.

    Where damage cuts an image short, that is the row of the image; where the tar ends within an image, that row fails
    without help, and the damage is only counted.
    """
    is_after_image = last is not None and last.may_be_image
    if is_after_image and damage.start == damage.end == size:
        return _Member(f"[damaged at byte {size}]".encode(), size, 0, is_file=False)
    name = last.name if last and is_after_image and damage.start == last.offset else None
    name = name or f"[damaged from byte {damage.start}]".encode()
    return _Member(name, damage.start, -max(1, damage.end - damage.start), is_file=False, is_damage=True)


def _member(header: tarfile.TarInfo, archive: tarfile.TarFile) -> _Member:
    name = os.fsencode(header.name)
    is_file = header.isreg() and not header.issparse()
    is_text = is_file and name.lower().endswith((b".txt", b".caption", b".json")) and header.size <= MAX_TEXT_BYTES
    return _Member(name, header.offset_data, header.size, is_file, _text(header, archive) if is_text else None)


def _text(header: tarfile.TarInfo, archive: tarfile.TarFile) -> bytes | None:
    """Return the content of a member; None where the tar ends before it does."""
    try:
        stream = archive.extractfile(header)
        return stream.read() if stream else None
    except tarfile.TarError:
        return None


def _refuse_compressed(root: Root, tar: bytes, start: bytes) -> None:
    if tar.lower().endswith(COMPRESSED_SUFFIXES) or start.startswith(_COMPRESSED_STARTS):
        raise _UnreadableTarError(
            f"{root.uri(tar)}: images inside a compressed tar cannot be read one by one; decompress it first "
            "(it hardly grows: images are compressed already)"
        )
