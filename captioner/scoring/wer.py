"""Word error rate (WER) of captions against references, aligned by jiwer.

Each image is scored against its reference with the lowest WER; the corpus WER is the sum of edits over the sum of words
of those references. A WER can exceed 1 (ten words instead of one are 9 or 10 edits a word), so it is not a percentage.

In scripts without spaces each character counts as a word, see `captioner.scoring.normalise`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from captioner.scoring.normalise import normalise, split_words

_BATCH_SIZE = 10_000  # pairs; jiwer needs about 3 kB for each


@dataclass(frozen=True, slots=True)
class Edits:
    """The edits that turn a reference into a caption, and the words that match (`hits`)."""

    substitutions: int
    deletions: int
    insertions: int
    hits: int

    @property
    def edits(self) -> int:
        """The number of edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def words(self) -> int:
        """The number of words of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """The WER; for a reference without words the number of words of the caption."""
        return self.edits / self.words if self.words else float(self.edits)


@dataclass(frozen=True, slots=True)
class Match:
    """One caption compared with its references.

    `edits[k]`: against reference k. `best`: the index of the lowest WER, the first of equals.
    """

    edits: list[Edits]
    best: int

    @property
    def best_edits(self) -> Edits:
        """The edits against the best reference."""
        return self.edits[self.best]


def match_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Match]:
    """Compare every caption with each of its references, of which it needs at least one."""
    pairs = [
        (reference, caption)
        for caption, image_references in zip(captions, references, strict=True)
        for reference in image_references
    ]
    all_edits = iter(word_edits(pairs))
    matches = []
    for image_references in references:
        edits = [next(all_edits) for _ in image_references]
        matches.append(Match(edits, min(range(len(edits)), key=lambda index: (edits[index].rate, index))))
    return matches


def word_edits(pairs: Sequence[tuple[str, str]]) -> list[Edits]:
    """Return the edits of each (reference, caption)."""
    normal = [(_spaced_words(reference), _spaced_words(caption)) for reference, caption in pairs]
    to_align = {pair: None for pair in normal if pair[0] and pair[1] and pair[0] != pair[1]}
    aligned = dict(zip(to_align, _align(list(to_align)), strict=True))
    return [aligned[pair] if pair in aligned else _trivial_edits(*pair) for pair in normal]


def _spaced_words(text: str) -> str:
    """Return the normalised words, separated by spaces."""
    return " ".join(split_words(normalise(text)))


def _trivial_edits(reference: str, caption: str) -> Edits:
    """Return the edits of equal texts, or when one of them is empty."""
    if reference == caption:
        return Edits(0, 0, 0, len(reference.split()))
    return Edits(0, len(reference.split()), len(caption.split()), 0)


def _align(pairs: list[tuple[str, str]]) -> list[Edits]:
    import jiwer

    split = jiwer.Compose([jiwer.ReduceToListOfListOfWords()])  # the texts are already normalised
    edits = []
    for first in range(0, len(pairs), _BATCH_SIZE):
        batch = pairs[first : first + _BATCH_SIZE]
        output = jiwer.process_words(
            [reference for reference, _ in batch], [caption for _, caption in batch], split, split
        )
        edits += [_count(chunks) for chunks in output.alignments]
    return edits


def _count(chunks: Sequence[Any]) -> Edits:
    """Sum the chunks of one jiwer alignment."""
    counts = {"substitute": 0, "delete": 0, "insert": 0, "equal": 0}
    for chunk in chunks:
        reference_words = chunk.ref_end_idx - chunk.ref_start_idx
        caption_words = chunk.hyp_end_idx - chunk.hyp_start_idx
        counts[chunk.type] += max(reference_words, caption_words)
    return Edits(counts["substitute"], counts["delete"], counts["insert"], counts["equal"])


def character_edits(pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """Return (edits, length of the reference) in characters of each (reference, caption), for the CER."""
    from rapidfuzz.distance import Levenshtein  # the same counting as jiwer

    normal = [(normalise(reference), normalise(caption)) for reference, caption in pairs]
    return [(Levenshtein.distance(reference, caption), len(reference)) for reference, caption in normal]


def corpus_wer(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float | None:
    """Return the summed edits over the summed words of the best references; `None` without any reference word."""
    best = [_best_counts(caption, texts) for caption, texts in zip(captions, references, strict=True)]
    words = sum(words for _, words in best)
    return sum(edits for edits, _ in best) / words if words else None


def _best_counts(caption: str, references: Sequence[str]) -> tuple[int, int]:
    """Return (edits, words) of the reference that `match_captions` chooses, without aligning them."""
    from rapidfuzz.distance import Levenshtein  # the same counting as jiwer

    words = _words(caption)
    counts = [(Levenshtein.distance(_words(reference), words), len(_words(reference))) for reference in references]
    return min(counts, key=lambda count: count[0] / max(count[1], 1))


@lru_cache(maxsize=10_000)
def _words(text: str) -> tuple[str, ...]:
    return tuple(split_words(normalise(text)))


SHUFFLES = 20


def shuffled_wer(captions: Sequence[str], references: Sequence[Sequence[str]], seed: int = 0) -> float | None:
    """Return the mean corpus WER over 20 seeded derangements, in which no image keeps its own caption.

    `None` for fewer than two images.
    """
    count = len(captions)
    if count < 2:
        return None
    rng = random.Random(seed)
    rates = []
    for _ in range(SHUFFLES):
        # A random order rotated by one gives every image the caption of another.
        order = rng.sample(range(count), count)
        shuffled = {order[index]: captions[order[index - 1]] for index in range(count)}
        rates.append(corpus_wer([shuffled[index] for index in range(count)], references))
    defined = [rate for rate in rates if rate is not None]
    return sum(defined) / len(defined) if defined else None


def human_wer(references: Sequence[Sequence[str]]) -> float | None:
    """Return the WER between people: the first reference of each image against its others.

    `None` when no image has two references.
    """
    multiple = [image_references for image_references in references if len(image_references) > 1]
    return corpus_wer([texts[0] for texts in multiple], [texts[1:] for texts in multiple])
