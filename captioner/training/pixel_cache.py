"""Fitted pixels of images on the disk of each node, so that an image is decoded once and not in each epoch.

    FOLDER/<sha256>-<fitting>   the pixels of one image, after a header with their size and checksum
    FOLDER/used                 the number of bytes in the folder

FOLDER is in the folder for temporary files, readable by its user only, and has the name of the run.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import tempfile
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from captioner.data import PixelSpec
from captioner.models.ref import PREPROCESSING_VERSION

_HEADER = struct.Struct("<4sIIIQ")  # magic, height, width, crc32 of the pixels, bytes of the file
_MAGIC = b"CPX1"
_USED = "used"
_USED_DIGITS = 20  # of the number in it, with leading zeros
_STALE_S = 24 * 3600  # after which the folder of another run is removed
_LEFT_FREE = 1 << 30  # bytes of the disk that others may need


@dataclass(frozen=True)
class PixelCache:
    """Keeps pixels until they take `limit` bytes on a node. Picklable.

    Later images are not kept: where every image is read once in each epoch, the first ones are as good as the last.
    `run`: the name of the run. Errors of the disk and damaged files are not errors: the image is decoded.
    """

    run: str
    limit: int

    def read(self, sha256: str, spec: PixelSpec) -> npt.NDArray[np.uint8] | None:
        """Return the pixels of an image, uint8 [height, width, 3], read-only; None where they are not kept."""
        try:
            data = (self.folder / _name(sha256, spec)).read_bytes()
            magic, height, width, checksum, size = _HEADER.unpack_from(data)
        except (OSError, struct.error):
            return None
        pixels = memoryview(data)[_HEADER.size :]
        is_whole = magic == _MAGIC and size == len(data) and len(pixels) == height * width * 3
        if not is_whole or zlib.crc32(data[:12] + data[16 : _HEADER.size], zlib.crc32(pixels)) != checksum:
            return None
        return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)

    def write(self, sha256: str, spec: PixelSpec, pixels: npt.NDArray[np.uint8]) -> None:
        """Keep the pixels of an image, uint8 [height, width, 3], if there is room for them."""
        name, values = _name(sha256, spec), np.ascontiguousarray(pixels).tobytes()
        size = _HEADER.size + len(values)
        with suppress(OSError):
            if not self.folder.exists():
                _remove_stale()
            if not _is_ours(self.folder):
                return
            exists = (self.folder / name).exists()  # damaged, since it was not read
            if not exists and not self._reserve(size):
                return
            header = _HEADER.pack(_MAGIC, *pixels.shape[:2], 0, size)
            checksum = zlib.crc32(header[:12] + header[16:], zlib.crc32(values))
            part = self.folder / f".{name}.{os.getpid()}"
            part.write_bytes(_HEADER.pack(_MAGIC, *pixels.shape[:2], checksum, size) + values)
            os.replace(part, self.folder / name)

    def remove(self) -> None:
        """Remove the folder of the run on this node."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def folder(self) -> Path:
        return _parent() / self.run

    def _reserve(self, size: int) -> bool:
        """Add `size` to the bytes in use, and return True, where the limit and the disk allow it."""
        descriptor = os.open(self.folder / _USED, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, _USED_DIGITS + 1, 0)
            used = int(text) if len(text) == _USED_DIGITS and text.isdigit() else self._bytes_in_folder()
            if used + size > self.limit or shutil.disk_usage(self.folder).free < size + _LEFT_FREE:
                return False
            os.pwrite(descriptor, b"%0*d" % (_USED_DIGITS, used + size), 0)  # one call, so never half a number
            os.ftruncate(descriptor, _USED_DIGITS)
            return True
        finally:
            os.close(descriptor)

    def _bytes_in_folder(self) -> int:
        """Return the bytes of all entries, for a number that is missing or damaged."""
        return sum(entry.stat().st_size for entry in os.scandir(self.folder) if entry.name != _USED)


def _parent() -> Path:
    return Path(tempfile.gettempdir()) / f"captioner-pixels-{os.getuid()}"


def _remove_stale() -> None:
    """Remove the folders of runs that wrote nothing for a day: those that were killed, or ended on another node."""
    for file in _parent().glob(f"*/{_USED}"):
        if time.time() - file.stat().st_mtime > _STALE_S:
            shutil.rmtree(file.parent, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Make the folder where it is missing; return whether only this user can write to it."""
    for path in (folder.parent, folder):
        path.mkdir(mode=0o700, exist_ok=True)
    status = os.lstat(folder.parent)
    return status.st_uid == os.getuid() and not status.st_mode & 0o077 and not folder.parent.is_symlink()


def _name(sha256: str, spec: PixelSpec) -> str:
    fitting = blake2b(f"{PREPROCESSING_VERSION} {spec!r}".encode(), digest_size=8).hexdigest()
    return f"{sha256}-{fitting}"
