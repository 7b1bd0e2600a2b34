"""Find images whose files have changed since they were planned or captioned, and plan them again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.console.text import counted
from captioner.data import Source
from captioner.run.prefetch import in_parallel
from captioner.sources.huggingface import HuggingFaceSource
from captioner.sources.plan_rows import WrappedSource
from captioner.sources.reading import have_changed
from captioner.sources.root import UNKNOWN, Root, unit_of_file
from captioner.store.kept_columns import with_kept_types
from captioner.store.parallel_listing import list_units
from captioner.store.read import read_parts
from captioner.store.replan import RowIndices, current_plan_rows, with_newer_values
from captioner.store.table import CaptionsTable

# The source is not compared with a finished plan of more images than this: it would take minutes.
COMPARE_UP_TO = 1_000_000
# A file that is newer than its caption is read and compared. Where the result is only a note, at most this many are.
COMPARE_FILES_UP_TO = 1_000
# Requests for sizes and times, and reads, at the same time: a file server takes a millisecond for each.
REQUESTS_AT_ONCE = 16
FILES_PER_BATCH = 256
PIECE_BYTES = 8 << 20  # of a file that is read to be compared
_COLUMNS = ["image_id", "status", "error_code", "num_bytes", "created_at", "sha256", "chunk_id"]


T = TypeVar("T")
U = TypeVar("U")


@dataclass
class Changed:
    """Images whose files differ from what was captioned, and rows that failed as `changed`.

    `indices`: of these rows in each part of the table; only rows of published parts can be planned again.
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

    `compare_up_to`: at most this many files that are newer than their captions are read; None: all. Apart from that it
    takes one request for each file; for a tar or table, whatever it holds; and for each folder of a store.
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
        mask = files.have_changed(rows, planned)
        if mask.any():
            changed.indices[part] = np.flatnonzero(mask)
            changed.example = changed.example or rows["image_id"][int(mask.argmax())].as_py()
            changed.num_images += int(mask.sum())
    changed.num_unsure = files.num_unsure
    return changed


def refreshed(table: CaptionsTable, source: Source, rows: pa.Table, error_codes: list[str | None]) -> pa.Table:
    """Return plan rows as the source lists them now, where their file changed after they were planned.

    `error_codes`: of the rows as captioned. An image that is gone keeps its row, and fails again.
    Raises OutputError where a kept column has values that the table cannot take.
    """
    changed = have_changed(rows, _Files(source).stamp)
    is_stale = [has_changed or code == "changed" for has_changed, code in zip(changed, error_codes, strict=True)]
    if not any(is_stale):
        return rows
    stale = rows.filter(pa.array(is_stale))
    listed = [stale.slice(0, 0)]
    for _, listing in list_units(source, _units_of(source, set(stale["file"].to_pylist()))):
        wanted = pc.is_in(listing.rows["image_id"], value_set=stale["image_id"].combine_chunks())
        listed.append(with_kept_types(table, listing.rows.filter(wanted)))
    newer = pa.concat_tables(listed, promote_options="default")
    indices = pc.index_in(newer["image_id"], value_set=rows["image_id"].combine_chunks()).to_numpy()
    return with_newer_values(rows, indices, newer)


def _units_of(source: Source, files: set[bytes]) -> list[str]:
    """Return the units in which these files are listed: those named after them, else all."""
    units, wanted = list(source.units()), {unit_of_file(file) for file in files}
    return [unit for unit in units if unit in wanted] or units


