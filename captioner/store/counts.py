"""Count the rows of a table by status, error code and fingerprint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import STATUS_FAILED, STATUS_OK, error_column

COUNTED = ["status", "error_code", "fingerprint"]  # the columns that are counted, besides those of answers


@dataclass
class TableCounts:
    """The current rows of a table, or of a part, by status.

    `remaining`: planned images without a committed row. `failed_answers`: images with a caption that have no answer to
    another question, by question.
    """

    planned: int = 0
    ok: int = 0
    failed: int = 0
    failed_by_reason: dict[str, int] = field(default_factory=dict)
    by_fingerprint: dict[str, int] = field(default_factory=dict)
    failed_answers: dict[str, int] = field(default_factory=dict)

    @property
    def remaining(self) -> int:
        return self.planned - self.ok - self.failed

    def add_rows(self, rows: pa.Table, answer_columns: Mapping[str, Sequence[str]]) -> None:
        """Count rows with the table's `counted_columns`. `answer_columns`: see `CaptionsTable`."""
        failed = rows.filter(pc.equal(rows["status"], STATUS_FAILED))
        self.ok += rows.num_rows - failed.num_rows
        self.failed += failed.num_rows
        self.failed_by_reason = _sum(self.failed_by_reason, _counts_of(failed["error_code"]))
        self.by_fingerprint = _sum(self.by_fingerprint, _counts_of(rows["fingerprint"]))
        masks = failed_answers(rows, answer_columns)
        self.failed_answers = _sum(
            self.failed_answers, {name: pc.sum(mask).as_py() or 0 for name, mask in masks.items()}
        )

    def add_record(self, record: dict[str, Any]) -> None:
        """Add the counts of a part, as `to_record` returned them."""
        self.ok += record["ok"]
        self.failed += sum(record["failed_by_reason"].values())
        self.failed_by_reason = _sum(self.failed_by_reason, record["failed_by_reason"])
        self.by_fingerprint = _sum(self.by_fingerprint, record["by_fingerprint"])
        self.failed_answers = _sum(self.failed_answers, record.get("failed_answers", {}))

    def to_record(self) -> dict[str, Any]:
        """Return the counts of a part for the record of what was published."""
        names = ("ok", "failed_by_reason", "by_fingerprint", "failed_answers")
        return {name: getattr(self, name) for name in names if getattr(self, name) or name != "failed_answers"}


def failed_answers(rows: pa.Table, answer_columns: Mapping[str, Sequence[str]]) -> dict[str, pa.ChunkedArray]:
    """Return for each question which rows have a caption, but no answer to it.

    A text that was cut is an answer, although it has a reason: the same model would cut it again.
    """
    is_ok = pc.equal(rows["status"], STATUS_OK)
    masks = {}
    for question, columns in answer_columns.items():
        without = [pc.is_null(rows[name]) for name in columns]
        masks[question] = reduce(pc.and_, without, pc.and_(is_ok, pc.is_valid(rows[error_column(question)])))
    return masks


def any_failed_answer(rows: pa.Table, answer_columns: Mapping[str, Sequence[str]]) -> pa.ChunkedArray:
    """Return which rows have a caption, but lack the answer to another question."""
    none = pc.and_(pc.equal(rows["status"], STATUS_OK), False)
    return reduce(pc.or_, failed_answers(rows, answer_columns).values(), none)


def _counts_of(column: pa.ChunkedArray) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in column.value_counts().to_pylist()}


def _sum(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    """Return the sums by key, the largest first."""
    return dict((Counter(first) + Counter(second)).most_common())
