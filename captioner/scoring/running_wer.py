"""The WER of a sample while a run captions: draw the sample, score its rows when they are written, and sum up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping

import pyarrow as pa

from captioner.scoring.bootstrap import Interval, wer_interval
from captioner.scoring.references import References
from captioner.scoring.sample import LowestRanks, rank
from captioner.scoring.wer import match_captions
from captioner.store.table import CaptionsTable

MIN_ROWS_TO_STOP = 50
Sample = Mapping[str, list[str]]  # image id -> references


def draw_sample(table: CaptionsTable, size: int, seed: int, references: References | None) -> Sample:
    """Return the rows of the plan to score: the first `size` in the seed's order that have references.

    Reads two columns of the plan, one part at a time.
    """
    sample: LowestRanks[tuple[str, list[str]]] = LowestRanks(size)
    for plan in table.plans():
        for part in sorted(plan.parts) if plan.adds_parts and size else ():
            rows = table.read_plan_part(plan, part, ["image_id", "reference_captions"])
            if not references:
                rows = rows.filter(rows["reference_captions"].is_valid())
            columns = rows["image_id"].to_pylist(), rows["reference_captions"].to_pylist()
            for image_id, from_source in zip(*columns, strict=True):
                captions = references.find(image_id) if references else from_source
                if captions:
                    sample.offer(rank(image_id, seed), image_id, (image_id, captions))
    return dict(sample)


def score_sampled(sample: Sample, rows: pa.Table, trained: Container[str]) -> list[tuple[int, int]]:
    """Return (edits, words) of each captioned row in the sample, against its best reference.

    `trained`: the sha256 of the images that the model was trained on, which are not scored.
    """
    columns = (rows[name].to_pylist() for name in ("image_id", "caption", "sha256"))
    sampled = [
        (caption, sample[image_id])
        for image_id, caption, digest in zip(*columns, strict=True)
        if image_id in sample and caption is not None and digest not in trained
    ]
    if not sampled:
        return []  # most chunks of a large table: aligning needs no import then
    matches = match_captions([caption for caption, _ in sampled], [references for _, references in sampled])
    return [(match.best_edits.edits, match.best_edits.words) for match in matches]


class RunningWer:
    """The WER of the sampled rows that have been committed so far."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rows: Counter[tuple[int, int]] = Counter()

    def add(self, scored: Iterable[tuple[int, int]]) -> None:
        """Add the (edits, words) of scored rows."""
        self._rows.update((edits, words) for edits, words in scored)

    @property
    def num_rows(self) -> int:
        return self._rows.total()

    @property
    def wer(self) -> float | None:
        words = sum(row[1] * count for row, count in self._rows.items())
        return sum(row[0] * count for row, count in self._rows.items()) / words if words else None

    def interval(self) -> Interval | None:
        """Return the 95 % bootstrap interval of the WER."""
        return wer_interval(self._rows, self._seed)

    def is_hopeless(self, max_wer: float) -> bool:
        """Return whether the whole 95 % interval is above `max_wer`; never before 50 rows."""
        wer = self.wer
        if self.num_rows < MIN_ROWS_TO_STOP or wer is None or wer <= max_wer:
            return False
        interval = self.interval()
        return interval is not None and interval[0] > max_wer
