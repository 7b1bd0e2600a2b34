"""Check a table: score a sample against references, flag every row, and collect statistics of all captions.

    first pass    collect statistics of all rows and draw the sample
    second pass   score the sample, set the flags and write OUT/checks/part-*.parquet

Each pass reads a few columns, one part at a time; memory does not grow with the table. References are kept in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from captioner.scoring.eligible_rows import CheckSpec, RowSelector
from captioner.scoring.judgements import JUDGE_FILE, OBJECTS_FILE
from captioner.scoring.row_checks import RowChecker
from captioner.scoring.sample import LowestRanks
from captioner.scoring.scores import Scores
from captioner.scoring.table_stats import COLUMNS, TableStats
from captioner.store.read import read_parts
from captioner.store.table import CaptionsTable

CHECK_FILE = "checks/check.json"
_OWN_REFERENCES = "the source's own"
_SLICE_ROWS = 2_000


@dataclass
class Check:
    """The result of a check.

    `num_faulty`: captions with at least one flag of `captioner.scoring.flags.FAULTS`. `shown`: rows for the report, by
    the reason why they are shown.
    """

    scores: Scores
    stats: TableStats
    flags: Counter[str]
    num_faulty: int
    with_references: int
    trained_left_out: int
    references: str | None
    unmatched: tuple[int, list[str]]
    wer_histogram: list[int]
    wer_by_confidence: list[dict[str, float]]
    shown: dict[str, list[dict[str, Any]]]
    sample: int | str
    seed: int
    comparison: dict[str, Any] | None = None
    changes: dict[str, Any] | None = None  # of the latest recaptioning, see `compare_recaptioned`
    spot_check: dict[str, Any] | None = None  # by people, see `captioner.scoring.verdicts.figures`

    def summary(self) -> dict[str, Any]:
        """Return the figures that run.json holds."""
        names = ("num_rows", "wer", "interval", "shuffled_wer", "lift", "cider_d", "unit", "normalisation")
        scores = self.scores.to_json()
        return {name: scores[name] for name in names} | {"flags": dict(self.flags.most_common())}

    def to_json(self) -> dict[str, Any]:
        """Return the contents of OUT/checks/check.json."""
        return {
            **self.scores.to_json(),
            "sample": self.sample,
            "seed": self.seed,
            "with_references": self.with_references,
            "trained_left_out": self.trained_left_out,
            "references": self.references,
            "references_unmatched": self.unmatched[0],
            "references_unmatched_examples": self.unmatched[1],
            "flags": dict(self.flags.most_common()),
            "num_faulty": self.num_faulty,
            "wer_histogram": self.wer_histogram,
            "wer_by_confidence": self.wer_by_confidence,
            "survey": self.stats.to_json(),
            "shown": self.shown,
            "comparison": self.comparison,
            "changes": self.changes,
            "spot_check": self.spot_check,
        }


def check_table(table: CaptionsTable, spec: CheckSpec) -> Check:
    """Check the rows committed so far and write OUT/checks/part-*.parquet.

    Raises UsageError when references are given and match no image.
    """
    selector = RowSelector(table, spec)
    stats, sample = TableStats(), LowestRanks[None](spec.sample if isinstance(spec.sample, int) else 0)
    every = _part_stride(table, spec)
    for rows in read_parts(table, selector.columns(COLUMNS), every):
        stats.add(rows)
        for rows_slice in _slices(rows):
            for row in selector.eligible(rows_slice):
                sample.offer(row.rank, row.image_id, None)
    selector.set_sample(sample)
    for name in table.directory.list_names("checks"):  # of an earlier check; the judges' figures stay
        if f"checks/{name}" not in (JUDGE_FILE, OBJECTS_FILE):
            table.directory.delete(f"checks/{name}")
    checker = RowChecker(spec, stats)
    columns = selector.columns([*COLUMNS, "flags", "chunk_id", "chunk_row"])
    for part, rows in enumerate(read_parts(table, columns, every)):
        checked = [checker.check(rows_slice, selector.sampled(rows_slice)) for rows_slice in _slices(rows)]
        table.directory.write_table(f"checks/part-{part:05d}.parquet", pa.concat_tables(checked))
    return _result(spec, stats, selector, checker)


def _slices(rows: pa.Table) -> Iterator[pa.Table]:
    """Yield a part in slices, since Python objects need many times the memory of Arrow. An empty part is one slice."""
    return (rows.slice(first, _SLICE_ROWS) for first in range(0, max(rows.num_rows, 1), _SLICE_ROWS))


def _part_stride(table: CaptionsTable, spec: CheckSpec) -> int:
    """Return n to read every n-th part, so that about `max_rows` rows are read."""
    planned = sum(plan.num_rows for plan in table.plans() if plan.adds_parts)
    return 1 if spec.max_rows is None else max(1, -(-planned // spec.max_rows))


def _result(spec: CheckSpec, stats: TableStats, selector: RowSelector, checker: RowChecker) -> Check:
    references = spec.references
    return Check(
        scores=checker.sums.scores(),
        stats=stats,
        flags=checker.flags,
        num_faulty=checker.num_faulty,
        with_references=selector.num_eligible,
        trained_left_out=selector.num_trained,
        references=references.name if references else _OWN_REFERENCES if selector.num_eligible else None,
        unmatched=references.unmatched() if references else (0, []),
        wer_histogram=checker.wer_histogram(),
        wer_by_confidence=checker.wer_by_confidence(),
        shown=checker.shown(),
        sample=spec.sample,
        seed=spec.seed,
    )
