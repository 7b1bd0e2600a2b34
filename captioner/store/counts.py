"""Count the rows of a table by status, error code and fingerprint."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import STATUS_FAILED

COUNTED = ["status", "error_code", "fingerprint"]  # the columns that are counted


@dataclass
class TableCounts:
    """The current rows of a table, or of a part, by status. `remaining`: planned images without a committed row."""

    planned: int = 0
    ok: int = 0
    failed: int = 0
    failed_by_reason: dict[str, int] = field(default_factory=dict)
    by_fingerprint: dict[str, int] = field(default_factory=dict)

    @property
    def remaining(self) -> int:
        return self.planned - self.ok - self.failed

    def add_rows(self, rows: pa.Table) -> None:
        """Count rows with the columns COUNTED."""
        failed = rows.filter(pc.equal(rows["status"], STATUS_FAILED))
        self.ok += rows.num_rows - failed.num_rows
        self.failed += failed.num_rows
        self.failed_by_reason = _sum(self.failed_by_reason, _counts_of(failed["error_code"]))
        self.by_fingerprint = _sum(self.by_fingerprint, _counts_of(rows["fingerprint"]))

    def add_record(self, record: dict[str, Any]) -> None:
        """Add the counts of a part, as `to_record` returned them."""
        self.ok += record["ok"]
        self.failed += sum(record["failed_by_reason"].values())
        self.failed_by_reason = _sum(self.failed_by_reason, record["failed_by_reason"])
        self.by_fingerprint = _sum(self.by_fingerprint, record["by_fingerprint"])

    def to_record(self) -> dict[str, Any]:
        """Return the counts of a part for the record of what was published."""
        return {"ok": self.ok, "failed_by_reason": self.failed_by_reason, "by_fingerprint": self.by_fingerprint}


def _counts_of(column: pa.ChunkedArray) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in column.value_counts().to_pylist()}


def _sum(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    """Return the sums by key, the largest first."""
    return dict((Counter(first) + Counter(second)).most_common())
