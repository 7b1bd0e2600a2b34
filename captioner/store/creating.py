"""Create a table, also in place of another one, which is kept until the new one is complete.

With --overwrite the new table is made in OUT/overwrite: listed, and bound to its model. What can fail has then
happened. `put_in_place` writes OUT/overwrite.json, deletes the old table and copies the new one to its place. A start
that was killed before that mark has changed nothing; after it, the next start does all of that again.
"""

from __future__ import annotations

import posixpath
import uuid
from typing import Any

import pyarrow as pa

from captioner.errors import OutputError
from captioner.store.directory import Directory
from captioner.store.table import (
    REFERENCES_FILE,
    RUN_FILE,
    SCHEMA_VERSION,
    TABLE_FILE,
    CaptionsTable,
    as_hex,
    plan_name,
)

_OVERWRITE_FILE, _NEW_FOLDER = "overwrite.json", "overwrite"
# What a run writes, and commands about its captions. Not the decisions of reviewers (reviews/): no flag deletes those.
_OWN_FOLDERS = ("plan", "chunks", "captions", "history", "runs", "checks", "report", "alt_text")
_OWN_FILES = (TABLE_FILE, RUN_FILE, REFERENCES_FILE)


def table_exists(location: str) -> bool:
    """Return whether OUT holds a table; after an overwrite that was interrupted it does not.

    Raises OutputError where OUT cannot be read.
    """
    directory = Directory(location)
    return directory.exists(TABLE_FILE) and not directory.exists(_OVERWRITE_FILE)


def create_table(
    location: str,
    source: dict[str, Any],
    kept_fields: list[pa.Field],
    overwrite: bool = False,
    rows_per_file: int | None = None,
) -> CaptionsTable:
    """Create an empty table.

    `source`, `rows_per_file`: the settings it is made with, which later starts are compared with. With `overwrite` it
    does not touch a table that is there, until `put_in_place`. Raises OutputError where OUT holds something else.
    """
    directory = Directory(location)
    cut_off = directory.exists(_OVERWRITE_FILE)  # an overwrite by an earlier version, which deleted first
    if cut_off:
        _delete_table(directory)
    elif overwrite and directory.exists(TABLE_FILE):
        directory.delete_folder(_NEW_FOLDER)
        directory = Directory(location, _NEW_FOLDER)
    elif overwrite and not directory.is_empty():
        raise OutputError(f"{location} is not a captions table; --overwrite will not delete it, give another OUT")
    elif not directory.is_empty():
        raise OutputError(
            f"{location} is not empty and holds no captions table; give another OUT (SOURCE stands before OUT)"
        )
    info = {
        "schema_version": SCHEMA_VERSION,
        # Chunks are written below this id: a writer of an overwritten table cannot reach the new one.
        "table_id": uuid.uuid4().hex[:12],
        "source": source,
        "rows_per_file": rows_per_file,
        "kept_schema": as_hex(kept_fields),
        "fingerprint": None,
        "model": None,
        "models": {},
        "chunk_format": "arrow",
        "checksums": True,  # every file is written with one: one without was damaged
    }
    directory.write_json(TABLE_FILE, info)
    if cut_off:
        directory.delete(_OVERWRITE_FILE)
    return CaptionsTable(directory, info)


def is_in_place(table: CaptionsTable) -> bool:
    """Return whether a table lies in OUT itself, and not beside the one that it is to replace."""
    return not table.directory.folder


def put_in_place(table: CaptionsTable) -> CaptionsTable:
    """Replace the old table in OUT by a new one with a complete plan; return the table, now in OUT."""
    if is_in_place(table):
        return table
    directory = Directory(table.directory.location)
    directory.write_json(_OVERWRITE_FILE, {"overwriting": True})
    _replace_table(directory)
    return CaptionsTable(directory, table.info)


def complete_overwrite(location: str) -> None:
    """Complete an overwrite that was killed while it replaced the table; forget one that was killed before that."""
    directory, new = Directory(location), Directory(location, _NEW_FOLDER)
    if directory.exists(_OVERWRITE_FILE):
        if new.exists(TABLE_FILE):
            _replace_table(directory)
    elif not new.is_empty():
        directory.delete_folder(_NEW_FOLDER)


def discard_new_table(table: CaptionsTable) -> None:
    """Leave OUT as it was before a start that planned nothing: with its old table, or free for any source."""
    directory = table.directory
    if not is_in_place(table):
        Directory(directory.location).delete_folder(_NEW_FOLDER)
        return
    is_planned = any(
        directory.exists(plan_name(number)) or table.parts_in_folder(number) for number in table.generations()
    )
    if is_planned or table.published_parts():
        return
    _delete_table(directory, besides=(TABLE_FILE,))
    if directory.is_empty(besides=(TABLE_FILE,)):
        directory.delete(TABLE_FILE)


def _replace_table(directory: Directory) -> None:
    """Delete the old table and copy the new one to its place, table.json last. May be repeated until it has ended."""
    new = Directory(directory.location, _NEW_FOLDER)
    _delete_table(directory)
    for folder in new.list_folders("plan"):
        names = [f"plan/{folder}/{name}" for name in new.list_names(f"plan/{folder}")]
        # A plan's record is newer than its parts: that is how a start knows them unchanged.
        for name in sorted(names, key=lambda name: posixpath.basename(name) == "plan.json"):
            directory.write_bytes(name, new.read_bytes(name))
    directory.write_bytes(TABLE_FILE, new.read_bytes(TABLE_FILE))
    directory.delete(_OVERWRITE_FILE)
    directory.delete_folder(_NEW_FOLDER)


def _delete_table(directory: Directory, besides: tuple[str, ...] = ()) -> None:
    """Delete everything that belongs to a table, table.json first."""
    for name in _OWN_FILES:
        if name not in besides:
            directory.delete(name)
    for folder in _OWN_FOLDERS:
        directory.delete_folder(folder)