class _Files:
    """Sizes, times and bytes of the files of a source as they are now."""

    def __init__(self, source: Source, compare_up_to: int | None = 0) -> None:
        while isinstance(source, WrappedSource):
            source = source.source
        self._root: Root | None = getattr(source, "root", None)
        self._dataset = source if isinstance(source, HuggingFaceSource) else None
        self._now = time.time_ns()
        self._compare_left = compare_up_to
        self.num_unsure = 0  # files that are newer than their captions, and were not compared
        self._stamps: dict[bytes, str | None] = {}  # of tars, tables and datasets
        # Of the folders of a store that hold the last images: sizes and times of their files by name.
        self._folders: dict[bytes, dict[bytes, tuple[int, int]]] = {}

    def have_changed(self, rows: pa.Table, planned: pa.Table) -> npt.NDArray[np.bool_]:
        """Return for each row whether its file has changed. `rows`: _COLUMNS; `planned`: the plan rows of the same."""
        changed: npt.NDArray[np.bool_] = _mask(pc.equal(rows["error_code"], "changed"))
        in_container = _mask(pc.or_(pc.is_valid(planned["offset"]), pc.is_valid(planned["row"])))
        if in_container.any():
            changed |= in_container & np.array(have_changed(planned, self.stamp), bool)
        if self._root is not None:
            alone = np.flatnonzero(~in_container & ~changed & _mask(pc.equal(rows["status"], "ok")))
            changed[alone] = self._have_changed_alone(self._root, rows.take(alone), planned.take(alone))
        return changed

    def _have_changed_alone(self, root: Root, rows: pa.Table, planned: pa.Table) -> npt.NDArray[np.bool_]:
        """Return the same for images that have a file each."""
        files = planned["file"].to_pylist()
        sizes, times = self._sizes_and_times(root, files)
        num_bytes = pc.fill_null(rows["num_bytes"], -1).to_numpy()
        created_at = 1_000 * pc.cast(rows["created_at"], pa.int64()).to_numpy()
        is_page = np.zeros(len(files), bool)
        if "page_at" in planned.column_names:
            is_page = _mask(pc.is_valid(planned["page_at"]))
        has_other_size = (sizes >= 0) & ~is_page & (sizes != num_bytes)
        # A time in the future says nothing: some cameras and archives have such clocks.
        is_newer = (created_at < times) & (times <= self._now)
        changed: npt.NDArray[np.bool_] = has_other_size | (is_newer & is_page)
        unsure = np.flatnonzero(is_newer & ~changed)
        if self._compare_left is not None:
            self.num_unsure += max(0, len(unsure) - self._compare_left)
            unsure = unsure[: self._compare_left]
            self._compare_left -= len(unsure)
        digests = rows["sha256"].take(unsure).to_pylist()
        items = [(files[index], int(num_bytes[index]), digest) for index, digest in zip(unsure, digests, strict=True)]
        changed[unsure] = list(_in_batches(partial(_have_other_bytes, root), items))
        return changed

    def _sizes_and_times(
        self, root: Root, files: Sequence[bytes]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return size in bytes and time of change in ns of each file, -1 where they cannot be asked for.

        Each folder of a store is listed once.
        """
        in_store = {file for file in files if root.is_in_store(file)}
        folders = dict.fromkeys(os.path.dirname(file) for file in files if file in in_store)
        new = [folder for folder in folders if folder not in self._folders]
        listed = zip(new, in_parallel(root.sizes_and_times_in, iter(new), REQUESTS_AT_ONCE), strict=True)
        self._folders = {folder: self._folders[folder] for folder in folders if folder in self._folders} | dict(listed)
        local = iter(_in_batches(root.sizes_and_times, [file for file in files if file not in in_store]))
        pairs = np.array(
            [
                self._folders[os.path.dirname(file)].get(os.path.basename(file), UNKNOWN)
                if file in in_store
                else next(local)
                for file in files
            ],
            np.int64,
        ).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def stamp(self, file: bytes) -> str | None:
        """Return the stamp of a file that holds many images."""
        if file not in self._stamps:
            stamp_of = self._dataset.stamp if self._dataset else self._root.stamp if self._root else None
            self._stamps[file] = stamp_of(file) if stamp_of else None
        return self._stamps[file]


def _mask(values: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Return booleans as an array that can be changed; null is false."""
    return np.array(pc.fill_null(values, False))


def _in_batches(function: Callable[[list[T]], list[U]], items: list[T]) -> Iterator[U]:
    """Yield what `function` returns for each item of a list: of one batch after another, in threads where several."""
    batches = (items[first : first + FILES_PER_BATCH] for first in range(0, len(items), FILES_PER_BATCH))
    at_once = REQUESTS_AT_ONCE if len(items) > FILES_PER_BATCH else 1
    for results in in_parallel(function, batches, at_once):
        yield from results


def _have_other_bytes(root: Root, items: list[tuple[bytes, int, str]]) -> list[bool]:
    """Return whether files are not what was captioned: a copy of the same bytes has a new time too.

    `items`: file, its size in bytes, and the sha256 of what was captioned.
    """
    return [_digest(root, file, size) not in (None, digest) for file, size, digest in items]


def _digest(root: Root, file: bytes, size: int) -> str | None:
    """Return the sha256 of a file, of which a piece is held at once; None where it cannot be read."""
    digest = sha256()
    try:
        for offset in range(0, max(1, size), PIECE_BYTES):
            digest.update(root.read(file, offset, min(PIECE_BYTES, size - offset)))
    except OSError:
        return None
    return digest.hexdigest()
