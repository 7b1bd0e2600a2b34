"""Find what was damaged or deleted in a table since it was written, and take it back to where a run makes it again."""

from __future__ import annotations

import json
import posixpath
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.console.text import counted
from captioner.data import PLAN_SCHEMA, Source
from captioner.errors import DamagedFileError, OutputError
from captioner.store.counts import TableCounts
from captioner.store.directory import RECHECK_FILE, FileStat
from captioner.store.ids import IdIndex
from captioner.store.kept_columns import with_kept_types
from captioner.store.parallel_listing import list_units
from captioner.store.replan import current_plan_rows, failed_rows, write_rows_again
from captioner.store.table import (
    PLAN_FACTS,
    CaptionsTable,
    Plan,
    Recaption,
    captions_name,
    history_name,
    is_marked_otherwise,
    plan_folder,
    plan_from_json,
    plan_name,
    plan_part_mark,
    plan_part_name,
    published_name,
    publishing_name,
)


def restore_table(table: CaptionsTable, source: Source) -> list[str]:
    """Make again what can be made of the rest of a table, or by captioning; return a sentence for each damaged file.

    A file that has the size it was written with, and was not changed since, is not read: at 100 million images that
    would take minutes. Where something was found damaged (see `Directory.damage`), before or now, all files are read.
    Raises OutputError for what cannot be made again.
    """
    problems = _restore_plan_records(table)
    read_all = False
    while not read_all:
        read_all = table.directory.exists(RECHECK_FILE)
        problems += _restore_plan_parts(table, source, read_all)
        problems += _reopen_damaged_parts(table, read_all)
        if not read_all and not table.directory.exists(RECHECK_FILE):
            return problems
    table.directory.delete(RECHECK_FILE)
    return problems


def _restore_plan_records(table: CaptionsTable) -> list[str]:
    """Write each plan.json that is damaged or missing, from the parts of the plan."""
    problems = []
    for generation in table.generations():
        try:
            table.read_plan(generation)
        except DamagedFileError as error:
            if table.directory.exists(plan_name(generation)) or table.was_complete(generation):
                problems.append(f"{_what(error)}; {_make_plan_again(table, generation)}")
    return problems


def _make_plan_again(table: CaptionsTable, generation: int) -> str:
    """Write the plan.json of a generation from its parts, and return in words what was done.

    The first listing, of which nothing is left, is deleted, and done again. Raises OutputError where too little is left
    of another one.
    """
    table.directory.write_json(RECHECK_FILE, {"damaged": plan_name(generation)})
    plan = _plan_of_parts(table, generation)
    if plan is None and table.generations() == [0]:
        table.directory.delete_folder(plan_folder(0))
        return "no part of the plan is left, and the source is listed again"
    if plan is None:
        what = "is damaged, and too few parts of the plan are left to make it again"
        raise OutputError(f"{table.directory.shown(plan_name(generation))} {what}; restore it, or give --overwrite")
    if plan.may_lack_images:  # what was in a last part that cannot be read is listed again
        for part in set(table.parts_in_folder(generation)) - set(plan.parts):
            table.directory.delete(plan_part_name(generation, part))
    table.write_plan(plan)
    lacking = ", of which the last may be lost: the source is compared with them" if plan.may_lack_images else ""
    return f"it is made again from the parts of the plan{lacking}"


