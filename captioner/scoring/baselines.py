"""What a WER is to be compared with: captions that never saw the picture, and other people."""

from __future__ import annotations

import random
from collections.abc import Sequence

from captioner.scoring.wer import corpus_wer

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
