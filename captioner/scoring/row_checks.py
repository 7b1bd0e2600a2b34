"""The rows of a check: scores and flags of each, and which of them people should see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import STATUS_OK
from captioner.scoring.eligible_rows import Eligible, Question
from captioner.scoring.flags import ALL_FLAGS
from captioner.scoring.language import language_of
from captioner.scoring.sample import Draw, rank
from captioner.scoring.scores import ScoreSums
from captioner.scoring.table_stats import Survey
from captioner.scoring.terms import finder
from captioner.scoring.wer import Match, match_captions

SHOWN_RANDOM, SHOWN_FLAGGED, SHOWN_WORST, SHOWN_BEST = 24, 12, 20, 3

# One row for each row of the captions table, in its order. What was not scored has nulls.
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


class Judge:
    """Takes a run's parts one after the other; what it has added up is read at the end."""

    def __init__(self, question: Question, survey: Survey) -> None:
        self._question, self._survey = question, survey
        self._repeated, self._low, self._language = survey.repeated, survey.low_logprob, survey.language
        self._holds_term = finder(question.terms)
        self.sums = ScoreSums(question.seed)
        self.flags: Counter[str] = Counter()
        self.by_bin: dict[int, list[int]] = {}  # logprob in hundredths -> rows, edits, words
        self.random: Draw[dict[str, Any]] = Draw(SHOWN_RANDOM)
        self.flagged = {flag: Draw[dict[str, Any]](SHOWN_FLAGGED) for flag in ALL_FLAGS}
        self.worst, self.best = Draw[dict[str, Any]](SHOWN_WORST), Draw[dict[str, Any]](SHOWN_BEST)

    def rows(self, rows: pa.Table, drawn: list[Eligible]) -> pa.Table:
        """A part's rows of CHECKS_SCHEMA."""
        matches = match_captions([row.caption for row in drawn], [row.references for row in drawn])
        scored = {row.index: (row, match) for row, match in zip(drawn, matches, strict=True)}
        flags = [self._flags(row) for row in _captions_of(rows)]
        logprobs, captions = rows["logprob_mean"].to_pylist(), rows["caption"].to_pylist()
        for row, match in scored.values():
            self._add(row, match, logprobs[row.index])
        ids = rows["image_id"].to_pylist()
        places = list(zip(rows["chunk_id"].to_pylist(), rows["chunk_row"].to_pylist(), strict=True))
        for index, image_id in enumerate(ids):
            if captions[index] is not None:
                self._show(image_id, captions[index], logprobs[index], flags[index], places[index], scored.get(index))
        columns: dict[str, Any] = {"image_id": ids, "flags": flags}
        pairs = [scored.get(index) for index in range(len(ids))]
        edits = [pair and pair[1].best_edits for pair in pairs]
        columns["wer"] = [one and one.rate for one in edits]
        for name in ("substitutions", "deletions", "insertions", "words"):
            columns[name] = [one and getattr(one, name) for one in edits]
        columns["reference"] = [pair and pair[0].references[pair[1].best] for pair in pairs]
        return pa.table(columns, schema=CHECKS_SCHEMA)

    def shown(self) -> dict[str, list[dict[str, Any]]]:
        """Rows to look at, by why: drawn at random, worst, best, and of each flag."""
        found = {"random": list(self.random), "worst": list(self.worst), "best": list(self.best)}
        return found | {flag: list(draw) for flag, draw in self.flagged.items() if len(draw)}

    def _flags(self, row: tuple[str | None, list[str], float | None]) -> list[str]:
        caption, own, logprob = row
        if caption is None:
            return []
        low, language = self._low, self._language
        found = {
            "same_caption": caption in self._repeated,
            "low_confidence": logprob is not None and low is not None and logprob < low,
            "other_language": language is not None and language_of(caption) not in (language, None),
            "listed_term": self._holds_term(caption),
        }
        flags = own + [flag for flag, holds in found.items() if holds]
        self.flags.update(flags)
        return flags

    def _add(self, row: Eligible, match: Match, logprob: float | None) -> None:
        self.sums.add(row.place, row.image_id, row.caption, row.references, match)
        if logprob is not None:
            sums = self.by_bin.setdefault(max(-1_000, int(logprob * 100)), [0, 0, 0])
            sums[0] += 1
            sums[1] += match.best_edits.edits
            sums[2] += match.best_edits.words

    def _show(
        self,
        image_id: str,
        caption: str,
        logprob: float | None,
        flags: list[str],
        chunk: tuple[str, int],
        scored: tuple[Eligible, Match] | None,
    ) -> None:
        place = rank(image_id, self._question.seed)
        row: dict[str, Any] = {"image_id": image_id, "caption": caption, "logprob_mean": logprob, "flags": flags}
        row |= {"chunk_id": chunk[0], "chunk_row": chunk[1]}
        if scored:
            eligible, match = scored
            edits = match.best_edits
            row |= {"wer": edits.rate, "reference": eligible.references[match.best]}
            self.worst.offer(-int(edits.rate * 1e6), image_id, row)
            self.best.offer(int(edits.rate * 1e6), image_id, row)
        self.random.offer(place, image_id, row)
        for flag in flags:
            if flag in self.flagged:
                self.flagged[flag].offer(place, image_id, row)

    def wer_histogram(self) -> list[int]:
        """Captions by WER in steps of 0.1; the first is exactly 0, the last 2 and more."""
        counts = [0] * 22
        for (edits, words), count in self.sums.rows.items():
            rate = edits / words if words else float(edits)
            counts[0 if not edits else min(21, 1 + int(rate * 10))] += count
        return counts

    def wer_by_confidence(self) -> list[dict[str, float]]:
        """Corpus WER of ten groups of equal size, least certain first; empty for fewer than 50 captions."""
        total = sum(sums[0] for sums in self.by_bin.values())
        if total < 50:
            return []
        groups = [{"low": 0.0, "rows": 0.0, "edits": 0.0, "words": 0.0} for _ in range(10)]
        passed = 0
        for number in sorted(self.by_bin):
            rows, edits, words = self.by_bin[number]
            group = groups[min(9, passed * 10 // total)]
            group["low"] = group["low"] if group["rows"] else number / 100
            group["rows"], group["edits"], group["words"] = (
                group["rows"] + rows,
                group["edits"] + edits,
                group["words"] + words,
            )
            passed += rows
        return [
            {"logprob_from": group["low"], "rows": group["rows"], "wer": group["edits"] / group["words"]}
            for group in groups
            if group["words"]
        ]


def _captions_of(rows: pa.Table) -> Iterator[tuple[str | None, list[str], float | None]]:
    captions = pc.if_else(pc.equal(rows["status"], STATUS_OK), rows["caption"], None).to_pylist()
    flags, logprobs = rows["flags"].to_pylist(), rows["logprob_mean"].to_pylist()
    return ((caption, own or [], logprob) for caption, own, logprob in zip(captions, flags, logprobs, strict=True))