def _plan_of_parts(table: CaptionsTable, generation: int) -> Plan | None:
    """Return the plan that the parts of a generation make; None where too little is left of them.

    The last part of a listing holds the whole plan, and so does each part of a plan that captions rows again. Without
    one, and in tables of earlier versions, the plan is that of the parts that are left (`_parts_of_listing`).
    """
    parts, facts, rows_per_chunk = dict[int, int](), dict[str, Any](), 1
    for part in table.parts_in_folder(generation):
        name = plan_part_name(generation, part)
        with suppress(DamagedFileError), table.directory.open_parquet(name) as file:
            metadata = file.schema_arrow.metadata or {}
            if is_marked_otherwise(table, name, metadata):
                continue
            facts_of_part = json.loads(metadata.get(PLAN_FACTS, b"{}"))
            if "parts" in facts_of_part:
                table.directory.read_table(name, ["image_id"])  # compares the checksum
                return plan_from_json(generation, facts_of_part)
            parts[part] = file.metadata.num_rows
            rows_per_chunk = max(rows_per_chunk, file.metadata.row_group(0).num_rows)
            is_retry = "part_row" in file.schema_arrow.names
            facts = facts_of_part or ({"kind": "retry"} if is_retry else {})
    is_whole = True
    if not facts:
        parts, is_whole = _parts_of_listing(table, generation, parts)
    if not parts:
        return None
    recaption = facts.get("recaption")
    return Plan(
        generation,
        facts.get("kind") or ("extend" if generation else "archive"),
        rows_per_chunk,
        dict(sorted(parts.items())),
        recaption=Recaption(**recaption) if recaption else None,
        may_lack_images=not is_whole,
    )


def _parts_of_listing(table: CaptionsTable, generation: int, rows: dict[int, int]) -> tuple[dict[int, int], bool]:
    """Return the number of rows of each part of a listing, and whether those are all of its parts.

    `rows`: of the plan parts that can be read. One in the middle that cannot has as many as the published part, or as
    the largest one. Parts after the last whose number of rows is certain are left out.
    """
    others = [number for number in table.generations() if number != generation]
    plans = [plan for number in others if (plan := _readable_plan(table, number)) and plan.adds_parts]
    first = 1 + max((part for plan in plans if plan.generation < generation for part in plan.parts), default=-1)
    later = [min(plan.parts) for plan in plans if plan.generation > generation]
    recorded = _published_rows(table, generation)
    end = min(later, default=max(recorded) + 1 if recorded else None)
    in_later_folders = {part for number in others if number > generation for part in table.parts_in_folder(number)}
    for part in table.published_parts():
        is_of_listing = part >= first and (part not in in_later_folders if end is None else part < end)
        if is_of_listing and part not in rows:
            recorded[part] = _num_rows(table, part) or recorded.get(part, 0)
    certain = {part: num_rows for part, num_rows in (recorded | rows).items() if num_rows}
    largest, last = max(certain.values(), default=0), max(certain, default=first - 1)
    return {part: certain.get(part, largest) for part in range(first, last + 1)}, last + 1 == end


def _readable_plan(table: CaptionsTable, generation: int) -> Plan | None:
    with suppress(DamagedFileError):
        return table.read_plan(generation)
    return None


def _published_rows(table: CaptionsTable, generation: int) -> dict[int, int]:
    """Return the number of rows of each part, as the record of a published listing tells it; 0 where it does not.

    {} where it is not published, or the record is damaged.
    """
    if not table.is_published(generation):
        return {}
    with suppress(DamagedFileError):
        files = table.published_files(generation)
        rows = dict.fromkeys(files, 0)
        for part, file in files.items():
            counts = TableCounts()
            counts.add_record(file["counts"] or {"ok": 0, "failed_by_reason": {}, "by_fingerprint": {}})
            rows[part] = counts.ok + counts.failed
        return rows
    return {}


def _num_rows(table: CaptionsTable, part: int) -> int:
    """Return the number of rows of a published part; 0 where it is not there or damaged."""
    with suppress(DamagedFileError):
        return int(table.directory.read_table(captions_name(part), ["image_id"]).num_rows)
    return 0


