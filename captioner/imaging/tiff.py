"""The directories of a TIFF: its pages, and smaller copies of them. TIFF 6.0 and BigTIFF.

A TIFF is a chain of directories, each with the size, the settings and the offsets of the pixels of one image. Only
the directories are read here; Pillow decodes the pixels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_DIRECTORIES = 65_535
SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")

_SUBFILE, _WIDTH, _HEIGHT, _COMPRESSION, _ORIENTATION, _PROFILE = 254, 256, 257, 259, 274, 34675
_OFFSETS = {273: 279, 324: 325}  # offsets of strips or tiles -> their lengths
_SUB_DIRECTORIES, _POINTERS = 330, (330, 34665, 34853, 40965)  # pointers: tags that hold offsets of directories
_OLD_JPEG = 6
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}

Read = Callable[[int, int], bytes]  # (offset, size) -> the bytes there, fewer at the end of the file


@dataclass(frozen=True, slots=True)
class _Layout:
    """How numbers are stored: byte order, and whether the file is a BigTIFF."""

    order: str
    big: bool

    @property
    def entry_bytes(self) -> int:
        return 20 if self.big else 12

    @property
    def pointer(self) -> str:
        return self.order + ("Q" if self.big else "I")

    @property
    def pointer_bytes(self) -> int:
        return 8 if self.big else 4

    @property
    def count(self) -> str:
        return self.order + ("Q" if self.big else "H")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tag of a directory, with its values as stored in the file."""

    tag: int
    type: int
    count: int
    value: bytes

    def integers(self, layout: _Layout) -> tuple[int, ...]:
        code = _INTEGERS.get(self.type)
        return struct.unpack(f"{layout.order}{self.count}{code}", self.value) if code else ()


@dataclass(frozen=True, slots=True)
class TiffDirectory:
    """One image of a TIFF.

    `reduced`: a smaller copy of another, or a mask. `children`: offsets of its sub-directories, mostly smaller copies.
    A directory that cannot be read has no size.
    """

    offset: int
    width: int = 0
    height: int = 0
    reduced: bool = False
    mask: bool = False
    children: tuple[int, ...] = ()


def page_offsets(read: Read) -> list[int]:
    """Return the offset of each page's directory, in order, without smaller copies and masks.

    Empty where the file is not a TIFF. A broken chain ends with the invalid offset: that page will fail to decode.
    """
    chain = []
    for directory in _chain(read):
        chain.append(directory)
        if len(chain) > MAX_DIRECTORIES:
            return []
    return [directory.offset for directory in chain if not directory.reduced and not directory.mask]


def find_overview(data: bytes, needed_side: int) -> TiffDirectory | None:
    """Return the smallest copy of the first page whose sides are both >= needed_side; None where there is none."""

    def read(offset: int, size: int) -> bytes:
        return data[offset : offset + size]

    layout, chain = _layout(read), _chain(read)
    first = next(chain, None)
    if layout is None or first is None:
        return None
    copies = [_directory(read, layout, offset) for offset in first.children[:MAX_DIRECTORIES]]
    for directory in chain:
        if not directory.reduced:
            break
        copies.append(directory)
    overviews = [copy for copy in copies if copy.reduced and not copy.mask and _same_shape(copy, first)]
    return min(
        (copy for copy in overviews if needed_side <= min(copy.width, copy.height) and copy.width < first.width),
        key=lambda copy: copy.width,
        default=None,
    )


def extract(data: bytes, offset: int, like_first: bool = False) -> bytes:
    """Return the image of one directory as a new TIFF file.

    `like_first`: take orientation and colour profile of the first page where it has none. Raises ValueError where the
    directory cannot be read.
    """

    def read(start: int, size: int) -> bytes:
        return data[start : start + size]

    layout = _layout(read)
    if layout is None:
        raise ValueError("no TIFF header")
    entries = {entry.tag: entry for entry in _entries(read, layout, offset) if entry.tag not in _POINTERS}
    if _COMPRESSION in entries and entries[_COMPRESSION].integers(layout) == (_OLD_JPEG,):
        return _starting_at(data, layout, offset)  # such files store the offsets of pixels in other tags
    if like_first:
        first = {entry.tag: entry for entry in _entries(read, layout, _first_offset(read, layout))}
        entries = {tag: first[tag] for tag in (_ORIENTATION, _PROFILE) if tag in first} | entries
    return _to_bytes(entries, layout, read)


