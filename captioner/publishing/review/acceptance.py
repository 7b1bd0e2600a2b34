"""How much is left, and how many alt texts people accept as they stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from captioner.publishing.alt_text.schemas import Review

_Z95 = 1.959963984540054
_RECENT = 50
_LONGEST = 300.0  # seconds; who took longer was away


@dataclass(frozen=True, slots=True)
class Acceptance:
    """`accepted` of `decided` random pictures were approved without an edit; `low`, `high`: the 95 % interval of the
    share in the whole table."""

    accepted: int
    decided: int
    low: float
    high: float


def acceptance(sample: Sequence[Review]) -> Acceptance | None:
    """From decisions about a random sample of pictures; `None` where there are none."""
    decided = len(sample)
    accepted = sum(review.decision == "approved" for review in sample)
    return Acceptance(accepted, decided, *wilson(accepted, decided)) if decided else None


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (E. B. Wilson, Probable Inference, JASA 22, 1927): right for few trials
    too, and near 0 and 1."""
    share, spread = successes / trials, _Z95**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def seconds_per_picture(own: Sequence[Review]) -> float | None:
    """Of one reviewer's last 50 timed decisions; a group counts as its pictures. `None` before the first."""
    timed = [(review.seconds, len(review.image_ids)) for review in own if review.seconds is not None][-_RECENT:]
    if not timed:
        return None
    return sum(min(seconds, _LONGEST) for seconds, _ in timed) / sum(number for _, number in timed)
