"""Rows that --retry-failed and --only caption again: what they had before is kept where the new row lacks it.

Plans of both have the column PREVIOUS. With --retry-failed it is the current row of each image that has a caption and
lacks the answer to another question: such an image is asked only the questions without an answer, if it and the model
are the same. With --only it is the current row of each image that has a caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import PREVIOUS, STATUS_OK, Prompts, error_column, prompt_column
from captioner.store.counts import failed_answers
from captioner.store.table import CaptionsTable

Mask = npt.NDArray[np.bool_]
# Columns that are those of the new row even where the previous answers are kept.
_OF_THE_CHUNK = ("generation", "run_id", "chunk_id", "chunk_row")


def without_answered(
    table: CaptionsTable, rows: pa.Table, prompts: list[Prompts], questions: Sequence[str], fingerprint: str
) -> list[Prompts]:
    """Return what to ask about each image, None in place of the prompts of questions that are answered.

    `rows`: decoded, with PREVIOUS. `prompts`: of all `questions`, [N][questions].
    """
    previous = _previous_of(rows)
    same, failed = _is_same(previous, rows, fingerprint), _failed(table, previous)
    return [
        tuple(
            prompt if not same[index] or (name in failed and failed[name][index]) else None
            for name, prompt in zip(questions, of_image, strict=True)
        )
        for index, of_image in enumerate(prompts)
    ]


def with_previous(table: CaptionsTable, decoded: pa.Table, rows: pa.Table, fingerprint: str) -> pa.Table:
    """Return the new rows of a chunk with the answers that the previous ones have.

    A previous row stays as it is where the new one has no caption, unless the file has changed, and where another model
    has no answer that it has. `decoded`: the rows before captioning, with PREVIOUS.
    """
    previous = _previous_of(decoded)
    exists = np.asarray(previous["status"].is_valid())
    same, failed = _is_same(previous, decoded, fingerprint), _failed(table, previous)
    is_ok = _mask(pc.equal(rows["status"], STATUS_OK))
    other_file = _mask(pc.not_equal(previous["sha256"], decoded["sha256"]))
    nothing_lost = np.zeros(len(exists), bool)
    lost = reduce(np.logical_or, (new & ~failed[name] for name, new in _failed(table, rows).items()), nothing_lost)
    whole = exists & ~other_file & (~is_ok | (lost & ~same))
    question_of = {column: name for name in failed for column in _columns_of(table, name)}
    columns = []
    for field in table.schema:
        keep = whole | (exists & same & is_ok)
        if field.name in question_of:
            keep &= whole | ~failed[question_of[field.name]]
        if field.name in (*_OF_THE_CHUNK, *(kept.name for kept in table.kept_fields)):
            keep &= False
        columns.append(_chosen(keep, previous[field.name], rows[field.name]))
    return pa.Table.from_arrays(columns, schema=table.schema)


def _previous_of(rows: pa.Table) -> pa.Table:
    """Return the previous rows; where there is none, all its values are null."""
    previous = rows[PREVIOUS].combine_chunks()
    return pa.Table.from_arrays(previous.flatten(), names=[field.name for field in previous.type])


def _is_same(previous: pa.Table, rows: pa.Table, fingerprint: str) -> Mask:
    """Return where the same bytes were captioned by the same model."""
    same_file = pc.equal(previous["sha256"], rows["sha256"])
    return _mask(pc.and_(same_file, pc.equal(previous["fingerprint"], fingerprint)))


def _failed(table: CaptionsTable, rows: pa.Table) -> Mapping[str, Mask]:
    return {name: _mask(mask) for name, mask in failed_answers(rows, table.answer_columns).items()}


def _mask(values: pa.ChunkedArray) -> Mask:
    mask: Mask = pc.fill_null(values, False).to_numpy()
    return mask


def _columns_of(table: CaptionsTable, question: str) -> list[str]:
    return [*table.answer_columns[question], prompt_column(question), error_column(question)]


def _chosen(keep: Mask, previous: pa.ChunkedArray, new: pa.ChunkedArray) -> pa.Array:
    """Return the previous value of a column where `keep`, else the new one."""
    both = pa.concat_arrays([*previous.cast(new.type).chunks, *new.chunks])
    indices = np.arange(len(keep))
    return both.take(pa.array(np.where(keep, indices, indices + len(keep))))
