"""The acceptance rate of unedited alt texts, and the time that a reviewer needs for an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from captioner.scoring.verdicts import wilson
from captioner.store.journal import Review

_NUM_RECENT = 50
_MAX_SECONDS = 300.0  # a reviewer who took longer was away


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How many of the reviewed random images were approved without an edit.

    `low`, `high`: the 95 % confidence interval of the share in the whole table.
    """

    accepted: int
    decided: int
    low: float
    high: float


def acceptance(sample: Sequence[Review]) -> Acceptance | None:
    """Return the acceptance rate in the decisions about a random sample of images; `None` for an empty sample."""
    decided = len(sample)
    accepted = sum(review.decision == "approved" for review in sample)
    return Acceptance(accepted, decided, *wilson(accepted, decided)) if decided else None


def seconds_per_image(reviews: Sequence[Review]) -> float | None:
    """Return the mean time per image of one reviewer's last 50 timed decisions; `None` when there are none."""
    timed = [(review.seconds, len(review.image_ids)) for review in reviews if review.seconds is not None][-_NUM_RECENT:]
    if not timed:
        return None
    return sum(min(seconds, _MAX_SECONDS) for seconds, _ in timed) / sum(num_images for _, num_images in timed)
