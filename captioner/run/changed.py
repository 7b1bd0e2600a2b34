"""Find images whose files have changed since they were planned or captioned, and plan them anew."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner.console.text import counted
from captioner.data import Source
from captioner.sources.huggingface import HuggingFaceSource
from captioner.sources.plan_rows import WrappedSource
from captioner.sources.reading import STAMP, have_changed
from captioner.sources.root import Root, unit_of_file
from captioner.store.parallel_listing import list_units
from captioner.store.read import read_parts
from captioner.store.replan import RowIndices, current_plan_rows, with_newer_values
from captioner.store.table import CaptionsTable

# The source is not compared with a finished plan of more images than this: it would take minutes.
COMPARE_UP_TO = 1_000_000
# A file that is newer than its caption is read and compared; so many at most where that is only for a note.
COMPARE_FILES_UP_TO = 1_000
_COLUMNS = ["image_id", "status", "error_code", "num_bytes", "created_at", "sha256", "chunk_id"]


@dataclass
class Changed:
    """The captioned images whose files are not any more what was captioned, and rows that failed as `changed`.

    `indices`: of rows in the parts of the table, which must be published to be planned again.
    """

    indices: RowIndices = field(default_factory=dict)
    num_images: int = 0
    num_unsure: int = 0  # newer than their captions, and not compared
    example: str = ""

    @property
    def note(self) -> str:
        """A line for a person; "" where nothing has changed."""
        if not self.num_images and not self.num_unsure:
            return ""
        unsure = f"{counted(self.num_unsure, 'more is', 'more are')} newer than the captions" if self.num_unsure else ""
        images = counted(self.num_images, "image has", "images have")
        example = f"{images} changed since planned or captioned, e.g. {self.example!r}"
        facts = " and ".join(filter(None, [example if self.num_images else "", unsure]))
        return f"{facts}; --extend captions again what changed"


def find_changed(table: CaptionsTable, source: Source, compare_up_to: int | None = COMPARE_FILES_UP_TO) -> Changed:
    """Compare the size and time of change of every captioned file with its row.

    `compare_up_to`: how many files that are newer than their captions are read; all where it is None. Otherwise one
    request for each file, for a tar or a table and all its images, for a folder of a store.
    """
    changed, files, plans = Changed(), _Files(source, compare_up_to), table.plans()
    # What is damaged is captioned again anyway.
    for rows in read_parts(table, _COLUMNS, on_damage=lambda error: None, whole_files=False):
        if not len(rows):
            continue
        part = int(rows["chunk_id"][0].as_py().split("-")[1])
        planned = current_plan_rows(table, part, plans=plans)
        if len(planned) != len(rows):  # not all of its chunks are committed
            planned = planned.take(pc.index_in(rows["image_id"], planned["image_id"].combine_chunks()))
        mask = np.fromiter(files.have_changed(rows, planned), bool, len(rows))
        if mask.any():
            changed.indices[part] = np.flatnonzero(mask)
            changed.example = changed.example or rows["image_id"][int(mask.argmax())].as_py()
            changed.num_images += int(mask.sum())
    changed.num_unsure = files.num_unsure
    return changed


def refreshed(source: Source, rows: pa.Table, error_codes: list[str | None]) -> pa.Table:
    """Return plan rows as the source lists them now, where their file changed after they were planned.

    `error_codes`: of the rows as captioned. An image that is gone keeps its row, and fails again.
    """
    changed = have_changed(rows, _Files(source).stamp)
    is_stale = [has_changed or code == "changed" for has_changed, code in zip(changed, error_codes, strict=True)]
    if not any(is_stale):
        return rows
    stale = rows.filter(pa.array(is_stale))
    listed = [stale.slice(0, 0)]
    for _, listing in list_units(source, _units_of(source, set(stale["file"].to_pylist()))):
        wanted = pc.is_in(listing.rows["image_id"], value_set=stale["image_id"].combine_chunks())
        listed.append(listing.rows.filter(wanted))
    newer = pa.concat_tables(listed, promote_options="default")
    indices = pc.index_in(newer["image_id"], value_set=rows["image_id"].combine_chunks()).to_numpy()
    return with_newer_values(rows, indices, newer)


def _units_of(source: Source, files: set[bytes]) -> list[str]:
    """Return the units in which these files are listed: those named after them, else all."""
    units, wanted = list(source.units()), {unit_of_file(file) for file in files}
    return [unit for unit in units if unit in wanted] or units


class _Files:
    """What the files of a source are now."""

    def __init__(self, source: Source, compare_up_to: int | None = 0) -> None:
        while isinstance(source, WrappedSource):
            source = source.source
        self._root: Root | None = getattr(source, "root", None)
        self._saved = source if isinstance(source, HuggingFaceSource) else None
        self._now = time.time()
        self._compare_left = compare_up_to
        self.num_unsure = 0  # files that are newer than their captions, and were not compared
        self._stamps: dict[bytes, str | None] = {}  # of tars, tables and datasets
        self._folder: bytes | None = None  # of a store, the last one that was listed
        self._in_folder: dict[bytes, str] = {}  # stamps by name

    def have_changed(self, rows: pa.Table, planned: pa.Table) -> Iterator[bool]:
        """Yield for each row whether its file has changed."""
        names = [name for name in ("file", "offset", "row", "page_at", STAMP.name) if name in planned.column_names]
        for row, plan in zip(rows.to_pylist(), planned.select(names).to_pylist(), strict=True):
            yield row["error_code"] == "changed" or self._has_changed(row, plan)

    def _has_changed(self, row: dict[str, Any], plan: dict[str, Any]) -> bool:
        if plan["offset"] is not None or plan["row"] is not None:
            stamp = self.stamp(plan["file"])
            return bool(plan.get(STAMP.name) and stamp and stamp != plan[STAMP.name])
        if row["status"] != "ok" or self._root is None:
            return False
        size, _, changed_at = (self._stamp_of_image(plan["file"]) or "").partition(" ")
        if size.isdecimal() and plan.get("page_at") is None and int(size) != row["num_bytes"]:
            return True
        # A time in the future says nothing: some cameras and archives have such clocks.
        seconds = int(changed_at) / 1e9 if changed_at.isdecimal() else 0.0
        is_newer = row["created_at"].timestamp() < seconds <= self._now
        return is_newer and (plan.get("page_at") is not None or self._has_other_bytes(plan["file"], row["sha256"]))

    def _has_other_bytes(self, file: bytes, digest: str) -> bool:
        """Return whether a file is not what was captioned; a copy of the same bytes has a new time too."""
        assert self._root is not None
        if self._compare_left == 0:
            self.num_unsure += 1
            return False
        if self._compare_left is not None:
            self._compare_left -= 1
        try:
            return sha256(self._root.read(file)).hexdigest() != digest
        except OSError:
            return False

    def _stamp_of_image(self, file: bytes) -> str | None:
        """Return the stamp of a file of its own; in a store its folder is listed once."""
        assert self._root is not None
        if not self._root.is_in_store(file):
            return self._root.stamp(file)
        folder, name = os.path.split(file)
        if folder != self._folder:
            self._folder, self._in_folder = folder, self._root.stamps_in(folder)
        return self._in_folder.get(name)

    def stamp(self, file: bytes) -> str | None:
        """Return the stamp of a file that holds many images."""
        if file not in self._stamps:
            stamp_of = self._saved.stamp if self._saved else self._root.stamp if self._root else None
            self._stamps[file] = stamp_of(file) if stamp_of else None
        return self._stamps[file]
