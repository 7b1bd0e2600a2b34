"""BLEU-1 to BLEU-4 of a corpus (Papineni et al. 2002), as coco-caption computes it: one brevity penalty for the corpus,
from the reference closest in length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Tokens = Sequence[str]
Array = npt.NDArray[np.float64]
_TINY, _SMALL = 1e-15, 1e-9  # coco-caption's: no match at all gives a BLEU near 0, not a fault


def bleu(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float] | None:
    """[BLEU-1, BLEU-2, BLEU-3, BLEU-4], 0 to 1; `None` without captions."""
    if not captions:
        return None
    counts = [bleu_counts(caption, several) for caption, several in zip(captions, references, strict=True)]
    scores: list[float] = bleu_of(np.array(counts, np.float64).sum(axis=0)).tolist()
    return scores


def bleu_counts(caption: Tokens, references: Sequence[Tokens]) -> tuple[int, ...]:
    """What a caption adds to the corpus, 10 numbers: words said, words of the reference closest in length, then of 1 to
    4 words each the n-grams that match, and those said."""
    known = min((len(one) for one in references), key=lambda length: (abs(length - len(caption)), length))
    correct, guessed = [], []
    for n in range(1, 5):
        grams = ngrams(caption, n)
        most: Counter[tuple[str, ...]] = Counter()
        for one in references:
            most |= ngrams(one, n)
        correct.append((grams & most).total())
        guessed.append(max(0, len(caption) - n + 1))
    return (len(caption), known, *correct, *guessed)


def bleu_of(sums: Array) -> Array:
    """Summed `bleu_counts` [..., 10] -> BLEU-1 to BLEU-4 [..., 4]."""
    ratio = (sums[..., 0:1] + _TINY) / (sums[..., 1:2] + _SMALL)
    penalty = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    precisions = (sums[..., 2:6] + _TINY) / (sums[..., 6:10] + _SMALL)
    scores: Array = penalty * np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, 5))
    return scores


def ngrams(tokens: Tokens, n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[place:] for place in range(n)), strict=False))
