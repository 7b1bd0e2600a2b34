"""Where an export goes: a file or a folder that is there whole or not at all, and names inside it that stay inside."""

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

RECORD = ".captioner-export.json"  # in an exported folder: what it holds, and that it may be refreshed
_MAX_NAME_BYTES = 200


def open_destination(dest: str, update: bool) -> Path:
    """DEST as a path. Raises UsageError or OutputError where nothing can be written there, or something is."""
    if not dest:
        raise UsageError("no DEST given; name the file or folder to write")
    if is_uri(dest):
        raise UsageError(f"{dest}: exports are written to a local disk; copy them from there")
    path = Path(local_path(dest))
    if _old(path).exists() and not path.exists():
        os.rename(_old(path), path)  # a refresh was killed between taking the old folder away and putting the new one
    if path.exists() and not update:
        raise OutputError(f"{dest} is there already; give another DEST, or --update to refresh an earlier export")
    return path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes its place when everything is in it."""
    partial = _partial(path)
    with _telling(path):
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
    """A folder to fill, which takes its place when everything is in it; an earlier export there goes then.

    Raises OutputError where something else is there.
    """
    partial, old = _partial(path), _old(path)
    with _telling(path):
        require_export(path, record["to"])
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
            if path.exists():
                os.rename(path, old)
            os.rename(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.captioner-partial")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.captioner-old")


def require_export(path: Path, form: str) -> None:
    """Raise OutputError where `path` is there and no earlier export of that form."""
    if not path.exists():
        return
    try:
        found = json.loads((path / RECORD).read_text())["to"]
    except (OSError, ValueError, KeyError):
        raise OutputError(f"{path} is no earlier export (no {RECORD}); give another DEST") from None
    if found != form:
        raise OutputError(f"{path} is an export to {found}, not to {form}; give another DEST")


def put(path: Path, data: bytes) -> None:
    """Replace one file of a folder that others use, or make it; atomically, its mode kept."""
    partial = _partial(path)
    with _telling(path):
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
    """Write a file into a folder that is not in its place yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def inside(image_id: str) -> Path:
    """An image id as a relative path without ".." or other ways out, and with names that a disk takes."""
    parts = [part for part in re.split(r"[/\\]", image_id) if part not in ("", ".")]
    return Path(*(_file_name(part) for part in parts or ["_"]))


def _file_name(part: str) -> str:
    plain = re.sub(r'[\x00-\x1f\x7f:*?"<>|\ud800-\udfff]', "_", part)
    if plain.strip(". ") and plain == part and len(plain.encode()) <= _MAX_NAME_BYTES and not plain.startswith("."):
        return plain
    stem, suffix = os.path.splitext(plain.lstrip(". ") or "_")
    kept = stem.encode()[: _MAX_NAME_BYTES - 40].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(part.encode(errors='surrogateescape')).hexdigest()[:8]}{suffix[:16]}"


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; mend it and run again") from error


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
