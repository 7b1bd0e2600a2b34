"""Plan images of a finished table to be captioned again; the rows that this replaces go to history/."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import STATUS_FAILED
from captioner.store.plan import MIN_ROWS_PER_CHUNK
from captioner.store.table import CaptionsTable, Plan, Recaption, captions_name, plan_folder, plan_part_name

RowIndices = dict[int, npt.NDArray[np.int64]]  # rows of the published table: part -> ascending indices in it


def make_retry_plan(table: CaptionsTable) -> Plan | None:
    """Plan a generation of the images whose current row is failed; `None` where there are none.

    Every plan of the table must be published.
    """
    failed = {}
    for part in generation_of_parts(table):
        status = table.directory.read_table(captions_name(part), ["status"])["status"]
        failed[part] = np.flatnonzero(pc.equal(status, STATUS_FAILED).to_numpy())
    return plan_rows_again(table, "retry", failed, table.plans()[0].rows_per_chunk)


def plan_rows_again(
    table: CaptionsTable, kind: str, indices: RowIndices, rows_per_chunk: int, recaption: Recaption | None = None
) -> Plan | None:
    """Freeze the rows at `indices` as the next generation; `None` where there are none. Few rows get small chunks."""
    generation = table.plans()[-1].generation + 1
    table.directory.delete_folder(plan_folder(generation))  # left by a planning that was killed
    parts = {part: len(rows) for part, rows in indices.items() if len(rows)}
    if not parts:
        return None
    rows_per_chunk = min(rows_per_chunk, max(MIN_ROWS_PER_CHUNK, -(-sum(parts.values()) // 64)))
    generation_of = generation_of_parts(table)
    for part in parts:
        rows = table.directory.read_table(plan_part_name(generation_of[part], part)).take(indices[part])
        rows = rows.append_column(pa.field("part_row", pa.int64()), pa.array(indices[part], pa.int64()))
        table.directory.write_table(plan_part_name(generation, part), rows, rows_per_chunk)
    plan = Plan(generation, kind, rows_per_chunk, parts, recaption=recaption)
    table.write_plan(plan)
    return plan


def generation_of_parts(table: CaptionsTable) -> dict[int, int]:
    """Return every part of the table in its order, with the generation that created it."""
    return {part: plan.generation for plan in table.plans() if plan.adds_parts for part in sorted(plan.parts)}
