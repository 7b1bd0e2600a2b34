"""Plan images of a finished table to be captioned again; the rows that this replaces go to history/."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import PREVIOUS, STATUS_FAILED
from captioner.store.counts import any_failed_answer
from captioner.store.plan import MIN_ROWS_PER_CHUNK
from captioner.store.table import (
    PLAN_FACTS,
    CaptionsTable,
    Plan,
    Recaption,
    captions_name,
    plan_folder,
    plan_part_mark,
    plan_part_name,
)

REPLAN_COLUMNS = ("part_row", PREVIOUS)
RowIndices = dict[int, npt.NDArray[np.int64]]  # rows of the published table: part -> ascending indices in it


# Plan rows and their error codes -> the rows as the source lists them now.
Refresh = Callable[[pa.Table, list[str | None]], pa.Table]


def make_retry_plan(
    table: CaptionsTable, refresh: Refresh | None = None, indices: RowIndices | None = None
) -> Plan | None:
    """Plan a generation of the images that have failed, or of `indices`; `None` where there are none.

    An image has failed without a caption, or without the answer to another question. Every plan of the table must be
    published.
    """
    if indices is None:
        indices = {}
        for part in generation_of_parts(table):
            rows = table.directory.read_columns(captions_name(part), table.counted_columns)
            indices[part] = np.flatnonzero(failed_rows(table, rows))
    return plan_rows_again(table, "retry", indices, table.plans()[0].rows_per_chunk, refresh=refresh)


def failed_rows(table: CaptionsTable, rows: pa.Table) -> npt.NDArray[np.bool_]:
    """Return which rows have no caption, or no answer to another question. `rows`: with `counted_columns`."""
    without_answer = any_failed_answer(rows, table.answer_columns)
    mask: npt.NDArray[np.bool_] = pc.or_(pc.equal(rows["status"], STATUS_FAILED), without_answer).to_numpy()
    return mask


def plan_rows_again(
    table: CaptionsTable,
    kind: str,
    indices: RowIndices,
    rows_per_chunk: int,
    recaption: Recaption | None = None,
    refresh: Refresh | None = None,
) -> Plan | None:
    """Freeze the rows at `indices` as the next generation; `None` where there are none. Few rows get small chunks."""
    plans = table.plans()
    generation = plans[-1].generation + 1
    table.directory.delete_folder(plan_folder(generation))  # left by a planning that was killed
    parts = {part: len(rows) for part, rows in indices.items() if len(rows)}
    if not parts:
        return None
    rows_per_chunk = min(rows_per_chunk, max(MIN_ROWS_PER_CHUNK, -(-sum(parts.values()) // 64)))
    plan = Plan(generation, kind, rows_per_chunk, parts, recaption=recaption)
    for part in parts:
        rows = current_plan_rows(table, part, plans=plans).take(indices[part])
        if refresh is not None:
            codes = table.directory.read_table(captions_name(part), ["error_code"])["error_code"].take(indices[part])
            rows = refresh(rows, codes.to_pylist())
        write_rows_again(table, plan, part, rows, indices[part])
    table.write_plan(plan)
    return plan


def current_plan_rows(
    table: CaptionsTable, part: int, before: int | None = None, plans: Sequence[Plan] | None = None
) -> pa.Table:
    """Return the plan rows of a part, each as the latest generation has it: it may have been planned anew.

    `before`: leave out this generation and later ones. `plans`: those of the table, where the caller has read them.
    """
    plans = table.plans() if plans is None else plans
    first, *later = (plan for plan in plans if part in plan.parts)
    rows = table.read_plan_part(first, part)
    for plan in later:
        if before is None or plan.generation < before:
            newer = table.read_plan_part(plan, part)
            rows = with_newer_values(rows, newer["part_row"].to_numpy(), without_replan_columns(newer))
    return rows


def with_newer_values(rows: pa.Table, indices: npt.NDArray[np.int64], newer: pa.Table) -> pa.Table:
    """Return `rows` with the row at `indices[i]` replaced by row i of `newer`, which may have more columns."""
    both = pa.concat_tables(
        [rows.replace_schema_metadata(), newer.replace_schema_metadata()], promote_options="default"
    )
    order = np.arange(rows.num_rows)
    order[indices] = rows.num_rows + np.arange(len(indices))
    return both.take(order).combine_chunks()


def write_rows_again(
    table: CaptionsTable, plan: Plan, part: int, rows: pa.Table, indices: npt.NDArray[np.int64]
) -> None:
    """Write a plan part. `rows`: of the plan; `indices`: where they are in the published part."""
    name = plan_part_name(plan.generation, part)
    rows = rows.append_column(pa.field("part_row", pa.int64()), pa.array(indices, pa.int64()))
    if plan.recaption or table.answer_columns:
        rows = rows.append_column(PREVIOUS, _previous_rows(table, plan, part, indices))
    metadata = {PLAN_FACTS: json.dumps(plan.to_json()).encode()} | plan_part_mark(table, name)
    table.directory.write_table(name, rows.replace_schema_metadata(metadata), plan.rows_per_chunk)


def _previous_rows(table: CaptionsTable, plan: Plan, part: int, indices: npt.NDArray[np.int64]) -> pa.StructArray:
    """Return the current rows of a part at `indices`, null where nothing of them may be kept (see `store.previous`)."""
    rows = table.directory.read_table(captions_name(part), table.schema.names).take(indices).combine_chunks()
    arrays = [column.combine_chunks() for column in rows.columns]
    if plan.recaption:
        may_be_kept = pc.not_equal(rows["status"], STATUS_FAILED)
    else:
        may_be_kept = any_failed_answer(rows, table.answer_columns)
    fields = [field.with_nullable(True) for field in rows.schema]
    return pa.StructArray.from_arrays(arrays, fields=fields, mask=pc.invert(may_be_kept).combine_chunks())


def num_kept(table: CaptionsTable, plan: Plan) -> int:
    """Return how many rows of a published plan of --only are those of before: its model had no caption for them."""
    assert plan.recaption is not None
    number = 0
    for part in plan.parts:
        rows = table.directory.read_columns(captions_name(part), ["generation", "fingerprint"])
        is_other = pc.not_equal(rows["fingerprint"], plan.recaption.fingerprint)
        number += pc.sum(pc.and_(pc.equal(rows["generation"], plan.generation), is_other)).as_py() or 0
    return number


def without_replan_columns(rows: pa.Table) -> pa.Table:
    """Return plan rows without the columns that only plans of rows that are captioned again have."""
    return rows.drop_columns([name for name in REPLAN_COLUMNS if name in rows.column_names])


def image_ids(table: CaptionsTable) -> Iterator[str]:
    """Yield the id of every image of the table, captioned or not."""
    for plan in table.plans():
        for part in sorted(plan.parts) if plan.adds_parts else ():
            yield from table.read_plan_part(plan, part, ["image_id"])["image_id"].to_pylist()


def generation_of_parts(table: CaptionsTable) -> dict[int, int]:
    """Return every part of the table in its order, with the generation that created it."""
    return {part: plan.generation for plan in table.plans() if plan.adds_parts for part in sorted(plan.parts)}
