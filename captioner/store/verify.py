"""Verify that a table has exactly one current row for each planned image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.console.text import counted
from captioner.data import ERROR_CODES, STATUS_FAILED, STATUS_OK
from captioner.errors import DamagedFileError
from captioner.store.checksum import WholeFile, has_checksum
from captioner.store.counts import TableCounts
from captioner.store.ids import IdIndex
from captioner.store.read import OnDamage, check_part, raise_damage, read_chunk, read_parts
from captioner.store.repair import recorded_files, unchanged_parts
from captioner.store.table import CaptionsTable, Plan, captions_name, history_name, part_numbers, plan_name

MAX_PROBLEMS = 20


@dataclass
class Verification:
    """The result of `verify`.

    `problems`: sentences for a person, at most MAX_PROBLEMS. `unchecked`: files of an earlier version, which hold no
    checksum.
    """

    counts: TableCounts
    lost: int = 0
    doubled: int = 0
    unchecked: int = 0
    open_generations: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    # What was read already: counts by part, files by name, and the record of the published parts.
    counts_of_parts: dict[int, TableCounts] = field(default_factory=dict)
    verified_files: set[str] = field(default_factory=set)
    recorded: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def proven(self) -> bool:
        return not self.problems and not self.open_generations and not self.lost and not self.doubled

    def add_problem(self, problem: str) -> None:
        if len(self.problems) < MAX_PROBLEMS and problem not in self.problems:
            self.problems.append(problem)

    @contextmanager
    def noting_damage(self) -> Iterator[None]:
        """Note a damaged or missing file as a problem, and go on with the next step."""
        try:
            yield
        except DamagedFileError as error:
            self.add_problem(str(error))


def count_rows(
    table: CaptionsTable,
    on_damage: OnDamage = raise_damage,
    whole_files: bool = True,
    besides: Collection[int] = (),
) -> TableCounts:
    """Count the committed rows by status and by fingerprint.

    `on_damage`, `whole_files`, `besides`: see `read_parts`. Without `whole_files`, published parts that have not
    changed since they were counted for their record are not read at all.
    """
    plans = table.plans()
    counts = TableCounts(planned=sum(plan.num_rows for plan in plans if plan.adds_parts))
    files: dict[int, dict[str, Any]] = {}
    if not whole_files:
        with suppress(DamagedFileError):  # of a record: all parts are read then
            files = recorded_files(table)
    unchanged = unchanged_parts(table, plans, {part: file for part, file in files.items() if file["counts"]})
    for part in unchanged:
        counts.add_record(files[part]["counts"])
    others, names = unchanged.union(besides), table.counted_columns
    for rows in read_parts(table, names, on_damage=on_damage, whole_files=whole_files, besides=others):
        counts.add_rows(rows, table.answer_columns)
    return counts


def verify(table: CaptionsTable) -> Verification:
    """Compare every row with the plan and every file with its checksum.

    Reads each published part once. Needs memory for one part and one bucket of ids.
    """
    result = Verification(counts=TableCounts())
    with result.noting_damage():
        result.recorded = recorded_files(table)
    if not table.plans():
        what = "the source is not listed to its end; run the same `captioner caption` command again"
        result.add_problem(f"{table.directory.shown('plan')}: {what}")
    with IdIndex() as planned:
        for plan in table.plans():
            _verify_plan(table, plan, result, planned)
        duplicates = len(planned.duplicates())
    if duplicates:
        result.doubled += duplicates
        result.add_problem(f"{counted(duplicates, 'image id is', 'image ids are')} planned more than once")
    # In parts of which some rows are being captioned again, these are spread over chunks; others are not published.
    open_parts = {part for plan in table.open_plans() for part in plan.parts}
    parts = {part: rows for part, rows in result.counts_of_parts.items() if part not in open_parts}
    result.counts = count_rows(table, on_damage=lambda error: result.add_problem(str(error)), besides=parts)
    for part_counts in parts.values():
        result.counts.add_record(part_counts.to_record())
    _verify_files(table, result)
    return result


def _verify_plan(table: CaptionsTable, plan: Plan, result: Verification, planned: IdIndex) -> None:
    is_published = table.is_published(plan.generation)
    if plan.may_lack_images:
        name = table.directory.shown(plan_name(plan.generation))
        what = "is made again from parts of which the last may be lost; run the same `captioner caption` command again"
        result.add_problem(f"{name} {what}{', with --extend' if plan.generation else ''}")
    if not is_published:
        result.open_generations.append(plan.generation)
    published = table.published_parts()
    committed = set() if is_published else table.committed_chunks(plan.generation)
    for part in sorted(plan.parts):
        with result.noting_damage():
            ids = table.read_plan_part(plan, part, ["image_id"])["image_id"]
            if plan.adds_parts:
                planned.add(ids)
            if plan.adds_parts and (is_published or part in published):
                _verify_part(table, plan, part, ids, part in published, result)
            elif is_published:
                _verify_history(table, plan, part, ids)
            for chunk in plan.part_chunks(part):
                if chunk.chunk_id in committed:
                    with result.noting_damage():
                        first = chunk.index * plan.rows_per_chunk
                        committed_ids = read_chunk(table, chunk, ["image_id"])["image_id"]
                        expected = ids.slice(first, chunk.num_rows)
                        _compare(table.chunk_name(chunk.chunk_id), expected, committed_ids, result)


def _verify_part(
    table: CaptionsTable, plan: Plan, part: int, ids: pa.ChunkedArray, is_there: bool, result: Verification
) -> None:
    name = captions_name(part)
    if not is_there:
        result.lost += len(ids)
        result.add_problem(f"{name} is missing: {counted(len(ids), 'image has', 'images have')} no row")
        return
    file = _verified_file(table, name, result)
    rows = table.directory.decoded(name, file, ["image_id", "chunk_id", *table.counted_columns])
    with result.noting_damage():
        check_part(table, plan, part, rows)
        result.counts_of_parts[part] = TableCounts()
        result.counts_of_parts[part].add_rows(rows, table.answer_columns)
    _compare(name, ids, rows["image_id"], result)
    wrong = rows.filter(pc.invert(_has_known_status(rows)))["image_id"]
    if len(wrong):
        result.add_problem(
            f"{name}: {counted(len(wrong), 'row')} of unknown status or reason, e.g. {wrong[0].as_py()!r}"
        )


def _verify_history(table: CaptionsTable, plan: Plan, part: int, ids: pa.ChunkedArray) -> None:
    """Verify that the rows which a generation superseded are all in history/, in its order."""
    name = history_name(plan.generation, part)
    if not table.directory.read_table(name, ["image_id"])["image_id"].equals(ids):
        raise table.directory.damage(name, f"does not hold the rows that generation {plan.generation} superseded")


def _has_known_status(rows: pa.Table) -> pa.ChunkedArray:
    """Return for each row whether it is ok without an error code, or failed with one of ERROR_CODES."""
    is_ok = pc.and_(pc.equal(rows["status"], STATUS_OK), pc.is_null(rows["error_code"]))
    has_error_code = pc.is_in(rows["error_code"], pa.array(ERROR_CODES))
    return pc.or_(is_ok, pc.and_(pc.equal(rows["status"], STATUS_FAILED), has_error_code))


def _compare(name: str, planned: pa.ChunkedArray, actual: pa.ChunkedArray, result: Verification) -> None:
    """Count what is missing or doubled in a file. `planned`, `actual`: image ids."""
    if actual.equals(planned):
        return
    expected, present = Counter(planned.to_pylist()), Counter(actual.to_pylist())
    missing, extra = expected - present, present - expected
    result.lost += missing.total()
    result.doubled += extra.total()
    if missing:
        images = counted(missing.total(), "planned image")
        result.add_problem(f"{name}: {images} without a row, e.g. {next(iter(missing))!r}")
    if extra:
        result.add_problem(f"{name}: {counted(extra.total(), 'row')} too many, e.g. {next(iter(extra))!r}")


def _verify_files(table: CaptionsTable, result: Verification) -> None:
    """Verify every file with rows that was not read yet, and the names of those in captions/."""
    planned: set[int] = set()
    for plan in table.plans():
        planned |= set(plan.parts) if plan.adds_parts else set()
    names = table.directory.list_names("captions")
    for part in sorted(set(part_numbers(names)) - planned):
        result.add_problem(f"{captions_name(part)} belongs to no plan; move it elsewhere")
    for name in names:
        if name.endswith(".parquet") and not part_numbers([name]):
            result.add_problem(f"captions/{name} is not a file of this table, but is read with it; move it elsewhere")
    for name in table.files_with_rows():
        if name not in result.verified_files:
            with result.noting_damage():
                _verified_file(table, name, result)


def _verified_file(table: CaptionsTable, name: str, result: Verification) -> WholeFile:
    """Return a file, compared with its checksum and with the record of what was published.

    Raises DamagedFileError.
    """
    result.verified_files.add(name)
    file = table.directory.read_checked(name)
    if not has_checksum(name, file.data):
        if table.info.get("checksums"):
            raise table.directory.damage(name, "is damaged: its checksum is gone")
        result.unchecked += 1
    folder, _, base_name = name.rpartition("/")
    (part,) = part_numbers([base_name]) or (-1,)
    if folder == "captions" and part in result.recorded and file.sha256 != result.recorded[part]["sha256"]:
        result.add_problem(f"{name} is not the file that was published (sha256 {file.sha256[:12]})")
    return file
