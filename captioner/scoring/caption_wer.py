"""WER of captions as a metric of Hugging Face's `evaluate`: `evaluate.load(captioner.scoring.caption_wer.__file__)`.

Over jiwer, by the rules of `captioner.scoring.wer`; needs no network.
"""

from __future__ import annotations

import random
from typing import Any

import datasets
import evaluate

from captioner.scoring.wer import match_captions

SHUFFLES = 4


class CaptionWer(evaluate.Metric):
    """Word error rate of captions against the best of their references, and of the same captions dealt out to other
    pictures.

    `compute(predictions=["a dog"], references=[["a dog", "one dog"]])` gives `wer`, `shuffled_wer` and the sums they
    are made of (`edits`, `words`, `shuffled_edits`, `shuffled_words`): sums of parts are the sums of the whole.
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
        dealt = _dealt(len(predictions), seed)
        sums = _sums("", predictions, references)
        sums |= _sums("shuffled_", [predictions[a] for a, _ in dealt], [references[b] for _, b in dealt])
        return {"wer": rate(sums, ""), "shuffled_wer": rate(sums, "shuffled_"), **sums}


def rate(sums: dict[str, float], prefix: str) -> float:
    """A corpus WER from sums; NaN where there is no reference word."""
    words = sums[f"{prefix}words"]
    return sums[f"{prefix}edits"] / words if words else float("nan")


def _dealt(count: int, seed: int) -> list[tuple[int, int]]:
    """(caption, picture) of seeded shuffles in which no picture keeps its own caption."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(SHUFFLES if count > 1 else 0):
        order = rng.sample(range(count), count)
        pairs += [(order[k - 1], order[k]) for k in range(count)]
    return pairs


def _sums(prefix: str, captions: list[str], references: list[list[str]]) -> dict[str, float]:
    best = [match.best_edits for match in match_captions(captions, references)]
    edits, words = sum(one.edits for one in best), sum(one.words for one in best)
    return {f"{prefix}edits": float(edits), f"{prefix}words": float(words)}
