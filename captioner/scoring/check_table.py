"""The whole check of a table: scores of a sample against references, flags of every row, what the run's captions share.

    first pass    survey of all rows; which rows are drawn for scoring
    second pass   the drawn rows are scored, flags of the run are set, OUT/checks/part-*.parquet written

Two passes over a few columns of the table; memory does not grow with its length. A file of references is held whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from captioner.scoring.eligible_rows import Chooser, Question
from captioner.scoring.row_checks import Judge
from captioner.scoring.sample import Draw
from captioner.scoring.scores import Scores
from captioner.scoring.table_stats import COLUMNS, Survey
from captioner.store.read import read_parts
from captioner.store.table import CaptionsTable

CHECK_FILE = "checks/check.json"
_OWN_REFERENCES = "the source's own"
_PIECE_ROWS = 2_000


@dataclass
class Check:
    """What was found. `shown` holds rows for people to look at, by why they are shown."""

    scores: Scores
    survey: Survey
    flags: Counter[str]
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
    changes: dict[str, Any] | None = None  # by the latest recaptioning

    def summary(self) -> dict[str, Any]:
        """The figures that run.json holds."""
        names = ("num_rows", "wer", "interval", "shuffled_wer", "lift", "cider_d", "normalisation")
        scores = self.scores.to_json()
        return {name: scores[name] for name in names} | {"flags": dict(self.flags.most_common())}

    def to_json(self) -> dict[str, Any]:
        """What OUT/checks/check.json holds."""
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
            "wer_histogram": self.wer_histogram,
            "wer_by_confidence": self.wer_by_confidence,
            "survey": self.survey.to_json(),
            "shown": self.shown,
            "comparison": self.comparison,
            "changes": self.changes,
        }


def check_table(table: CaptionsTable, question: Question) -> Check:
    """Check the rows committed so far and write OUT/checks/part-*.parquet.

    Raises UsageError where references are given and fit no picture.
    """
    chooser = Chooser(table, question)
    survey, drawn = Survey(), Draw[None](question.sample if isinstance(question.sample, int) else 0)
    every = _every(table, question)
    for rows in read_parts(table, chooser.columns(COLUMNS), every):
        survey.add(rows)
        for piece in _pieces(rows):
            for row in chooser.eligible(piece):
                drawn.offer(row.place, row.image_id, None)
    chooser.settle(drawn)
    table.directory.delete_folder("checks")  # what an older check left is no part of this one
    judge = Judge(question, survey)
    columns = chooser.columns([*COLUMNS, "flags", "chunk_id", "chunk_row"])
    for part, rows in enumerate(read_parts(table, columns, every)):
        checked = [judge.rows(piece, chooser.drawn(piece)) for piece in _pieces(rows)]
        table.directory.write_table(f"checks/part-{part:05d}.parquet", pa.concat_tables(checked))
    return _finish(question, survey, chooser, judge)


def _pieces(rows: pa.Table) -> Iterator[pa.Table]:
    """A part in pieces: as Python's objects its rows take many times their memory. An empty part is one piece."""
    return (rows.slice(first, _PIECE_ROWS) for first in range(0, max(rows.num_rows, 1), _PIECE_ROWS))


def _every(table: CaptionsTable, question: Question) -> int:
    planned = sum(plan.num_rows for plan in table.plans() if plan.adds_parts)
    return 1 if question.max_rows is None else max(1, -(-planned // question.max_rows))


def _finish(question: Question, survey: Survey, chooser: Chooser, judge: Judge) -> Check:
    given = question.references
    return Check(
        scores=judge.sums.scores(),
        survey=survey,
        flags=judge.flags,
        with_references=chooser.num_eligible,
        trained_left_out=chooser.num_trained,
        references=given.name if given else _OWN_REFERENCES if chooser.num_eligible else None,
        unmatched=given.unmatched() if given else (0, []),
        wer_histogram=judge.wer_histogram(),
        wer_by_confidence=judge.wer_by_confidence(),
        shown=judge.shown(),
        sample=question.sample,
        seed=question.seed,
    )
