"""Word error rate of captions against references, aligned by jiwer.

Of a picture the reference with the lowest WER counts; the corpus WER is the sum of edits over the sum of words of those
references. A WER may exceed 1 (ten words said where one was expected are 9 or 10 edits a word), so it is no percentage.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from captioner.scoring.normalise import normalise

_PAIRS_AT_ONCE = 10_000  # jiwer holds about 3 kB for each


@dataclass(frozen=True, slots=True)
class Edits:
    """Words of one caption that match one reference (`hits`), and the edits that make the caption of the reference."""

    substitutions: int
    deletions: int
    insertions: int
    hits: int

    @property
    def edits(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def words(self) -> int:
        """Of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """WER; the number of words said where the reference has none."""
        return self.edits / self.words if self.words else float(self.edits)


@dataclass(frozen=True, slots=True)
class Match:
    """How one caption compares with its references: `edits[k]` against reference k, `best` the place of the lowest WER
    (the first of equals)."""

    edits: list[Edits]
    best: int

    @property
    def best_edits(self) -> Edits:
        return self.edits[self.best]


def match_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Match]:
    """Every caption against each of its references, of which it has at least one."""
    pairs = [(known, said) for said, several in zip(captions, references, strict=True) for known in several]
    found = iter(word_edits(pairs))
    matches = []
    for several in references:
        edits = [next(found) for _ in several]
        matches.append(Match(edits, min(range(len(edits)), key=lambda place: (edits[place].rate, place))))
    return matches


def word_edits(pairs: Sequence[tuple[str, str]]) -> list[Edits]:
    """The edits of each (reference, caption)."""
    normal = [(normalise(known), normalise(said)) for known, said in pairs]
    aligned = {pair: None for pair in normal if pair[0] and pair[1] and pair[0] != pair[1]}
    found = dict(zip(aligned, _align(list(aligned)), strict=True))
    return [found[pair] if pair in found else _plain(*pair) for pair in normal]


def _plain(known: str, said: str) -> Edits:
    """Where there is nothing to align: equal texts, or an empty one."""
    if known == said:
        return Edits(0, 0, 0, len(known.split()))
    return Edits(0, len(known.split()), len(said.split()), 0)


def _align(pairs: list[tuple[str, str]]) -> list[Edits]:
    import jiwer

    words = jiwer.Compose([jiwer.ReduceToListOfListOfWords()])  # all else is done: the texts are normalised
    found = []
    for first in range(0, len(pairs), _PAIRS_AT_ONCE):
        some = pairs[first : first + _PAIRS_AT_ONCE]
        output = jiwer.process_words([known for known, _ in some], [said for _, said in some], words, words)
        found += [_count(chunks) for chunks in output.alignments]
    return found


def _count(chunks: Sequence[object]) -> Edits:
    counts = {"substitute": 0, "delete": 0, "insert": 0, "equal": 0}
    for chunk in chunks:
        known = chunk.ref_end_idx - chunk.ref_start_idx  # type: ignore[attr-defined]
        said = chunk.hyp_end_idx - chunk.hyp_start_idx  # type: ignore[attr-defined]
        counts[chunk.type] += max(known, said)  # type: ignore[attr-defined]
    return Edits(counts["substitute"], counts["delete"], counts["insert"], counts["equal"])


def character_edits(pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """For each (reference, caption) the edits in characters, and the characters of the reference; for CER."""
    from rapidfuzz.distance import Levenshtein  # what jiwer counts with

    normal = [(normalise(known), normalise(said)) for known, said in pairs]
    return [(Levenshtein.distance(known, said), len(known)) for known, said in normal]


def corpus_wer(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float | None:
    """Summed edits over summed words of the best references; `None` where there is no reference word."""
    best = [match.best_edits for match in match_captions(captions, references)]
    words = sum(edits.words for edits in best)
    return sum(edits.edits for edits in best) / words if words else None


SHUFFLES = 20


def shuffled_wer(captions: Sequence[str], references: Sequence[Sequence[str]], seed: int = 0) -> float | None:
    """Mean corpus WER over 20 seeded derangements: no picture keeps its own caption. `None` below 2 pictures."""
    count = len(captions)
    if count < 2:
        return None
    rng = random.Random(seed)
    rates = []
    for _ in range(SHUFFLES):
        # A random order, rotated by one: each caption goes to its neighbour, none stays.
        order = rng.sample(range(count), count)
        dealt = {order[place]: captions[order[place - 1]] for place in range(count)}
        rates.append(corpus_wer([dealt[place] for place in range(count)], references))
    known = [rate for rate in rates if rate is not None]
    return sum(known) / len(known) if known else None


def human_wer(references: Sequence[Sequence[str]]) -> float | None:
    """WER between people: the first reference of each picture against its others. `None` where no picture has two."""
    several = [known for known in references if len(known) > 1]
    return corpus_wer([known[0] for known in several], [known[1:] for known in several])
