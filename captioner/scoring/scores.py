"""The scores of captions against references, summed row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from captioner.scoring.bootstrap import Interval, mean_interval, wer_interval
from captioner.scoring.coco_metrics import Tokens, bleu, cider_d, rouge_l
from captioner.scoring.normalise import NORMALISATION, caption_tokens, count_characters, normalise
from captioner.scoring.sample import LowestRanks
from captioner.scoring.wer import Edits, Match, character_edits, human_wer, shuffled_wer

# CIDEr-D needs all its images in memory and the shuffled baseline compares each caption 20 times: both use only the
# first rows in the seed's order.
OVERLAP_ROWS = 5_000
BASELINE_ROWS = 1_000
MAX_WORDS_SHOWN = 15  # of those that only captions, or only references, have
# What WER counts, and the share of the references' words below which their rarer kind is not mentioned.
Unit = Literal["words", "characters", "words and characters"]
_RARE = 0.1


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of a run; `None` means "no data".

    `wer`: against each image's best reference; `wer_single`: against its first. `interval`: 95 % bootstrap interval of
    `wer`. `shuffled_wer`: mean of 20 derangements; `lift` = 1 - wer / shuffled_wer; `human_wer`: one reference against
    the others. CIDEr-D, BLEU, ROUGE-L and the vocabulary are computed from `overlap_rows` rows. `unit`: what WER and
    MER count; characters where the references are in scripts without spaces.
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
    unit: Unit = "words"
    normalisation: str = NORMALISATION

    def to_json(self) -> dict[str, Any]:
        """Return the scores as JSON values."""
        return asdict(self)


@dataclass
class ScoreSums:
    """Sums scored rows in bounded memory; their order does not matter."""

    seed: int = 0
    rows: Counter[tuple[int, int]] = field(default_factory=Counter)  # (edits, words) of the best reference
    total: Edits = field(default_factory=lambda: Edits(0, 0, 0, 0))
    single: tuple[int, int] = (0, 0)
    characters: tuple[int, int] = (0, 0)
    unspaced: int = 0  # words of the best references that are characters of scripts without spaces
    kept: LowestRanks[tuple[str, list[str]]] = field(default_factory=lambda: LowestRanks(OVERLAP_ROWS))

    def add(self, row_rank: int, image_id: str, caption: str, references: Sequence[str], match: Match) -> None:
        """Add one caption. `row_rank`: its rank in the seed's order."""
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
        self.unspaced += count_characters(normalise(references[match.best]))
        self.kept.offer(row_rank, image_id, (caption, list(references)))

    def scores(self) -> Scores:
        """Compute the scores of the rows added so far."""
        total, kept = self.total, list(self.kept)
        wer = _ratio(total.edits, total.words)
        captions, references = [caption for caption, _ in kept], [captions for _, captions in kept]
        baseline = slice(0, BASELINE_ROWS)
        shuffled = shuffled_wer(captions[baseline], references[baseline], self.seed)
        tokens = [caption_tokens(caption) for caption in captions]
        reference_tokens = [[caption_tokens(text) for text in texts] for texts in references]
        ciders = cider_d(tokens, reference_tokens)
        rouges = list(map(rouge_l, tokens, reference_tokens))
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
            human_wer=human_wer(references[baseline]),
            baseline_rows=len(captions[baseline]),
            overlap_rows=len(kept),
            cider_d=_ratio(sum(ciders), len(ciders)),
            cider_d_interval=mean_interval([round(score, 6) for score in ciders], self.seed),
            bleu=bleu(tokens, reference_tokens),
            rouge_l=_ratio(sum(rouges), len(rouges)),
            vocabulary=compare_vocabulary(tokens, reference_tokens),
            unit=_unit(self.unspaced, total.words),
        )


def _unit(unspaced: int, words: int) -> Unit:
    """Return what most words of the references are."""
    if unspaced <= _RARE * words:
        return "words"
    return "characters" if unspaced >= (1 - _RARE) * words else "words and characters"


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def compare_vocabulary(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, Any] | None:
    """Return the vocabulary figures; `None` without captions.

    A word counts once for each image, however many of its references have it. `missed`: words of references that are
    in no caption. `invented`: words of captions that are in no reference. `covered`: the share of the references'
    words that are in some caption, weighted by images.
    """
    if not captions:
        return None
    in_captions = _images_by_word(captions)
    in_references = _images_by_word([word for tokens in image for word in tokens] for image in references)
    total = in_references.total()
    covered = sum(count for word, count in in_references.items() if word in in_captions)
    return {
        "captions": len(in_captions),
        "references": len(in_references),
        "shared": len(in_captions.keys() & in_references.keys()),
        "covered": covered / total if total else None,
        "missed": _only_in(in_references, in_captions),
        "invented": _only_in(in_captions, in_references),
    }


def _images_by_word(texts: Iterable[Iterable[str]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for words in texts:
        counts.update(set(words))
    return counts


def _only_in(words: Counter[str], others: Counter[str]) -> list[tuple[str, int]]:
    """Return the words that are not in `others`, by number of images, then alphabetically."""
    only = [(word, count) for word, count in words.items() if word not in others]
    return sorted(only, key=lambda item: (-item[1], item[0]))[:MAX_WORDS_SHOWN]
