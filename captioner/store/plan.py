"""Freeze a listing of the source into OUT/plan, and read it back chunk by chunk."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.console.text import counted, printable
from captioner.data import PLAN_SCHEMA, Chunk, Listing, Source
from captioner.errors import DamagedFileError, SourceError
from captioner.store.ids import IdIndex, digests_of
from captioner.store.kept_columns import with_kept_types
from captioner.store.parallel_listing import list_units
from captioner.store.table import (
    PLAN_FACTS,
    CaptionsTable,
    Plan,
    is_marked_otherwise,
    part_numbers,
    plan_folder,
    plan_notes_name,
    plan_part_mark,
    plan_part_name,
)

MAX_EXAMPLES = 5
MAX_NOTES = 20  # that are shown, of any number
MAX_KINDS = 20
MIN_ROWS_PER_CHUNK = 16
# Schema metadata of a plan part, as JSON: a _Position, and its notes that no earlier part has.
_POSITION, _NOTES = b"captioner.listing", b"captioner.notes"

OnProgress = Callable[[str], None]  # called with what is done now, and how far it is


@dataclass
class _Position:
    """How far a listing has come: rows of `unit` taken into the plan, and what was ignored before that unit.

    `last_id`: of the last of those rows; where another image stands there, the unit has changed. `selection`: which
    images were asked for. `num_notes`: notes about the source before that unit.
    `num_captioned`, `num_uncaptioned`: images with and without reference captions among the taken rows.
    """

    unit: str | None = None
    taken: int = 0
    last_id: str | None = None
    selection: str = ""
    num_ignored: int = 0
    ignored_examples: list[str] = field(default_factory=list)
    num_notes: int = 0
    ignored_kinds: dict[str, int] = field(default_factory=dict)
    num_captioned: int = 0
    num_uncaptioned: int = 0
    uncaptioned_examples: list[str] = field(default_factory=list)

    def ignore(self, listing: Listing) -> None:
        """Count what a listing ignored, and its notes."""
        self.num_ignored += len(listing.ignored)
        self.ignored_examples += listing.ignored[: MAX_EXAMPLES - len(self.ignored_examples)]
        self.num_notes += len(listing.notes)
        for kind, number in Counter(map(_kind_of, listing.ignored)).items():
            if kind in self.ignored_kinds or len(self.ignored_kinds) < MAX_KINDS:
                self.ignored_kinds[kind] = self.ignored_kinds.get(kind, 0) + number

    def take(self, rows: pa.Table) -> None:
        """Count the images without captions among rows that are written. A row of damage is not an image."""
        has_captions = pc.is_valid(rows["reference_captions"])
        is_damage = pc.fill_null(pc.less(rows["size"], 0), False)
        uncaptioned = rows["image_id"].filter(pc.invert(pc.or_(has_captions, is_damage)))
        self.num_captioned += pc.sum(has_captions).as_py() or 0
        self.num_uncaptioned += len(uncaptioned)
        self.uncaptioned_examples += uncaptioned[: MAX_EXAMPLES - len(self.uncaptioned_examples)].to_pylist()


def _kind_of(name: str) -> str:
    """Return by what an ignored file is counted: its suffix, else its name."""
    base = name.rstrip("/").rpartition("/")[2]
    suffix = os.path.splitext(base)[1]
    return f"*{suffix.lower()}" if suffix and not name.endswith(("/", ")")) else base


def make_plan(
    table: CaptionsTable,
    source: Source,
    rows_per_chunk: int,
    rows_per_file: int,
    limit: int | None = None,
    on_progress: OnProgress = lambda text: None,
    selection: str = "",
) -> Plan | None:
    """List the source and freeze what is new in it as the next generation.

    The first plan of a table takes every image; a later one only ids that no earlier plan has, and it is `None` where
    there are none. A listing that was killed continues after its last full part; where another `selection` of images
    was listed, or the source has changed before that place, it begins again. `rows_per_chunk` is a maximum: small
    collections get smaller chunks. `limit`: the most rows to plan. Raises SourceError for an empty source and for ids
    that occur twice, which it names, and OutputError where a kept column has values that the table cannot take.
    """
    plans = table.plans()
    generation = max((plan.generation for plan in plans), default=-1) + 1
    first_part = 1 + max((part for plan in plans if plan.adds_parts for part in plan.parts), default=-1)
    kind, plan = "extend" if plans else "archive", None
    with IdIndex() as planned:
        for earlier in plans:
            if earlier.adds_parts:
                _index_ids(table, earlier, planned, on_progress)
        while plan is None:
            with IdIndex() as added:
                writer = _PlanWriter(table, generation, first_part, rows_per_chunk, rows_per_file, added, selection)
                try:
                    _list(table, source, writer, planned if plans else None, limit, on_progress)
                    plan = writer.finish(kind, source)
                except _ChangedSourceError:
                    table.directory.delete_folder(plan_folder(generation))
    if not plan.num_rows and plans:
        return None
    if not plan.num_rows:
        raise SourceError(_no_images_message(source, plan))
    table.write_plan(plan)
    return plan


def _list(
    table: CaptionsTable,
    source: Source,
    writer: _PlanWriter,
    planned: IdIndex | None,
    limit: int | None,
    on_progress: OnProgress,
) -> None:
    """List the source into a plan, from where an earlier listing was killed. Raises _ChangedSourceError, OutputError.

    `planned`: ids to leave out.
    """
    position = writer.resume()
    num_listed = writer.num_rows
    for unit, listing, first_row in _listings_from(source, position):
        num_listed += listing.rows.num_rows
        on_progress(f"listing images, {num_listed:,} listed")
        rows = _numbered(with_kept_types(table, listing.rows), first_row)
        if planned is not None:
            rows = rows.filter(pa.array(~planned.contains(rows["image_id"])))
        if limit is not None:
            rows = rows.slice(0, limit - writer.num_rows)
        writer.add(unit, rows, listing)
        if limit is not None and writer.num_rows >= limit:
            break


def notes_of(plans: Sequence[Plan]) -> list[str]:
    """Return what a person should know of the source, as it was listed; each note once, however often it was listed."""
    return list(dict.fromkeys(note for plan in plans for note in plan.notes))


def num_ignored(plans: Sequence[Plan]) -> int:
    """Return how many files were no images: each --extend lists all again, one with --limit perhaps not to the end."""
    return max((plan.num_ignored for plan in plans), default=0)


def read_planned(table: CaptionsTable, chunk: Chunk) -> pa.Table:
    """Return the planned rows of one chunk: PLAN_SCHEMA, kept columns, and `part_row` where they are recaptioned.

    Raises DamagedFileError where the file is damaged, or that of another part.
    """
    name = plan_part_name(chunk.generation, chunk.part)
    with table.directory.open_parquet(name) as file:
        is_other = is_marked_otherwise(table, name, file.schema_arrow.metadata or {})
        if is_other or chunk.index >= file.num_row_groups:
            raise table.directory.damage(name, "is damaged: it is that of another part")
        # The pages of a Parquet file have checksums; the names and types of its columns have none.
        types = {field.name: field.type for field in file.schema_arrow}
        if any(types.get(field.name) != field.type for field in PLAN_SCHEMA):
            raise table.directory.damage(name, "is damaged: it lacks columns of a plan")
        return file.read_row_group(chunk.index)


@dataclass(frozen=True, slots=True)
class SourceChange:
    """How a source differs from the plan made of it."""

    num_new: int
    num_gone: int


def compare_with_source(table: CaptionsTable, source: Source) -> SourceChange:
    """List the source again and count the ids that are new in it and those that have gone."""
    num_planned = num_kept = num_new = 0
    with IdIndex() as planned:
        for plan in table.plans():
            if plan.adds_parts:
                _index_ids(table, plan, planned)
                num_planned += plan.num_rows
        for _, listing, _ in _listings_from(source, _Position()):
            is_planned = planned.contains(listing.rows["image_id"])
            num_kept += int(is_planned.sum())
            num_new += int((~is_planned).sum())
    return SourceChange(num_new=num_new, num_gone=num_planned - num_kept)


class _PlanWriter:
    """Cuts a stream of rows into plan parts of whole chunks; each part records how far the listing had come."""

    def __init__(
        self,
        table: CaptionsTable,
        generation: int,
        first_part: int,
        rows_per_chunk: int,
        rows_per_file: int,
        ids: IdIndex,
        selection: str,
    ) -> None:
        self._table, self._generation, self._ids, self._selection = table, generation, ids, selection
        self._rows_per_chunk = min(rows_per_chunk, rows_per_file)
        self._rows_per_file = rows_per_file
        self._rows_per_part = max(1, round(rows_per_file / self._rows_per_chunk)) * self._rows_per_chunk
        self._first_part = first_part
        self._parts: dict[int, int] = {}
        self._pending: list[tuple[str, pa.Table]] = []
        self._num_pending = 0
        self._position = _Position()  # of the last row that was written
        self._listed = _Position()  # of all that was listed
        self._notes: list[str] = []  # of all that was listed
        self._num_written_notes = 0  # those in the parts

    @property
    def num_rows(self) -> int:
        return sum(self._parts.values()) + self._num_pending

    def resume(self) -> _Position:
        """Take over the parts of a listing that was killed, and return the position to continue from.

        A part that is damaged, was the last one, or was left by a killed `--retry-failed`, is deleted with all after
        it: what was in them is listed again. So are the parts of another selection of images.
        """
        directory, parts = self._table.directory, sorted(part_numbers(self._list_names()))
        while parts and self._take_over(parts[0]):
            del parts[0]
        for part in parts:
            directory.delete(plan_part_name(self._generation, part))
        self._listed = copy.deepcopy(self._position)
        return self._position

    def _list_names(self) -> list[str]:
        return self._table.directory.list_names(plan_folder(self._generation))

    def _take_over(self, part: int) -> bool:
        """Take over one part of a killed listing; return whether it is whole and the next one."""
        name = plan_part_name(self._generation, part)
        try:
            rows = self._table.directory.read_table(name)
            metadata = rows.schema.metadata or {}
            position, notes = _Position(**json.loads(metadata[_POSITION])), json.loads(metadata[_NOTES])
            with self._table.directory.open_parquet(name) as file:
                rows_per_chunk = file.metadata.row_group(0).num_rows
        except (DamagedFileError, KeyError, TypeError, ValueError):
            return False
        if (
            is_marked_otherwise(self._table, name, metadata)
            or part != self._first_part + len(self._parts)
            or "part_row" in rows.column_names
            or PLAN_FACTS in metadata
            or position.selection != self._selection
            or position.num_notes != len(self._notes) + len(notes)
        ):
            return False
        if not self._parts:  # a small collection has smaller chunks
            self._rows_per_chunk = rows_per_chunk
            self._rows_per_part = max(1, round(self._rows_per_file / rows_per_chunk)) * rows_per_chunk
        self._parts[part], self._position = rows.num_rows, position
        self._notes += notes
        self._num_written_notes = len(self._notes)
        self._ids.add(rows["image_id"])
        return True

    def add(self, unit: str, rows: pa.Table, listing: Listing) -> None:
        """Take `rows`, which are those of the listing that the plan needs."""
        if unit != self._position.unit:
            self._position = replace(copy.deepcopy(self._listed), unit=unit, taken=0)
        self._listed.ignore(listing)
        self._notes += listing.notes
        self._ids.add(rows["image_id"])
        self._pending.append((unit, rows))
        self._num_pending += rows.num_rows
        while self._num_pending > self._rows_per_part:  # `finish` writes the last part
            self._write_part(self._rows_per_part)

    def finish(self, kind: str, source: Source) -> Plan:
        """Write the last part. Raises SourceError naming ids that occur twice; the plan is then deleted."""
        if not self._parts:  # a small collection: enough chunks for several workers and for a progress display
            self._rows_per_chunk = min(self._rows_per_chunk, _rows_of_small_chunks(self._num_pending))
        if self._num_pending:
            self._write_part(self._num_pending, last_of=kind)
        duplicates = self._ids.duplicates()
        if len(duplicates):
            names = self._names_of(duplicates)
            self._table.directory.delete_folder(plan_folder(self._generation))
            raise SourceError(
                f"{source.name}: {counted(len(duplicates), 'image id occurs', 'image ids occur')} more than once, "
                f"such as {', '.join(repr(name) for name in names)}; every image needs its own id "
                "(for a table choose another --id-column; a tar: write it anew without the older members)"
            )
        return self._plan(kind)

    def _plan(self, kind: str) -> Plan:
        return Plan(
            self._generation,
            kind,
            self._rows_per_chunk,
            self._parts,
            self._listed.num_ignored,
            self._listed.ignored_examples,
            notes=[*self._first_notes(), *self._note_of_uncaptioned()],
            ignored_kinds=self._listed.ignored_kinds,
        )

    def _first_notes(self) -> list[str]:
        """Return the notes about the source: of very many the first, and a line about the file that has all of them."""
        num_more = len(self._notes) - MAX_NOTES
        if num_more <= 0 or not self._parts:
            return self._notes[:MAX_NOTES]
        name = plan_notes_name(self._generation)
        lines = "".join(f"{printable(note)}\n" for note in self._notes)
        self._table.directory.write_bytes(name, lines.encode())
        return [*self._notes[:MAX_NOTES], f"and {counted(num_more, 'more such note')}; all are in {name} of OUT"]

    def _note_of_uncaptioned(self) -> list[str]:
        """Return a line about images without captions where others have some."""
        number, num_captioned = self._listed.num_uncaptioned, self._listed.num_captioned
        if not number or not num_captioned:
            return []
        examples = ", ".join(map(repr, self._listed.uncaptioned_examples[:3]))
        images = counted(number + num_captioned, "image")
        return [f"{number:,} of {images} without a reference caption, e.g. {examples}"]

    def _write_part(self, num_rows: int, last_of: str | None = None) -> None:
        """Write a part of the first rows that wait. `last_of`: the kind of the plan whose last part this is."""
        part_rows, rest = _split(self._pending, num_rows)
        unit, last = part_rows[-1]
        rows = pa.concat_tables([rows for _, rows in part_rows]).drop_columns(["_row"])
        self._listed.take(rows)
        position = replace(
            self._position,
            # Units after that of the last row may have no rows.
            taken=last["_row"][-1].as_py() + 1 if unit == self._position.unit else 0,
            last_id=last["image_id"][-1].as_py() if unit == self._position.unit else None,
            selection=self._selection,
            num_captioned=self._listed.num_captioned,
            num_uncaptioned=self._listed.num_uncaptioned,
            uncaptioned_examples=self._listed.uncaptioned_examples,
        )
        part = max(self._parts, default=self._first_part - 1) + 1
        name = plan_part_name(self._generation, part)
        notes = self._notes[self._num_written_notes : position.num_notes]
        self._num_written_notes = position.num_notes
        self._parts[part] = rows.num_rows
        facts: dict[bytes, Any] = {_POSITION: asdict(position), _NOTES: notes}
        if last_of:
            facts[PLAN_FACTS] = self._plan(last_of).to_json()
        metadata = {key: json.dumps(fact).encode() for key, fact in facts.items()} | plan_part_mark(self._table, name)
        self._table.directory.write_table(name, rows.replace_schema_metadata(metadata), self._rows_per_chunk)
        self._pending = rest
        self._num_pending -= num_rows

    def _names_of(self, duplicates: npt.NDArray[np.void]) -> list[str]:
        names: list[str] = []
        for part in sorted(self._parts):
            ids = self._table.directory.read_table(plan_part_name(self._generation, part), ["image_id"])["image_id"]
            is_duplicate = np.isin(digests_of(ids), duplicates)
            names += sorted(set(ids.filter(pa.array(is_duplicate)).to_pylist()) - set(names))
            if len(names) >= MAX_EXAMPLES:
                break
        return names[:MAX_EXAMPLES]


def _rows_of_small_chunks(num_rows: int) -> int:
    """Return the rows of each of at most 64 chunks: a power of two, as batch sizes are, so that batches are full."""
    return max(MIN_ROWS_PER_CHUNK, 1 << (-(-num_rows // 64) - 1).bit_length())


class _ChangedSourceError(Exception):
    """A source has changed where a killed listing would continue, so that images could be left out."""


def _listings_from(source: Source, position: _Position) -> Iterator[tuple[str, Listing, int]]:
    """Yield (unit, listing, index of its first row in the unit), from `position` on. Raises _ChangedSourceError."""
    units = list(source.units())
    if position.unit is not None:
        if position.unit not in units:
            raise _ChangedSourceError
        units = units[units.index(position.unit) :]
    rows_listed: dict[str, int] = {}
    to_find = position.last_id if position.taken else None
    for unit, listing in list_units(source, units):
        first = rows_listed.get(unit, 0)
        rows_listed[unit] = first + listing.rows.num_rows
        skip = max(0, min(listing.rows.num_rows, position.taken - first)) if unit == position.unit else 0
        if skip and first + skip == position.taken:
            if listing.rows["image_id"][skip - 1].as_py() != to_find:
                raise _ChangedSourceError
            to_find = None
        if to_find is not None and unit != position.unit:
            raise _ChangedSourceError
        yield unit, replace(listing, rows=listing.rows.slice(skip)), first + skip
    if to_find is not None:
        raise _ChangedSourceError


def _numbered(rows: pa.Table, first: int) -> pa.Table:
    numbers = pa.array(np.arange(first, first + rows.num_rows), pa.int64())
    return rows.append_column(pa.field("_row", pa.int64()), numbers)


def _split(
    pending: list[tuple[str, pa.Table]], num_rows: int
) -> tuple[list[tuple[str, pa.Table]], list[tuple[str, pa.Table]]]:
    """Return the first `num_rows` rows, and the rest."""
    first, rest = [], []
    for unit, rows in pending:
        count = min(num_rows, rows.num_rows)
        if count:
            first.append((unit, rows.slice(0, count)))
        if count < rows.num_rows:
            rest.append((unit, rows.slice(count)))
        num_rows -= count
    return first, rest


def _index_ids(table: CaptionsTable, plan: Plan, ids: IdIndex, on_progress: OnProgress = lambda text: None) -> None:
    num_read = 0
    for part, num_rows in sorted(plan.parts.items()):
        ids.add(table.read_plan_part(plan, part, ["image_id"])["image_id"])
        num_read += num_rows
        on_progress(f"reading the ids of planned images, {num_read:,} of {plan.num_rows:,}")


def _no_images_message(source: Source, plan: Plan) -> str:
    if plan.num_ignored:
        return (
            f"{source.name}: no images found; skipped {counted(plan.num_ignored, 'file')} as documents or hidden, "
            f"e.g. {plan.ignored_examples[0]!r}"
        )
    reason = plan.notes[0] if plan.notes else "check the path and --include/--exclude"
    return f"{source.name}: no images found; {reason}"