def _restore_plan_parts(table: CaptionsTable, source: Source, recheck: bool) -> list[str]:
    """Write each plan part that is damaged or missing: by listing the source again, or from the published table."""
    problems = []
    for plan in table.plans():
        parts = _changed_plan_parts(table, plan) if not recheck else sorted(plan.parts)
        damaged = {part: damage for part in parts if (damage := damage_of_plan_part(table, plan, part))}
        if not damaged:
            continue
        if plan.adds_parts:
            _list_again(table, source, plan, damaged)
            table.write_plan(plan)
            problems += [f"{damage}; it is made again by listing the source" for damage in damaged.values()]
            continue
        indices = {part: _rows_planned_again(table, plan, part) for part in damaged}
        if not any(numbers is None for numbers in indices.values()):
            for part, numbers in indices.items():
                assert numbers is not None
                rows = current_plan_rows(table, part, before=plan.generation).take(numbers)
                write_rows_again(table, plan, part, rows, numbers)
            table.write_plan(plan)
            problems += [f"{damage}; it is made again from captions/" for damage in damaged.values()]
        elif not table.is_published(plan.generation):
            _forget(table, plan)
            problems += [f"{damage}; the list of what to caption again is lost" for damage in damaged.values()]
    return problems


def _changed_plan_parts(table: CaptionsTable, plan: Plan) -> list[int]:
    """Return the parts of a plan whose files do not look as they did when plan.json was written after them."""
    files = table.directory.list_files(plan_folder(plan.generation))
    record = files.get(posixpath.basename(plan_name(plan.generation)))

    def is_unchanged(part: int) -> bool:
        file = files.get(posixpath.basename(plan_part_name(plan.generation, part)))
        return file is not None and file.is_unchanged(plan.num_bytes.get(part), record)

    return [part for part in sorted(plan.parts) if not is_unchanged(part)]


def damage_of_plan_part(table: CaptionsTable, plan: Plan, part: int) -> str:
    """Return in words how a plan part is damaged, or ""."""
    name = plan_part_name(plan.generation, part)
    try:
        table.read_plan_part(plan, part, ["image_id"] if plan.adds_parts else ["image_id", "part_row"])
        with table.directory.open_parquet(name) as file:
            rows_per_chunk = file.metadata.row_group(0).num_rows
    except DamagedFileError as error:
        return _what(error)
    if rows_per_chunk != min(plan.rows_per_chunk, plan.parts[part]):
        return f"{table.directory.shown(name)} is damaged: it holds another part of a plan"
    return ""


def _list_again(table: CaptionsTable, source: Source, plan: Plan, damaged: dict[int, str]) -> None:
    """Write damaged plan parts from a new listing. Raises OutputError where the source has changed since.

    The ids of a published part are known. The rows of the other parts are those that no part has, in the order of the
    listing, which is the same as long as the source is.
    """
    listed = _unplanned_rows(table, source, plan, set(damaged))
    ids = {part: published for part in damaged if (published := _published_ids(table, part, plan.parts[part]))}
    is_published = pc.is_in(
        listed["image_id"],
        pa.concat_arrays([pa.array([], pa.string()), *(chunk for column in ids.values() for chunk in column.chunks)]),
    )
    rest = listed.filter(pc.invert(is_published))
    expected = sum(plan.parts[part] for part in damaged if part not in ids)
    if table.info["source"].get("limit") is not None or plan.may_lack_images:
        rest = rest.slice(0, expected)
    for part, damage in damaged.items():
        num_rows = plan.parts[part]
        if part in ids:
            rows = listed.take(pc.index_in(ids[part], listed["image_id"]).drop_null())
        else:
            rows = rest.slice(0, num_rows if rest.num_rows == expected else 0)
            rest, expected = rest.slice(num_rows), expected - num_rows
        if rows.num_rows != num_rows:
            raise OutputError(
                f"{damage}, and {source.name} has changed since it was listed; restore the file or the source from a "
                "backup, or start again with --overwrite"
            )
        name = plan_part_name(plan.generation, part)
        metadata = plan_part_mark(table, name)
        if part == max(plan.parts) and not plan.may_lack_images:
            metadata[PLAN_FACTS] = json.dumps(plan.to_json()).encode()
        rows = rows.combine_chunks().replace_schema_metadata(metadata)
        table.directory.write_table(name, rows, plan.rows_per_chunk)


