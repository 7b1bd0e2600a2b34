"""WER of captions as a Hugging Face `evaluate` metric: `evaluate.load(captioner.scoring.caption_wer.__file__)`.

Uses jiwer with the normalisation of `captioner.scoring.wer`; needs no network.
"""

from __future__ import annotations

import random
from typing import Any

import datasets
import evaluate

from captioner.scoring.wer import match_captions

SHUFFLES = 4


class CaptionWer(evaluate.Metric):  # type: ignore[misc, unused-ignore]  # evaluate has no types
    """Word error rate of captions against the best of their references, and of shuffled captions as a baseline.

    `compute(predictions=["a dog"], references=[["a dog", "one dog"]])` returns `wer`, `shuffled_wer` and the sums
    behind them (`edits`, `words`, `shuffled_edits`, `shuffled_words`), which can be added over several parts.
    """

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions: list of str; references: list of lists of str, none of them empty",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], seed: int = 0) -> dict[str, float]:
        pairs = _shuffled_pairs(len(predictions), seed)
        sums = _sums("", predictions, references)
        sums |= _sums("shuffled_", [predictions[a] for a, _ in pairs], [references[b] for _, b in pairs])
        return {"wer": rate(sums, ""), "shuffled_wer": rate(sums, "shuffled_"), **sums}


def rate(sums: dict[str, float], prefix: str) -> float:
    """Return the corpus WER from sums; NaN when there is no reference word."""
    words = sums[f"{prefix}words"]
    return sums[f"{prefix}edits"] / words if words else float("nan")


def _shuffled_pairs(count: int, seed: int) -> list[tuple[int, int]]:
    """Return (caption, image) pairs of seeded shuffles in which no image keeps its own caption."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(SHUFFLES if count > 1 else 0):
        order = rng.sample(range(count), count)
        pairs += [(order[k - 1], order[k]) for k in range(count)]
    return pairs


def _sums(prefix: str, captions: list[str], references: list[list[str]]) -> dict[str, float]:
    best = [match.best_edits for match in match_captions(captions, references)]
    num_edits, num_words = sum(edits.edits for edits in best), sum(edits.words for edits in best)
    return {f"{prefix}edits": float(num_edits), f"{prefix}words": float(num_words)}
