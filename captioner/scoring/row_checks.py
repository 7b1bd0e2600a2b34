"""Score and flag the rows of a table, and select rows for people to look at."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import STATUS_OK
from captioner.scoring.eligible_rows import CheckSpec, EligibleRow
from captioner.scoring.flags import ALL_FLAGS, FAULTS, RUN_FLAGS
from captioner.scoring.language import is_in_other_language
from captioner.scoring.sample import LowestRanks, rank
from captioner.scoring.scores import ScoreSums
from captioner.scoring.table_stats import TableStats
from captioner.scoring.terms import term_finder
from captioner.scoring.wer import Edits, Match, match_captions

SHOWN_RANDOM, SHOWN_FLAGGED, SHOWN_WORST, SHOWN_BEST = 24, 12, 20, 3
NUM_GROUPS, MIN_ROWS_TO_GROUP = 10, 50  # groups of equal size by log-probability

# One row for each row of the captions table, in its order; null where the row was not scored.
CHECKS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("flags", pa.list_(pa.string()), nullable=False),
        pa.field("wer", pa.float64()),
        pa.field("substitutions", pa.int32()),
        pa.field("deletions", pa.int32()),
        pa.field("insertions", pa.int32()),
        pa.field("words", pa.int32()),
        pa.field("reference", pa.string()),
    ]
)


@dataclass
class _CheckedRow:
    """One row of the captions table with its flags; `scored` is None when it is not in the sample."""

    image_id: str
    caption: str | None
    logprob_mean: float | None
    chunk_id: str
    chunk_row: int
    flags: list[str]
    scored: EligibleRow | None = None
    match: Match | None = None

    @property
    def edits(self) -> Edits | None:
        return None if self.match is None else self.match.best_edits

    @property
    def reference(self) -> str | None:
        """The best reference."""
        return None if self.scored is None or self.match is None else self.scored.references[self.match.best]

    def to_json(self) -> dict[str, Any]:
        """Return the row as check.json shows it."""
        names = ("image_id", "caption", "logprob_mean", "flags", "chunk_id", "chunk_row")
        values = {name: getattr(self, name) for name in names}
        return values if self.edits is None else values | {"wer": self.edits.rate, "reference": self.reference}


class RowChecker:
    """Checks the parts of a table one after the other and sums their scores and flags."""

    def __init__(self, spec: CheckSpec, stats: TableStats) -> None:
        self._seed = spec.seed
        self._repeated, self._low_logprob = stats.repeated, stats.low_logprob
        self._language = spec.language or stats.language
        self._contains_term = term_finder(spec.terms)
        self.sums = ScoreSums(spec.seed)
        self.flags: Counter[str] = Counter()
        self.num_faulty = 0  # captions with at least one flag of FAULTS
        self._by_logprob: dict[int, list[int]] = {}  # log-probability in hundredths -> rows, edits, words
        self._random: LowestRanks[dict[str, Any]] = LowestRanks(SHOWN_RANDOM)
        self._flagged = {flag: LowestRanks[dict[str, Any]](SHOWN_FLAGGED) for flag in ALL_FLAGS}
        self._worst, self._best = LowestRanks[dict[str, Any]](SHOWN_WORST), LowestRanks[dict[str, Any]](SHOWN_BEST)

    def check(self, rows: pa.Table, sampled: list[EligibleRow]) -> pa.Table:
        """Return the rows of CHECKS_SCHEMA for `rows`; `sampled`: those of them to score."""
        checked = _checked_rows(rows)
        matches = match_captions([row.caption for row in sampled], [row.references for row in sampled])
        for eligible, match in zip(sampled, matches, strict=True):
            row = checked[eligible.index]
            row.scored, row.match = eligible, match
            self._add_score(eligible, match, row.logprob_mean)
        for row in checked:
            if row.caption is not None:
                row.flags += self._run_flags(row.caption, row.logprob_mean)
                self.flags.update(row.flags)
                self.num_faulty += not FAULTS.isdisjoint(row.flags)
                self._offer(row)
        return _checks_table(checked)

    def _add_score(self, row: EligibleRow, match: Match, logprob: float | None) -> None:
        self.sums.add(row.rank, row.image_id, row.caption, row.references, match)
        if logprob is not None:
            sums = self._by_logprob.setdefault(max(-1_000, int(logprob * 100)), [0, 0, 0])
            sums[0] += 1
            sums[1] += match.best_edits.edits
            sums[2] += match.best_edits.words

    def _run_flags(self, caption: str, logprob: float | None) -> list[str]:
        """Return the flags of a caption compared with the others of its run, in the order of RUN_FLAGS."""
        low, language = self._low_logprob, self._language
        applies = {
            "same_caption": caption in self._repeated,
            "low_confidence": logprob is not None and low is not None and logprob < low,
            "other_language": language is not None and is_in_other_language(caption, language),
            "listed_term": self._contains_term(caption),
        }
        return [flag for flag in RUN_FLAGS if applies[flag]]

    def _offer(self, row: _CheckedRow) -> None:
        """Offer a row to the samples that the report shows."""
        row_rank, shown = rank(row.image_id, self._seed), row.to_json()
        if row.edits is not None:
            rate = int(row.edits.rate * 1e6)
            self._worst.offer(-rate, row.image_id, shown)
            self._best.offer(rate, row.image_id, shown)
        self._random.offer(row_rank, row.image_id, shown)
        for flag in row.flags:
            if flag in self._flagged:
                self._flagged[flag].offer(row_rank, row.image_id, shown)

    def shown(self) -> dict[str, list[dict[str, Any]]]:
        """Return the rows to show by reason: drawn at random, worst, best, and for each flag."""
        rows = {"random": list(self._random), "worst": list(self._worst), "best": list(self._best)}
        return rows | {flag: list(sample) for flag, sample in self._flagged.items() if len(sample)}

    def wer_histogram(self) -> list[int]:
        """Return the number of captions by WER in steps of 0.1; the first is exactly 0, the last is 2 and more."""
        counts = [0] * 22
        for (edits, words), count in self.sums.rows.items():
            rate = edits / words if words else float(edits)
            counts[0 if not edits else min(21, 1 + int(rate * 10))] += count
        return counts

    def wer_by_confidence(self) -> list[dict[str, float]]:
        """Return the corpus WER of ten groups of equal size, lowest log-probability first; empty below 50 captions."""
        total = sum(rows for rows, _, _ in self._by_logprob.values())
        if total < MIN_ROWS_TO_GROUP:
            return []
        groups = [_Group() for _ in range(NUM_GROUPS)]
        num_before = 0
        for hundredths, (rows, edits, words) in sorted(self._by_logprob.items()):
            group = groups[min(NUM_GROUPS - 1, num_before * NUM_GROUPS // total)]
            group.logprobs.append(hundredths / 100)
            group.rows, group.edits, group.words = group.rows + rows, group.edits + edits, group.words + words
            num_before += rows
        return [
            {"logprob_from": group.logprobs[0], "rows": group.rows, "wer": group.edits / group.words}
            for group in groups
            if group.words
        ]


@dataclass
class _Group:
    """Sums of scored rows with similar log-probabilities."""

    logprobs: list[float] = field(default_factory=list)
    rows: int = 0
    edits: int = 0
    words: int = 0


def _checked_rows(rows: pa.Table) -> list[_CheckedRow]:
    captions = pc.if_else(pc.equal(rows["status"], STATUS_OK), rows["caption"], None)
    columns = [rows["image_id"], captions, *(rows[name] for name in ("logprob_mean", "chunk_id", "chunk_row", "flags"))]
    return [
        _CheckedRow(image_id, caption, logprob, chunk_id, chunk_row, flags if flags and caption is not None else [])
        for image_id, caption, logprob, chunk_id, chunk_row, flags in zip(
            *(column.to_pylist() for column in columns), strict=True
        )
    ]


def _checks_table(checked: list[_CheckedRow]) -> pa.Table:
    edits = [row.edits for row in checked]
    columns: dict[str, Any] = {
        "image_id": [row.image_id for row in checked],
        "flags": [row.flags for row in checked],
        "wer": [row_edits and row_edits.rate for row_edits in edits],
        "reference": [row.reference for row in checked],
    }
    for name in ("substitutions", "deletions", "insertions", "words"):
        columns[name] = [row_edits and getattr(row_edits, name) for row_edits in edits]
    return pa.table(columns, schema=CHECKS_SCHEMA)
