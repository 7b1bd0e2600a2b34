"""BLEU-1 to BLEU-4 of a corpus (Papineni et al. 2002), as coco-caption computes it: one brevity penalty for the corpus,
from the reference closest in length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import exp

Tokens = Sequence[str]
_TINY, _SMALL = 1e-15, 1e-9  # coco-caption's: no match at all gives a BLEU near 0, not a fault


def bleu(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float] | None:
    """[BLEU-1, BLEU-2, BLEU-3, BLEU-4], 0 to 1; `None` without captions."""
    if not captions:
        return None
    correct, guessed = [0] * 4, [0] * 4
    said = known = 0
    for caption, several in zip(captions, references, strict=True):
        said += len(caption)
        known += min((len(one) for one in several), key=lambda length: (abs(length - len(caption)), length))
        for n in range(1, 5):
            grams = ngrams(caption, n)
            most: Counter[tuple[str, ...]] = Counter()
            for one in several:
                most |= ngrams(one, n)
            correct[n - 1] += (grams & most).total()
            guessed[n - 1] += max(0, len(caption) - n + 1)
    ratio = (said + _TINY) / (known + _SMALL)
    penalty = exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(4):
        product *= (correct[n] + _TINY) / (guessed[n] + _SMALL)
        scores.append(penalty * product ** (1 / (n + 1)))
    return scores


def ngrams(tokens: Tokens, n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[place:] for place in range(n)), strict=False))
