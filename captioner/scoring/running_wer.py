"""The spot-check while captioning: rows are drawn before the start, scored where they are written, and added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from captioner.scoring.bootstrap import Interval, wer_interval
from captioner.scoring.references import References
from captioner.scoring.sample import Draw, rank
from captioner.scoring.wer import match_captions
from captioner.store.table import CaptionsTable, plan_part_name

MIN_ROWS_TO_STOP = 50
Sample = Mapping[str, list[str]]  # image id -> references


def draw_sample(table: CaptionsTable, size: int, seed: int, references: References | None) -> Sample:
    """The rows of the plan to be scored: the first `size` of the seed's order that have references.

    Reads two columns of the plan, one part at a time.
    """
    drawn: Draw[tuple[str, list[str]]] = Draw(size)
    for plan in table.plans():
        for part in sorted(plan.parts) if plan.adds_parts and size else ():
            rows = table.directory.read_table(plan_part_name(plan.generation, part), ["image_id", "reference_captions"])
            ids, own = rows["image_id"].to_pylist(), rows["reference_captions"].to_pylist()
            for image_id, known in zip(ids, own, strict=True):
                several = references.find(image_id) if references else known
                if several:
                    drawn.offer(rank(image_id, seed), image_id, (image_id, several))
    return dict(drawn)


def score_sampled(sample: Sample, image_ids: Sequence[str], captions: Sequence[str | None]) -> list[tuple[int, int]]:
    """(edits, words) of each captioned row that is in the sample, against its best reference."""
    places = [place for place, name in enumerate(image_ids) if name in sample and captions[place] is not None]
    said = [captions[place] or "" for place in places]
    matches = match_captions(said, [sample[image_ids[place]] for place in places])
    return [(match.best_edits.edits, match.best_edits.words) for match in matches]


class RunningWer:
    """WER of the sampled rows that are committed so far."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rows: Counter[tuple[int, int]] = Counter()

    def add(self, scored: Iterable[tuple[int, int]]) -> None:
        self._rows.update((edits, words) for edits, words in scored)

    @property
    def num_rows(self) -> int:
        return self._rows.total()

    @property
    def wer(self) -> float | None:
        words = sum(row[1] * count for row, count in self._rows.items())
        return sum(row[0] * count for row, count in self._rows.items()) / words if words else None

    def interval(self) -> Interval | None:
        return wer_interval(self._rows, self._seed)

    def is_hopeless(self, max_wer: float) -> bool:
        """Whether the 95 % interval lies wholly above the gate; never before 50 rows."""
        wer = self.wer
        if self.num_rows < MIN_ROWS_TO_STOP or wer is None or wer <= max_wer:
            return False
        interval = self.interval()
        return interval is not None and interval[0] > max_wer
