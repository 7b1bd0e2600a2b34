"""The figures of captions against references, added up row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from captioner.scoring.bootstrap import Interval, mean_interval, wer_interval
from captioner.scoring.coco_metrics import bleu, cider_d, rouge_l
from captioner.scoring.normalise import NORMALISATION, caption_tokens
from captioner.scoring.sample import Draw
from captioner.scoring.vocabulary import compare_vocabulary
from captioner.scoring.wer import Edits, Match, character_edits, human_wer, shuffled_wer

# CIDEr-D needs all its pictures at hand, the shuffled baseline compares each caption 20 times over: of a larger set of
# scored rows they take the first of the seed's order.
OVERLAP_ROWS = 5_000
BASELINE_ROWS = 1_000


@dataclass(frozen=True, slots=True)
class Scores:
    """`None` stands for "no data", everywhere.

    `wer`: of each picture's best reference; `wer_single`: of its first. `interval`: 95 %, bootstrap, of `wer`.
    `shuffled_wer`: mean of 20 derangements; `lift` = 1 - wer / shuffled_wer; `human_wer`: one reference against the
    others. CIDEr-D, BLEU, ROUGE-L and the vocabulary are of `overlap_rows` rows.
    """

    num_rows: int
    wer: float | None = None
    interval: Interval | None = None
    wer_single: float | None = None
    mer: float | None = None
    cer: float | None = None
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0
    exact: int = 0
    shuffled_wer: float | None = None
    lift: float | None = None
    human_wer: float | None = None
    baseline_rows: int = 0
    overlap_rows: int = 0
    cider_d: float | None = None
    cider_d_interval: Interval | None = None
    bleu: list[float] | None = None
    rouge_l: float | None = None
    vocabulary: dict[str, Any] | None = None
    normalisation: str = NORMALISATION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class ScoreSums:
    """Collects scored rows in bounded memory; their order does not matter."""

    seed: int = 0
    rows: Counter[tuple[int, int]] = field(default_factory=Counter)  # (edits, words) of the best reference
    total: Edits = field(default_factory=lambda: Edits(0, 0, 0, 0))
    single: tuple[int, int] = (0, 0)
    characters: tuple[int, int] = (0, 0)
    kept: Draw[tuple[str, list[str]]] = field(default_factory=lambda: Draw(OVERLAP_ROWS))

    def add(self, place: int, image_id: str, caption: str, references: Sequence[str], match: Match) -> None:
        """One caption. `place`: its rank in the seed's order."""
        best, first, total = match.best_edits, match.edits[0], self.total
        self.rows[best.edits, best.words] += 1
        self.total = Edits(
            total.substitutions + best.substitutions,
            total.deletions + best.deletions,
            total.insertions + best.insertions,
            total.hits + best.hits,
        )
        self.single = (self.single[0] + first.edits, self.single[1] + first.words)
        ((edits, length),) = character_edits([(references[match.best], caption)])
        self.characters = (self.characters[0] + edits, self.characters[1] + length)
        self.kept.offer(place, image_id, (caption, list(references)))

    def scores(self) -> Scores:
        total, kept = self.total, list(self.kept)
        wer = _ratio(total.edits, total.words)
        captions, references = [caption for caption, _ in kept], [known for _, known in kept]
        few = slice(0, BASELINE_ROWS)
        shuffled = shuffled_wer(captions[few], references[few], self.seed)
        said = [caption_tokens(caption) for caption in captions]
        known = [[caption_tokens(one) for one in several] for several in references]
        ciders = cider_d(said, known)
        rouges = [rouge_l(caption, several) for caption, several in zip(said, known, strict=True)]
        return Scores(
            num_rows=self.rows.total(),
            wer=wer,
            interval=wer_interval(self.rows, self.seed),
            wer_single=_ratio(*self.single),
            mer=_ratio(total.edits, total.edits + total.hits),
            cer=_ratio(*self.characters),
            substitutions=total.substitutions,
            deletions=total.deletions,
            insertions=total.insertions,
            words=total.words,
            exact=sum(count for (edits, _), count in self.rows.items() if not edits),
            shuffled_wer=shuffled,
            lift=None if wer is None or not shuffled else 1 - wer / shuffled,
            human_wer=human_wer(references[few]),
            baseline_rows=len(captions[few]),
            overlap_rows=len(kept),
            cider_d=_ratio(sum(ciders), len(ciders)),
            cider_d_interval=mean_interval([round(score, 6) for score in ciders], self.seed),
            bleu=bleu(said, known),
            rouge_l=_ratio(sum(rouges), len(rouges)),
            vocabulary=compare_vocabulary(said, known),
        )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
