"""Export copies of the images with XMP embedded by ExifTool; the originals are never changed."""

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
from captioner.publishing.exports.destination import new_folder, relative_path, write_new
from captioner.publishing.exports.suffixes import unused_path, with_format_suffix
from captioner.publishing.exports.xmp import merge_text
from captioner.publishing.exports.xmp_packet import XmpError

_READY = b"{ready}"


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """Write a copy of each image to DEST with its text in the XMP; XMP that the image already had is kept.

    Images that cannot be read, that ExifTool cannot write or whose C2PA signature would break are left out and
    reported. Raises UsageError when ExifTool is not installed.
    """
    with ExifTool() as exiftool, new_folder(export.dest, export.record) as folder:
        for table in texts:
            for row, raw in export.originals.read(table):
                try:
                    _write_copy(folder, row, raw, exiftool, export.settings)
                except XmpError as error:
                    export.tally.leave_out(row, str(error))


def _write_copy(folder: Path, row: dict[str, Any], raw: RawImage, exiftool: ExifTool, settings: ExportConfig) -> None:
    if raw.data is None:
        raise XmpError(f"image cannot be read: {raw.error_code}")
    if is_signed(raw.data) and not settings.allow_c2pa:
        raise XmpError("it has a C2PA signature, which embedding breaks (--allow-c2pa)")
    path = unused_path(folder, with_format_suffix(relative_path(row["image_id"]), raw.data))
    write_new(path, raw.data)
    try:
        exiftool.replace_xmp(path, merge_text(exiftool.read_xmp(path), row, settings.automatic_mark, update=True))
    except XmpError:
        path.unlink()
        raise


def is_signed(data: bytes) -> bool:
    """Return whether the file holds a C2PA manifest (a JUMBF box labelled c2pa)."""
    return b"jumb" in data and b"c2pa" in data


class ExifTool:
    """A context manager around one ExifTool process that handles many files (its -stay_open mode)."""

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
        """Return the XMP packet inside a file, or None."""
        return self._run("-b", "-XMP", str(path)).strip() or None

    def replace_xmp(self, path: Path, packet: bytes) -> None:
        """Replace the XMP packet inside a file. Raises XmpError with ExifTool's message when it cannot."""
        source = Path(self._folder.name) / "new.xmp"
        source.write_bytes(packet)
        self._warnings.truncate(0)
        if b"1 image files updated" not in self._run("-overwrite_original", f"-XMP<={source}", str(path)):
            self._warnings.seek(0)
            message = self._warnings.read().decode(errors="replace").replace(f" - {path}", "")
            raise XmpError(f"ExifTool: {' '.join(message.split())[:200]}")

    def _run(self, *arguments: str) -> bytes:
        """Run one command and return ExifTool's output."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write("\n".join([*arguments, "-execute", ""]).encode())
        stdin.flush()
        output = b""
        while not output.rstrip().endswith(_READY):
            line = stdout.readline()
            if not line:
                raise UsageError("ExifTool ended unexpectedly; try its installation: exiftool -ver")
            output += line
        return output.rstrip().removesuffix(_READY)
