"""CIDEr-D, BLEU and ROUGE-L as coco-caption computes them.

CIDEr-D (Vedantam et al. 2015): TF-IDF-weighted agreement with the references in n-grams of 1 to 4 tokens. Document
frequencies come from the references of all scored images, counts are clipped to the reference's, a Gaussian penalty
(sigma 6) applies to the difference in length, and the result is times 10. A score thus depends on the other images.

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


def cider_d(
    captions: Sequence[Tokens],
    references: Sequence[Sequence[Tokens]],
    documents: Sequence[Sequence[Tokens]] | None = None,
) -> list[float]:
    """Return a score for each caption, 0 to 10; their mean is the corpus score.

    `documents`: the references of the whole corpus, where `captions` are a part of it.
    """
    documents = references if documents is None else documents
    frequency: Counter[Gram] = Counter()
    for image_references in documents:
        frequency.update({gram for reference in image_references for n in range(1, 5) for gram in ngrams(reference, n)})
    scale = log(len(documents)) if documents else 0.0
    scores = []
    for caption, image_references in zip(captions, references, strict=True):
        vector = _vector(caption, frequency, scale)
        similarities = [_similarity(vector, _vector(reference, frequency, scale)) for reference in image_references]
        scores.append(10.0 * sum(similarities) / len(similarities) if similarities else 0.0)
    return scores


def _vector(tokens: Tokens, frequency: Counter[Gram], scale: float) -> _Vector:
    weights = [
        {gram: count * (scale - log(max(1, frequency[gram]))) for gram, count in ngrams(tokens, n).items()}
        for n in range(1, 5)
    ]
    norms = [sqrt(sum(value * value for value in by_gram.values())) for by_gram in weights]
    return _Vector(weights, norms, max(0, len(tokens) - 1))


def _similarity(caption: _Vector, reference: _Vector) -> float:
    penalty = exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA**2))
    total = 0.0
    for n in range(4):
        product = sum(
            min(value, reference.weights[n].get(gram, 0.0)) * reference.weights[n].get(gram, 0.0)
            for gram, value in caption.weights[n].items()
        )
        norm = caption.norms[n] * reference.norms[n]
        total += product / norm if norm else product
    return penalty * total / 4


Array = npt.NDArray[np.float64]
_TINY, _SMALL = 1e-15, 1e-9  # as in coco-caption: without any match BLEU is near 0 instead of undefined


def bleu(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float] | None:
    """Return [BLEU-1, BLEU-2, BLEU-3, BLEU-4], 0 to 1; `None` without captions."""
    if not captions:
        return None
    counts = list(map(bleu_counts, captions, references))
    scores: list[float] = bleu_of(np.array(counts, np.float64).sum(axis=0)).tolist()
    return scores


def bleu_counts(caption: Tokens, references: Sequence[Tokens]) -> tuple[int, ...]:
    """Return the 10 counts that a caption adds to the corpus.

    Words of the caption, words of the reference closest in length, matching n-grams for n = 1 to 4, and n-grams of the
    caption for n = 1 to 4.
    """
    closest = min((len(tokens) for tokens in references), key=lambda length: (abs(length - len(caption)), length))
    correct, guessed = [], []
    for n in range(1, 5):
        grams = ngrams(caption, n)
        in_references: Counter[Gram] = Counter()
        for reference in references:
            in_references |= ngrams(reference, n)
        correct.append((grams & in_references).total())
        guessed.append(max(0, len(caption) - n + 1))
    return (len(caption), closest, *correct, *guessed)


def bleu_of(sums: Array) -> Array:
    """Return BLEU-1 to BLEU-4 [..., 4] of summed `bleu_counts` [..., 10]."""
    ratio = (sums[..., 0:1] + _TINY) / (sums[..., 1:2] + _SMALL)
    penalty = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    precisions = (sums[..., 2:6] + _TINY) / (sums[..., 6:10] + _SMALL)
    scores: Array = penalty * np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, 5))
    return scores


def ngrams(tokens: Tokens, n: int) -> Counter[Gram]:
    """Return the n-grams of the tokens with their counts."""
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


BETA = 1.2


def rouge_l(caption: Tokens, references: Sequence[Tokens]) -> float:
    """Return the ROUGE-L score of one caption, 0 to 1."""
    common = [longest_common(caption, reference) for reference in references]
    precision = max((length / len(caption) for length in common), default=0.0) if caption else 0.0
    recalls = (length / len(reference) for length, reference in zip(common, references, strict=True) if reference)
    recall = max(recalls, default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(first: Tokens, second: Tokens) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if token == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]
