"""XMP inside the pictures, put there by ExifTool: always into copies, never into the archive."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from captioner.config import ExportConfig
from captioner.data import RawImage
from captioner.errors import UsageError
from captioner.publishing.exports.context import Export
from captioner.publishing.exports.destination import inside, new_folder, write_new
from captioner.publishing.exports.suffixes import free_name, with_own_suffix
from captioner.publishing.exports.xmp import merged
from captioner.publishing.exports.xmp_packet import XmpError

_ANSWERED = b"{ready}"


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """DEST gets a copy of each picture with its text inside; what XMP the picture had is kept. One that cannot be
    read, that ExifTool cannot write or whose C2PA signature would break is left out and named.

    Raises UsageError where ExifTool is not installed.
    """
    with ExifTool() as exiftool, new_folder(export.dest, export.record) as folder:
        for table in texts:
            for row, raw in export.pictures.read(table):
                try:
                    _write_copy(folder, row, raw, exiftool, export.settings)
                except XmpError as error:
                    export.tally.leave_out(row, str(error))


def _write_copy(folder: Path, row: dict[str, Any], raw: RawImage, exiftool: ExifTool, settings: ExportConfig) -> None:
    if raw.data is None:
        raise XmpError(f"picture cannot be read: {raw.error_code}")
    if is_signed(raw.data) and not settings.allow_c2pa:
        raise XmpError("it has a C2PA signature, which embedding breaks (--allow-c2pa)")
    path = free_name(folder, with_own_suffix(inside(row["image_id"]), raw.data))
    write_new(path, raw.data)
    try:
        exiftool.replace_xmp(path, merged(exiftool.read_xmp(path), row, settings.automatic_mark, update=True))
    except XmpError:
        path.unlink()
        raise


def is_signed(data: bytes) -> bool:
    """Whether the file holds a C2PA manifest (a JUMBF box labelled c2pa)."""
    return b"jumb" in data and b"c2pa" in data


class ExifTool:
    """One ExifTool process for many files (its -stay_open mode)."""

    def __init__(self) -> None:
        program = shutil.which("exiftool")
        if program is None:
            raise UsageError(
                "--embed needs ExifTool; install it (Debian: libimage-exiftool-perl), or leave --embed out"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="captioner-xmp-")
        self._warnings = (Path(self._folder.name) / "warnings").open("a+b")
        command = [program, "-stay_open", "True", "-@", "-"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._warnings)

    def __enter__(self) -> ExifTool:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(b"-stay_open\nFalse\n")
        self._warnings.close()
        self._folder.cleanup()

    def read_xmp(self, path: Path) -> bytes | None:
        """The XMP packet inside a file, None where it has none."""
        return self._ask("-b", "-XMP", str(path)).strip() or None

    def replace_xmp(self, path: Path, packet: bytes) -> None:
        """Raises XmpError with what ExifTool says where it does not write the file."""
        source = Path(self._folder.name) / "new.xmp"
        source.write_bytes(packet)
        self._warnings.truncate(0)
        if b"1 image files updated" not in self._ask("-overwrite_original", f"-XMP<={source}", str(path)):
            self._warnings.seek(0)
            said = self._warnings.read().decode(errors="replace").replace(f" - {path}", "")
            raise XmpError(f"ExifTool: {' '.join(said.split())[:200]}")

    def _ask(self, *arguments: str) -> bytes:
        """What ExifTool says to one command."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write("\n".join([*arguments, "-execute", ""]).encode())
        stdin.flush()
        said = b""
        while not said.rstrip().endswith(_ANSWERED):
            line = stdout.readline()
            if not line:
                raise UsageError("ExifTool ended unexpectedly; try its installation: exiftool -ver")
            said += line
        return said.rstrip().removesuffix(_ANSWERED)
