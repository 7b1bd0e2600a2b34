"""Seeded bootstrap intervals (Efron 1979, percentile method): how far a figure would move with other pictures.

Pictures with equal counts are interchangeable, so a resample of the pictures is a multinomial draw over the distinct
counts. Memory does not grow with the number of pictures, and their order does not matter.
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
    """The 95 % interval of a statistic of summed counts.

    `rows`: how many pictures have these counts, such as (edits, words). `statistic`: sums [RESAMPLES, width] -> values
    [RESAMPLES]. `None` for fewer than two pictures, which tell nothing about others.
    """
    total = sum(rows.values())
    if total < 2:
        return None
    kinds = sorted(rows)
    share = np.array([rows[kind] for kind in kinds]) / total
    drawn = np.random.default_rng(seed).multinomial(total, share, size=RESAMPLES)
    sums: Array = drawn.astype(np.float64) @ np.array(kinds, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(sums)
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def wer_interval(rows: Counter[tuple[int, int]], seed: int) -> Interval | None:
    """Of the corpus WER, from counts of (edits, words)."""
    return interval(rows, lambda sums: sums[:, 0] / sums[:, 1], seed)


def difference_interval(rows: Counter[tuple[int, int, int, int]], seed: int) -> Interval | None:
    """Of the difference of two runs' WER on the same pictures, from (edits, words, other edits, other words)."""
    return interval(rows, lambda sums: sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3], seed)


def mean_interval(values: list[float], seed: int) -> Interval | None:
    """Of the mean."""
    return interval(Counter((value, 1.0) for value in values), lambda sums: sums[:, 0] / sums[:, 1], seed)