def _to_bytes(entries: dict[int, _Entry], layout: _Layout, read: Read) -> bytes:
    """Return a file with one directory: header, pixels, values, directory."""
    out = bytearray(_header(layout, 0))
    for offsets, lengths in _OFFSETS.items():
        if offsets in entries and lengths in entries:
            pairs = zip(entries[offsets].integers(layout), entries[lengths].integers(layout), strict=False)
            moved = []
            for start, size in pairs:
                moved.append(len(out))
                out += read(start, size)
            kind = 16 if layout.big else 4
            packed = struct.pack(f"{layout.order}{len(moved)}{_INTEGERS[kind]}", *moved)
            entries[offsets] = _Entry(offsets, kind, len(moved), packed)
    fields = []
    for tag in sorted(entries):
        entry, size = entries[tag], layout.pointer_bytes
        value = entry.value
        if len(value) > size:
            out += b"\0" * (len(out) % 2)
            value = struct.pack(layout.pointer, len(out))
            out += entry.value
        head = struct.pack(layout.order + ("HHQ" if layout.big else "HHI"), tag, entry.type, entry.count)
        fields.append(head + value.ljust(size, b"\0"))
    out += b"\0" * (len(out) % 2)
    header = _header(layout, len(out))
    out[: len(header)] = header
    return bytes(out + struct.pack(layout.count, len(fields)) + b"".join(fields) + b"\0" * layout.pointer_bytes)


def _starting_at(data: bytes, layout: _Layout, offset: int) -> bytes:
    header = _header(layout, offset)
    return header + data[len(header) :]


def _header(layout: _Layout, first: int) -> bytes:
    mark = b"II" if layout.order == "<" else b"MM"
    if layout.big:
        return mark + struct.pack(f"{layout.order}HHHQ", 43, 8, 0, first)
    return mark + struct.pack(f"{layout.order}HI", 42, first)


def _layout(read: Read) -> _Layout | None:
    start = read(0, 4)
    for mark, order in ((b"II", "<"), (b"MM", ">")):
        for number, big in ((42, False), (43, True)):
            if start == mark + struct.pack(f"{order}H", number):
                return _Layout(order, big)
    return None


def _first_offset(read: Read, layout: _Layout) -> int:
    return _pointer(read, layout, 8 if layout.big else 4)


def _pointer(read: Read, layout: _Layout, offset: int) -> int:
    data = read(offset, layout.pointer_bytes)
    return struct.unpack(layout.pointer, data)[0] if len(data) == layout.pointer_bytes else 0


def _chain(read: Read) -> Iterator[TiffDirectory]:
    """Yield the directories of a file, first to last, up to one that comes a second time."""
    layout = _layout(read)
    offset = _first_offset(read, layout) if layout else 0
    seen: set[int] = set()
    while layout and offset and offset not in seen:
        seen.add(offset)
        directory = _directory(read, layout, offset)
        yield directory
        if not directory.width:
            return
        offset = _pointer(read, layout, _end_of(read, layout, offset))


def _end_of(read: Read, layout: _Layout, offset: int) -> int:
    size = struct.calcsize(layout.count)
    (count,) = struct.unpack(layout.count, read(offset, size))
    return int(offset + size + count * layout.entry_bytes)


def _directory(read: Read, layout: _Layout, offset: int) -> TiffDirectory:
    tags = (_SUBFILE, _WIDTH, _HEIGHT, _SUB_DIRECTORIES)
    try:
        values = {entry.tag: entry.integers(layout) for entry in _entries(read, layout, offset, tags)}
        width, height = values[_WIDTH][0], values[_HEIGHT][0]
    except (ValueError, KeyError, IndexError, struct.error):
        return TiffDirectory(offset)
    kind = (values.get(_SUBFILE) or (0,))[0]
    children = values.get(_SUB_DIRECTORIES, ())
    return TiffDirectory(offset, width, height, bool(kind & _REDUCED), bool(kind & _MASK), children)


def _entries(read: Read, layout: _Layout, offset: int, tags: tuple[int, ...] = ()) -> Iterator[_Entry]:
    """Yield the tags of a directory, only `tags` if given. Raises ValueError where the file is cut off."""
    size = struct.calcsize(layout.count)
    start = read(offset, size)
    if len(start) < size:
        raise ValueError(f"no directory at byte {offset}")
    (count,) = struct.unpack(layout.count, start)
    table = read(offset + size, min(count, MAX_DIRECTORIES) * layout.entry_bytes)
    if len(table) < count * layout.entry_bytes:
        raise ValueError(f"the directory at byte {offset} is cut off")
    for position in range(0, len(table), layout.entry_bytes):
        tag, kind, number = struct.unpack_from(layout.order + ("HHQ" if layout.big else "HHI"), table, position)
        if kind not in _TYPE_BYTES or (tags and tag not in tags):
            continue
        if tags and number > MAX_DIRECTORIES:  # none of those holds that much
            raise ValueError(f"tag {tag} of the directory at byte {offset} has {number:,} values")
        length = number * _TYPE_BYTES[kind]
        value = table[position + layout.entry_bytes - layout.pointer_bytes : position + layout.entry_bytes]
        if length > layout.pointer_bytes:
            value = read(struct.unpack(layout.pointer, value)[0], length)
        if len(value) < length:
            raise ValueError(f"tag {tag} of the directory at byte {offset} is cut off")
        yield _Entry(tag, kind, number, value[:length])


def _same_shape(copy: TiffDirectory, whole: TiffDirectory) -> bool:
    """Return whether both sides are shrunk by the same factor, except for rounding."""
    return copy.width > 0 and abs(copy.height - whole.height * copy.width / whole.width) <= 2
