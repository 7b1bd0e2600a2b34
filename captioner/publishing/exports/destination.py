"""Write exports atomically: a new file or folder appears only when it is complete, and no name leads out of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from captioner.errors import OutputError, UsageError
from captioner.files import is_uri, local_path

RECORD = ".captioner-export.json"  # marks an exported folder and says what it holds, so that --update may replace it
_MAX_NAME_BYTES = 200


def open_destination(dest: str, update: bool) -> Path:
    """Return DEST as a path. Raises UsageError or OutputError when it cannot be written or exists already."""
    if not dest:
        raise UsageError("no DEST given; give the file or folder to write")
    if is_uri(dest):
        raise UsageError(f"{dest}: exports are written to a local disk; give a local DEST and copy it")
    path = Path(local_path(dest))
    if _previous(path).exists() and not path.exists():
        os.rename(_previous(path), path)  # an update was killed after it moved the old folder away
    if path.exists() and not update:
        raise OutputError(f"{dest} exists already; give another DEST, or --update to refresh an earlier export")
    return path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write, which replaces `path` at the end of the block."""
    partial = _partial(path)
    with _output_errors(path):
        if path.is_dir():
            raise OutputError(f"{path} is a folder; this export is a file, give another DEST")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _sync(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(path: Path, record: dict[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder to fill, which replaces `path` at the end of the block.

    Raises OutputError when `path` exists and is not an earlier export of the same format.
    """
    partial, previous = _partial(path), _previous(path)
    with _output_errors(path):
        require_export(path, record["to"])
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
            if path.exists():
                os.rename(path, previous)
            os.rename(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(previous, ignore_errors=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.captioner-partial")


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.captioner-old")


def require_export(path: Path, export_format: str) -> None:
    """Raise OutputError when `path` exists and is not an earlier export of that format."""
    if not path.exists():
        return
    try:
        existing = json.loads((path / RECORD).read_text())["to"]
    except (OSError, ValueError, KeyError):
        raise OutputError(f"{path} is not an earlier export (no {RECORD}); give another DEST") from None
    if existing != export_format:
        raise OutputError(f"{path} is an export to {existing}, not to {export_format}; give another DEST")


def replace_file(path: Path, data: bytes) -> None:
    """Create or atomically replace one file in a folder that others use; an existing file's mode is kept."""
    partial = _partial(path)
    with _output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            if path.exists():
                shutil.copymode(path, partial)
            _sync(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_new(path: Path, data: bytes) -> None:
    """Write a file into a folder that is still temporary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def relative_path(image_id: str) -> Path:
    """Return an image id as a relative path without ".." and with names that file systems accept."""
    parts = [part for part in re.split(r"[/\\]", image_id) if part not in ("", ".")]
    return Path(*(_file_name(part) for part in parts or ["_"]))


def _file_name(part: str) -> str:
    safe = re.sub(r'[\x00-\x1f\x7f:*?"<>|\ud800-\udfff]', "_", part)
    if safe.strip(". ") and safe == part and len(safe.encode()) <= _MAX_NAME_BYTES and not safe.startswith("."):
        return safe
    stem, suffix = os.path.splitext(safe.lstrip(". ") or "_")
    kept = stem.encode()[: _MAX_NAME_BYTES - 40].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(part.encode(errors='surrogateescape')).hexdigest()[:8]}{suffix[:16]}"


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    """Turn every OSError into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; fix it, then run again") from error


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
