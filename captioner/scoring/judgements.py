"""The judged captions in OUT/checks/judge: their columns, and the scores of rows of the table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import CAPTIONS_SCHEMA
from captioner.store.table import CaptionsTable, part_numbers

JUDGE_FOLDER, JUDGE_FILE = "checks/judge", "checks/judge.json"
OBJECTS_FOLDER, OBJECTS_FILE = "checks/objects", "checks/objects.json"

# One row for each caption; scores are null where the image could not be compared, for the reason in `error`.
JUDGE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        CAPTIONS_SCHEMA.field("created_at"),  # of the caption: a later caption of the image has no score
        pa.field("clip_score", pa.float32()),
        pa.field("clip_score_others", pa.float32()),  # mean of the same caption on other images
        pa.field("lift", pa.float32()),  # the difference of the two
        pa.field("ref_clip_score", pa.float32()),  # null without references
        pa.field("retrieved", pa.bool_()),  # no other image scores as high
        pa.field("num_others", pa.int32()),
        pa.field("error", pa.string(), nullable=False),
    ]
)


def judge_name(part: int) -> str:
    """Return the name of the file with the scores of a part of the table."""
    return f"{JUDGE_FOLDER}/part-{part:05d}.parquet"


def objects_name(part: int) -> str:
    """Return the name of the file with what a chat model says of the captions of a part of the table."""
    return f"{OBJECTS_FOLDER}/part-{part:05d}.parquet"


def judged_parts(table: CaptionsTable) -> Iterator[int]:
    """Yield the parts of the table that are judged."""
    yield from sorted(part_numbers(table.directory.list_names(JUDGE_FOLDER)))


def lifts_of(table: CaptionsTable, part: int, rows: pa.Table) -> npt.NDArray[np.float32]:
    """Return the lift of each caption of a part, float32 [N]; NaN of those that were not judged since they were made.

    `rows`: of the part, with image_id and created_at.
    """
    if part not in set(judged_parts(table)):
        return np.full(len(rows), np.nan, np.float32)
    judged = table.directory.read_table(judge_name(part), ["image_id", "created_at", "lift"])
    indices = pc.index_in(rows["image_id"], value_set=judged["image_id"].combine_chunks())
    judged = judged.take(indices.combine_chunks() if isinstance(indices, pa.ChunkedArray) else indices)
    is_of_row = pc.fill_null(pc.equal(judged["created_at"], rows["created_at"]), False).to_numpy()
    lifts: npt.NDArray[np.float32] = pc.fill_null(judged["lift"], float("nan")).to_numpy()
    return np.where(is_of_row, lifts, np.float32("nan"))
