"""What the page shows of an image and of a decision about it."""

from __future__ import annotations

import math
from typing import Any

from captioner.console.text import counted, printable
from captioner.publishing.review.rows import FailedRow, Row
from captioner.publishing.review.standing_flags import describe_flag
from captioner.store.journal import Review

DECISION_LABELS = {
    "approved": "Approved",
    "edited": "Saved",
    "rejected": "Rejected",
    "decorative": "Marked as decorative",
    "expert": "Left for an expert",
    "skipped": "Skipped",
}


def describe_image(index: int, row: Row, review: Review | None) -> dict[str, Any]:
    """Return what is shown of one image. `review`: the decision about it, if any."""
    return {
        "index": index,
        "image_id": printable(row.image_id),
        "uri": printable(row.uri),
        "text": current_text(row, review),
        "caption": printable(row.caption),
        "flags": [describe_flag(flag) for flag in row.flags],
        "certainty": None if row.logprob_mean is None else _mean_probability(row.logprob_mean),
        "width": row.width,
        "height": row.height,
        "num_bytes": row.num_bytes,
    }


NOT_SHOWN = ("decoder_crashed", "timeout")  # what these images do to a decoder, they would do again


def describe_failed(number: int, failed: FailedRow) -> dict[str, Any]:
    """Return what is shown of an image without a caption. `number`: among these images."""
    return {
        "index": number,
        "image_id": printable(failed.row.image_id),
        "reason": failed.code.replace("_", " "),
        "text": printable(failed.message),
        "has_image": failed.code not in NOT_SHOWN,
    }


def current_text(row: Row, review: Review | None) -> str:
    """Return the alt text of an image, or what a person made of it."""
    return (review.text if review is not None else None) or row.alt_text


def describe_decision(review: Review, num_conflicts: int = 0) -> str:
    """Return a decision as a phrase. `num_conflicts`: images of its group that somebody else had decided about."""
    group = f" for {counted(len(review.image_ids), 'image')}" if len(review.image_ids) > 1 else ""
    conflicts = f"; {num_conflicts} already decided by somebody else" if num_conflicts else ""
    return f"{DECISION_LABELS[review.decision]}{group}{conflicts}"


def describe_earlier(review: Review, is_open: bool, reviewer: str) -> str:
    """Return who decided what about the image that is shown to `reviewer`. `is_open`: the decision waits for others."""
    if is_open:
        return f"{printable(review.reviewer)} asks for an expert"
    who = "you" if review.reviewer == reviewer else printable(review.reviewer)
    return f"{DECISION_LABELS[review.decision]} by {who}. A new decision replaces this one."


def _mean_probability(logprob_mean: float) -> float | None:
    """Return the geometric mean of the token probabilities, 0 to 1."""
    return math.exp(min(0.0, logprob_mean)) if math.isfinite(logprob_mean) else None
