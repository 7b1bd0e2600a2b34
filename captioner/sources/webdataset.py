"""WebDataset: tars in which files with the same name up to the first dot are one sample. Nothing is unpacked."""

from __future__ import annotations

import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import pyarrow as pa

from captioner.data import Listing, RawImage
from captioner.errors import SourceError
from captioner.sources.columns import REFERENCE_NAMES, as_captions
from captioner.sources.plan_rows import BATCH_ROWS, plan_table
from captioner.sources.reading import read_rows
from captioner.sources.root import Root, file_of_unit, is_hidden, readable, unit_of_file

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
_COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")


@dataclass(frozen=True, slots=True)
class WebDatasetSource:
    """Tars as a source. `tars`: paths under the root, in order; each is one unit."""

    name: str
    root: Root
    tars: tuple[bytes, ...]
    reference_column: str | None = None

    def units(self) -> Sequence[str]:
        return [unit_of_file(tar) for tar in self.tars]

    def kept_fields(self) -> list[pa.Field]:
        return []

    def list_unit(self, unit: str) -> Iterator[Listing]:
        tar = file_of_unit(unit)
        batch = _Batch(tar)
        # The members of a sample follow each other in the tar: the format requires it.
        for _, members in itertools.groupby(_members(self.root, tar), key=attrgetter("key")):
            batch.add_sample(list(members), self.reference_column)
            if len(batch) >= BATCH_ROWS:
                yield batch.listing()
                batch = _Batch(tar)
        if len(batch):
            yield batch.listing()

    def read(self, rows: pa.Table) -> list[RawImage]:
        return read_rows(rows, self.root)


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of a tar. `offset`, `size`: of its data. `text`: content of .txt and .json members."""

    name: bytes
    offset: int
    size: int
    is_file: bool
    text: bytes | None = None

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


@dataclass(slots=True)
class _Batch:
    """The rows of a batch of samples."""

    tar: bytes
    images: list[_Member] = field(default_factory=list)
    references: list[list[str] | None] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images) + len(self.ignored)

    def add_sample(self, members: Sequence[_Member], reference_column: str | None) -> None:
        """Add a row for each image of a sample. Where members have known image suffixes, others are no images."""
        candidates = [member for member in members if member.may_be_image]
        images = [member for member in candidates if member.suffix in IMAGE_SUFFIXES] or candidates
        captions = _captions(members, reference_column) if images else None
        self.images += images
        self.references += [captions] * len(images)
        used = {id(member) for member in members if captions and member.text is not None}
        used.update(map(id, images))
        self.ignored += [self._label(member.name) for member in members if id(member) not in used]

    def listing(self) -> Listing:
        rows = plan_table(
            [self._label(member.name) for member in self.images],
            [self.tar] * len(self.images),
            offset=[member.offset for member in self.images],
            size=[member.size for member in self.images],
            references=self.references,
        )
        return Listing(rows, self.ignored)

    def _label(self, name: bytes) -> str:
        return f"{readable(self.tar)}/{readable(name)}"


def _captions(members: Iterable[_Member], reference_column: str | None) -> list[str] | None:
    """Return the captions of .json, then of .txt, each once; with a reference column, only that key of the .json."""
    captions: list[str] = []
    for member in sorted(members, key=attrgetter("suffix")):  # json, txt
        if member.text is None:
            continue
        if member.suffix == b"json":
            captions += _captions_in_json(member.text, reference_column) or []
        elif reference_column is None:
            captions += as_captions(member.text.decode("utf-8", "replace")) or []
    return list(dict.fromkeys(captions)) or None


def _captions_in_json(text: bytes, reference_column: str | None) -> list[str] | None:
    try:
        values = json.loads(text)
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    names = [reference_column] if reference_column else REFERENCE_NAMES
    return next((captions for name in names if (captions := as_captions(values.get(name)))), None)


def _members(root: Root, tar: bytes) -> Iterator[_Member]:
    """Yield every entry of a tar except directories. A tar that is truncated or damaged ends there.

    Raises SourceError where the file is not a tar at all, or cannot be opened.
    """
    position = 0
    try:
        with root.open(tar) as stream:
            _refuse_compressed(root, tar, stream.read(8))
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                while header := archive.next():
                    position = archive.offset
                    archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                    if not header.isdir():
                        yield _member(header, archive)
    except tarfile.TarError as error:
        if not position:
            raise SourceError(f"{root.uri(tar)}: not a tar: {error}; repair it or remove it") from None
        yield _Member(f"[damaged at byte {position}]".encode(), position, 0, is_file=False)
    except OSError as error:
        raise SourceError(f"{root.uri(tar)}: cannot be read: {error.strerror or error}") from None


def _member(header: tarfile.TarInfo, archive: tarfile.TarFile) -> _Member:
    name = os.fsencode(header.name)
    is_file = header.isreg() and not header.issparse()
    is_text = is_file and name.lower().endswith((b".txt", b".json"))
    stream = archive.extractfile(header) if is_text else None
    return _Member(name, header.offset_data, header.size, is_file, stream.read() if stream else None)


def _refuse_compressed(root: Root, tar: bytes, start: bytes) -> None:
    if tar.lower().endswith(COMPRESSED_SUFFIXES) or start.startswith(_COMPRESSED_STARTS):
        raise SourceError(
            f"{root.uri(tar)}: images inside a compressed tar cannot be read one by one; decompress it first "
            "(it hardly grows: images are compressed already)"
        )