def _published_ids(table: CaptionsTable, part: int, num_rows: int) -> pa.ChunkedArray | None:
    """Return the ids of a published part; None where there is none that can be trusted."""
    try:
        rows = table.directory.read_table(captions_name(part), ["image_id", "chunk_id"])
    except DamagedFileError:
        return None
    is_whole = rows.num_rows == num_rows and pc.all(pc.match_substring(rows["chunk_id"], f"-{part:05d}-")).as_py()
    return rows["image_id"] if is_whole else None


def _unplanned_rows(table: CaptionsTable, source: Source, plan: Plan, damaged: set[int]) -> pa.Table:
    """List the source, and return the rows that are in no part of any plan but the damaged ones."""
    schema = pa.schema([*PLAN_SCHEMA, *table.kept_fields])
    tables = [schema.empty_table()]
    with IdIndex() as planned:
        for other in table.plans():
            for part in other.parts if other.adds_parts else ():
                if other.generation != plan.generation or part not in damaged:
                    with suppress(DamagedFileError):  # of a later plan, whose turn comes
                        planned.add(table.read_plan_part(other, part, ["image_id"])["image_id"])
        for _, listing in list_units(source, list(source.units())):
            is_planned = planned.contains(listing.rows["image_id"])
            tables.append(with_kept_types(table, listing.rows.filter(pa.array(~is_planned))))
    return pa.concat_tables(tables, promote_options="default")


def _rows_planned_again(table: CaptionsTable, plan: Plan, part: int) -> npt.NDArray[np.int64] | None:
    """Return the rows of a published part that a damaged plan captions again; None where nothing tells them."""
    names = ["image_id", "generation", *table.counted_columns]
    rows = table.directory.read_table(captions_name(part), names)
    with suppress(DamagedFileError):
        older = table.directory.read_table(history_name(plan.generation, part), ["image_id"])["image_id"]
        indices = pc.index_in(older, rows["image_id"])
        if len(older) == plan.parts[part] and not indices.null_count:
            return np.sort(indices.to_numpy())
    candidates = [pc.equal(rows["generation"], plan.generation).to_numpy()]
    if plan.kind == "retry":
        candidates.append(failed_rows(table, rows))
    for mask in candidates:
        indices = np.flatnonzero(mask)
        if len(indices) == plan.parts[part]:
            return indices
    return None


def _forget(table: CaptionsTable, plan: Plan) -> None:
    """Delete an unpublished plan that captions rows again. Raises OutputError where some rows are in captions/."""
    for part in plan.parts:
        generations = table.directory.read_table(captions_name(part), ["generation"])["generation"]
        if pc.any(pc.greater_equal(generations, plan.generation)).as_py():
            raise OutputError(
                f"{table.directory.shown(plan_name(plan.generation))}: a part of this plan is damaged, and some of its "
                "rows are published; restore it from a backup, or start again with --overwrite"
            )
    for chunk_id in table.committed_chunks(plan.generation):
        table.directory.delete(table.chunk_name(chunk_id))
    table.directory.delete(plan_name(plan.generation))
    table.directory.delete_folder(plan_folder(plan.generation))


def _what(error: DamagedFileError) -> str:
    """Return what happened to the file, without the way out."""
    return str(error).rpartition("; ")[0]


