"""CIDEr-D, BLEU and ROUGE-L as coco-caption computes them.

CIDEr-D (Vedantam et al. 2015): agreement with the references in n-grams that are rare in the corpus; n-grams of 1 to 4
tokens, TF-IDF with document frequencies from the references of the pictures scored together, counts clipped to the
reference's, a Gaussian penalty (sigma 6) on the difference in length, times 10. A score therefore depends on the other
pictures.

BLEU-1 to BLEU-4 of a corpus (Papineni et al. 2002): one brevity penalty for the corpus, from the reference closest in
length. ROUGE-L (Lin 2004) of one caption: beta 1.2, the best precision and the best recall over the references.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np
import numpy.typing as npt

Tokens = Sequence[str]
Gram = tuple[str, ...]
SIGMA = 6.0


@dataclass(frozen=True, slots=True)
class _Vector:
    """TF-IDF weights and their norm for each n; `length` in bigrams, as the reference program counts it."""

    weights: list[dict[Gram, float]]
    norms: list[float]
    length: int


def cider_d(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """A score for each caption, 0 to 10; their mean is the corpus score."""
    frequency: Counter[Gram] = Counter()
    for several in references:
        frequency.update({gram for known in several for n in range(1, 5) for gram in ngrams(known, n)})
    scale = log(len(references)) if references else 0.0
    scores = []
    for caption, several in zip(captions, references, strict=True):
        said = _vector(caption, frequency, scale)
        each = [_similarity(said, _vector(known, frequency, scale)) for known in several]
        scores.append(10.0 * sum(each) / len(each) if each else 0.0)
    return scores


def _vector(tokens: Tokens, frequency: Counter[Gram], scale: float) -> _Vector:
    weights = [
        {gram: count * (scale - log(max(1, frequency[gram]))) for gram, count in ngrams(tokens, n).items()}
        for n in range(1, 5)
    ]
    norms = [sqrt(sum(value * value for value in some.values())) for some in weights]
    return _Vector(weights, norms, max(0, len(tokens) - 1))


def _similarity(said: _Vector, known: _Vector) -> float:
    penalty = exp(-((said.length - known.length) ** 2) / (2 * SIGMA**2))
    total = 0.0
    for n in range(4):
        product = sum(
            min(value, known.weights[n].get(gram, 0.0)) * known.weights[n].get(gram, 0.0)
            for gram, value in said.weights[n].items()
        )
        norm = said.norms[n] * known.norms[n]
        total += product / norm if norm else product
    return penalty * total / 4


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


BETA = 1.2


def rouge_l(caption: Tokens, references: Sequence[Tokens]) -> float:
    """0 to 1."""
    common = [longest_common(caption, known) for known in references]
    precision = max((length / len(caption) for length in common), default=0.0) if caption else 0.0
    recalls = (length / len(known) for length, known in zip(common, references, strict=True) if known)
    recall = max(recalls, default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(first: Tokens, second: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for place, other in enumerate(second, start=1):
            above = row[place]
            row[place] = diagonal + 1 if token == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]
