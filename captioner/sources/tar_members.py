"""Find the members of a tar, past damage and past the end of a tar to which others were joined; and find one again.

Python's tarfile ends without a word at the first header that it cannot read, and at the first end mark.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from captioner.sources.root import readable

BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)
# What every header has: a mark at byte 257 (not the oldest ones), or the usual form of the checksum at byte 148.
_MARKS = re.compile(rb"ustar|[0-7]{6}\0 ")
_MARK_AT, _CHECKSUM_AT = 257, 148
# The longest name that the header itself holds; a longer one, or one that is not ASCII, may be in headers before it.
_PLAIN_NAME = 100

Entry = tuple[tarfile.TarInfo, tarfile.TarFile]


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes of a tar, from `start` to `end`, in which there is no header to read: what members they hold is lost.

    Where it starts with the data of the member before, that member is cut short.
    """

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Zeros:
    """Bytes of zeros, from `start` to `end`, between members, which are not the end of a tar with whole records.

    They are between tars that were joined, if those were written by a program that does not fill the last record; or
    they are in the place of members.
    """

    start: int
    end: int


class EndMark:
    """The end of a tar that has the mark for it: a block of zeros."""


def walk(stream: BinaryIO) -> Iterator[Entry | Damage | Zeros | EndMark]:
    """Yield every member of a tar with the open tar, damage between them, and an EndMark last where there is one.

    After damage it goes on with the next header that has a right checksum, at whatever byte. Members of tars that
    were joined are members like others.
    """
    size = stream.seek(0, os.SEEK_END)
    position = tar_start = 0
    while True:
        data_start, end = position, position
        for entry, archive in _members_from(stream, position):
            data_start, end = entry.offset_data, archive.offset
            yield entry, archive
        following = _first_data(stream, end, size)
        if following is None and end <= size:
            if hidden := _hidden_header(stream, data_start, end, size):
                yield Damage(data_start, hidden)
                position = hidden
                continue
            if end < size:
                yield EndMark()
            return
        if following is not None and following > end and _is_header(stream, following):
            if (following - tar_start) % tarfile.RECORDSIZE:
                yield Zeros(end, following)
            position = tar_start = following  # of a tar that was joined to this one
            continue
        # Bytes that were cut out may have put the next header inside the data of the last member.
        header = _next_header(stream, data_start, size)
        if header == end:  # it is right, and what has to follow it is not there
            header = _next_header(stream, end + 1, size)
        if header is not None and header < end:
            yield Damage(data_start, header)
        else:
            yield Damage(min(end, size), size if header is None else header)
        if header is None:
            return
        position = header


def _hidden_header(stream: BinaryIO, start: int, end: int, size: int) -> int | None:
    """Return where a header begins inside the data of the last member; None where there is none.

    Bytes that were cut out of a tar put the next members there, and its end among the zeros. A tar from which nothing
    was cut has whole records, as most programs write them, and is not searched; nor is a member that is a tar itself.
    """
    if size % tarfile.RECORDSIZE == 0 or _is_header(stream, start):
        return None
    header = _next_header(stream, start, end)
    return header if header is not None and header < end else None


def _members_from(stream: BinaryIO, position: int) -> Iterator[Entry]:
    """Yield the members from a header on; `offset` of the tar is then the byte after a member.

    Ends where something else than a header is.
    """
    stream.seek(position)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            while (member := archive.next()) and archive.offset > member.offset:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                yield member, archive
    except (tarfile.TarError, ValueError, OverflowError):
        pass  # what is here, the caller finds out


def _first_data(stream: BinaryIO, position: int, size: int) -> int | None:
    """Return the first block from `position` on that is not all zeros; None where there is none."""
    while position < size:
        stream.seek(position)
        chunk = stream.read(_CHUNK)
        if not chunk:
            return None
        if chunk != _ZEROS[: len(chunk)]:
            first = len(chunk) - len(chunk.lstrip(b"\0"))
            return position + first // BLOCK * BLOCK
        position += len(chunk)
    return None


def _is_header(stream: BinaryIO, position: int) -> bool:
    stream.seek(position)
    return _parsed(stream.read(BLOCK)) is not None


def _next_header(stream: BinaryIO, start: int, size: int) -> int | None:
    """Return the first byte from `start` on where a header with a right checksum begins."""
    position = start
    while position + BLOCK <= size:
        stream.seek(position)
        chunk = stream.read(_CHUNK + BLOCK)
        for mark in _MARKS.finditer(chunk):
            first = mark.start() - (_MARK_AT if mark[0] == b"ustar" else _CHECKSUM_AT)
            if 0 <= first < _CHUNK and _parsed(chunk[first : first + BLOCK]):
                return position + first
        position += _CHUNK
    return None


def _parsed(block: bytes) -> tarfile.TarInfo | None:
    """Return a header, or None where the block does not hold one: too short, all zeros, a wrong checksum."""
    try:
        return tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except (tarfile.TarError, ValueError):
        return None


def header_room(name: str, offset: int) -> int:
    """Return how many bytes before a member's data hold its headers. Of a long name they are in several blocks."""
    if len(name) <= _PLAIN_NAME and name.isascii():
        return min(BLOCK, offset)
    blocks = 6 + 2 * len(name.encode()) // BLOCK  # a name may be there twice, beside times and owners
    return min(blocks * BLOCK, offset)


def is_member(headers: bytes, name: str, size: int) -> bool:
    """Return whether the headers just before some data say that it is the member of that name and size."""
    header = _parsed(headers[-BLOCK:])
    if header and header.size == size and _name_of(header) == name:
        return True
    starts = range(len(headers) - 2 * BLOCK, -1, -BLOCK) if header else ()
    return any(_says(headers[start:], name, size) for start in starts)


def _says(headers: bytes, name: str, size: int) -> bool:
    """Return whether headers of several blocks, as long names have them, are of the member."""
    try:
        with tarfile.open(fileobj=io.BytesIO(headers), mode="r:") as archive:
            member = archive.next()
    except (tarfile.TarError, ValueError):
        return False
    return member is not None and (member.offset_data, member.size, _name_of(member)) == (len(headers), size, name)


def _name_of(member: tarfile.TarInfo) -> str:
    return readable(os.fsencode(member.name))
