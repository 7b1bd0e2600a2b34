"""CIDEr-D (Vedantam et al. 2015): agreement with the references in n-grams that are rare in the corpus.

As coco-caption computes it: n-grams of 1 to 4 tokens, TF-IDF with document frequencies from the references of the
pictures scored together, counts clipped to the reference's, a Gaussian penalty (sigma 6) on the difference in length,
times 10. A score therefore depends on the other pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

from captioner.scoring.bleu import ngrams

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
