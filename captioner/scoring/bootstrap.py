"""Seeded bootstrap confidence intervals (Efron 1979, percentile method) over images.

Images with equal counts are interchangeable, so a resample of the images is a multinomial draw over the distinct
counts. Memory does not grow with the number of images, and their order does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
LEVEL = 0.95

Array = npt.NDArray[np.float64]
Interval = tuple[float, float]


def interval(rows: Mapping[Any, int], statistic: Callable[[Array], Array], seed: int) -> Interval | None:
    """Return the 95 % confidence interval of a statistic of summed counts; `None` for fewer than two images.

    `rows`: number of images by their counts, such as (edits, words). `statistic`: sums [RESAMPLES, width] -> values
    [RESAMPLES].
    """
    total = sum(rows.values())
    if total < 2:
        return None
    counts = sorted(rows)
    share = np.array([rows[count] for count in counts]) / total
    resamples = np.random.default_rng(seed).multinomial(total, share, size=RESAMPLES)
    sums: Array = resamples.astype(np.float64) @ np.array(counts, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(sums)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def wer_interval(rows: Counter[tuple[int, int]], seed: int) -> Interval | None:
    """Return the interval of the corpus WER, from counts of (edits, words)."""
    return interval(rows, lambda sums: sums[:, 0] / sums[:, 1], seed)


def difference_interval(rows: Counter[tuple[int, int, int, int]], seed: int) -> Interval | None:
    """Return the interval of the difference between two runs' WER on the same images.

    `rows`: number of images by (edits, words, other edits, other words).
    """
    return interval(rows, lambda sums: sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3], seed)


def mean_interval(values: list[float], seed: int) -> Interval | None:
    """Return the interval of the mean."""
    return interval(Counter((value, 1.0) for value in values), lambda sums: sums[:, 0] / sums[:, 1], seed)