def _reopen_damaged_parts(table: CaptionsTable, recheck: bool) -> list[str]:
    """Make the generations of damaged published parts unfinished again; return a sentence for each file.

    Each published part that may have changed is read once. A damaged one is deleted: a run then captions its rows and
    publishes it, as after a kill in the middle of publishing. The order of the steps does not matter to a start that
    finds some of them done.
    """
    problems = []
    plans = table.plans()
    for plan in plans:
        if table.is_published(plan.generation) and (problem := _damage_of_record(table, plan)):
            table.directory.delete(published_name(plan.generation))
            problems.append(f"{problem}; it is made again from captions/")
    files = recorded_files(table)
    present = table.published_parts()
    unchanged = set() if recheck else unchanged_parts(table, plans, files)
    for plan in plans:
        for part in sorted(plan.parts) if plan.adds_parts else ():
            if part in unchanged or (part not in present and not table.is_published(plan.generation)):
                continue
            problem = damage_of_part(table, plan, part, files.get(part))
            if problem:
                _reopen(table, plans, plan, part)
                problems.append(f"{problem}; captioning {counted(plan.parts[part], 'image')} again")
    return problems


def unchanged_parts(table: CaptionsTable, plans: list[Plan], files: dict[int, dict[str, Any]]) -> set[int]:
    """Return the published parts whose files look as they did when their record was written after them.

    `files`: see `recorded_files`.
    """
    records: dict[int, FileStat | None] = {}  # the latest one of each part
    for plan in plans:
        is_published = table.is_published(plan.generation)
        if is_published or plan.adds_parts:
            name = (published_name if is_published else publishing_name)(plan.generation)
            record = table.directory.list_files(plan_folder(plan.generation)).get(posixpath.basename(name))
            records |= dict.fromkeys(plan.parts, record)
    stats = table.directory.list_files("captions")
    return {
        part
        for part, file in files.items()
        if (stat := stats.get(posixpath.basename(captions_name(part)))) is not None
        and stat.is_unchanged(int(file["num_bytes"]), records.get(part))
    }


def recorded_files(table: CaptionsTable) -> dict[int, dict[str, Any]]:
    """Return for each published part the "sha256", "num_bytes" and "counts" recorded when it was last written.

    Parts that an unfinished generation may be replacing are left out. Raises DamagedFileError.
    """
    files: dict[int, dict[str, Any]] = {}
    for plan in table.plans():
        if table.is_published(plan.generation):
            files |= table.published_files(plan.generation)
        elif plan.adds_parts:
            files |= table.files_so_far(plan.generation)
        else:  # its publish may have been killed while it replaced these
            files = {part: file for part, file in files.items() if part not in plan.parts}
    return files


def damage_of_part(table: CaptionsTable, plan: Plan, part: int, recorded: dict[str, Any] | None) -> str:
    """Return in words how a published part is damaged, or "".

    A part that another program wrote anew, with rows of the planned images, is not damaged: `captioner verify` names
    it, and nobody's work is deleted.
    """
    name = captions_name(part)
    try:
        file = table.directory.read_checked(name)
        if recorded and file.sha256 == recorded["sha256"]:
            return ""
        if recorded and len(file.data) == recorded["num_bytes"]:
            return f"{table.directory.shown(name)} is damaged: its bytes are not those that were published"
        ids = table.directory.read_table(name, ["image_id"])["image_id"]
    except DamagedFileError as error:
        return _what(error)
    planned = table.read_plan_part(plan, part, ["image_id"])["image_id"]
    if not ids.equals(planned):
        return f"{table.directory.shown(name)} is damaged: its rows are not the planned images"
    return ""


def _damage_of_record(table: CaptionsTable, plan: Plan) -> str:
    try:
        table.published_files(plan.generation)
    except DamagedFileError as error:
        return _what(error)
    return ""


def _reopen(table: CaptionsTable, plans: list[Plan], plan: Plan, part: int) -> None:
    """Delete a part and the records that it was published."""
    for later in plans:
        if not later.adds_parts and part in later.parts and table.is_published(later.generation):
            files = table.published_files(later.generation)
            if files.pop(part, None):
                table.write_published(later.generation, files)
    table.directory.delete(published_name(plan.generation))
    table.directory.delete(captions_name(part))
