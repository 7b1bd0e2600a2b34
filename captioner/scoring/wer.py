"""Word error rate of captions against references, by jiwer.

Normalisation: lower case, punctuation removed, white space collapsed. Of a picture the reference with the lowest WER
counts; the corpus WER is the sum of edits over the sum of words of those references. The WER of the same captions
dealt out to other pictures (`shuffled_wer`) stands beside it: how right is a caption that never saw the picture?
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

SHUFFLES = 20


@dataclass(frozen=True, slots=True)
class Edits:
    """Word edits of one caption against one reference, and the words of that reference."""

    edits: int
    words: int

    @property
    def rate(self) -> float:
        """WER; 1 edit for each word of a caption that faces an empty reference."""
        return self.edits / self.words if self.words else float(self.edits)


def best_edits(caption: str, references: Sequence[str]) -> Edits:
    """The edits against the reference with the lowest WER. `references` must not be empty."""
    return min((word_edits(caption, reference) for reference in references), key=lambda e: (e.rate, e.edits))


def corpus_wer(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float | None:
    """Corpus WER, or `None` where there is no reference word to compare with."""
    best = [best_edits(caption, known) for caption, known in zip(captions, references, strict=True)]
    words = sum(edits.words for edits in best)
    return sum(edits.edits for edits in best) / words if words else None


def shuffled_wer(captions: Sequence[str], references: Sequence[Sequence[str]], seed: int = 0) -> float | None:
    """Mean corpus WER over 20 seeded shuffles in which no picture keeps its own caption; `None` below 2 pictures."""
    count = len(captions)
    if count < 2:
        return None
    rng = random.Random(seed)
    # A random order, rotated by one: each caption goes to its neighbour, none stays.
    rates = []
    for _ in range(SHUFFLES):
        order = rng.sample(range(count), count)
        dealt = {order[k]: captions[order[k - 1]] for k in range(count)}
        rates.append(corpus_wer([dealt[k] for k in range(count)], references))
    known = [rate for rate in rates if rate is not None]
    return sum(known) / len(known) if known else None


@lru_cache(maxsize=100_000)
def word_edits(caption: str, reference: str) -> Edits:
    """Substitutions, deletions and insertions that turn `reference` into `caption`, in words."""
    import jiwer

    normal = _normalisation()
    heard, said = normal(caption), normal(reference)
    if not said:
        return Edits(len(heard.split()), 0)
    if not heard:
        return Edits(len(said.split()), len(said.split()))
    counts = jiwer.process_words(said, heard)
    return Edits(counts.substitutions + counts.deletions + counts.insertions, len(said.split()))


@lru_cache(maxsize=1)
def _normalisation() -> Any:
    import jiwer

    return jiwer.Compose([jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.RemoveMultipleSpaces(), jiwer.Strip()])
