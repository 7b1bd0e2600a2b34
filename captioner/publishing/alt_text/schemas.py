"""The schemas of alt texts, reviews and the published texts that join both."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, get_args
from uuid import uuid4

import pyarrow as pa

# One row for each row of the captions part of the same number, in the same order. `run_id` and `created_at` are those
# of the caption, which shows when a newer caption has replaced it.
ALT_TEXT_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("alt_text", pa.string()),  # null: the image has no caption
        pa.field("rules", pa.list_(pa.string()), nullable=False),  # names of the rules that changed something
        pa.field("flags", pa.list_(pa.string()), nullable=False),  # names of the findings
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)

Decision = Literal["approved", "edited", "rejected", "decorative", "expert", "skipped", "undo"]
DECISIONS: tuple[str, ...] = get_args(Decision)
# Decisions about the image itself, which also apply to its later captions; the others are about one caption.
SETTLED = ("approved", "edited", "decorative")

UNREVIEWED = "unreviewed"
REVIEW_STATUSES = (UNREVIEWED, "approved", "edited", "rejected", "decorative", "expert")


@dataclass(frozen=True, slots=True)
class Review:
    """One person's decision about one image, or about several with the same alt text.

    `text`: the approved or edited alt text; "" for a decorative image, None when the decision gives none. `shown`: the
    alt text that the person saw. `queue`: the review order ("flagged", "random" or "all"). `undoes`: the `review_id`
    that an "undo" reverts.
    """

    decision: Decision
    image_ids: tuple[str, ...]
    text: str | None
    reviewer: str
    shown: str = ""
    queue: str = "all"
    seconds: float | None = None  # time between display and decision
    undoes: str | None = None
    reviewed_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    review_id: str = field(default_factory=lambda: uuid4().hex)

    @property
    def is_settled(self) -> bool:
        """Whether the decision also applies to later captions of the image."""
        return self.decision in SETTLED

    def applies_to(self, created_at: datetime) -> bool:
        """Return whether the decision applies to a caption created at `created_at`, not only to an earlier one."""
        return self.is_settled or created_at <= self.reviewed_at


# The published texts, one row for each captioned image: captions, alt texts and reviews joined.
TEXTS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("alt_text", pa.string(), nullable=False),  # edited or made by the rules; "": decorative or blank
        pa.field("caption", pa.string(), nullable=False),  # the model's caption
        pa.field("logprob_mean", pa.float32()),
        pa.field("flags", pa.list_(pa.string()), nullable=False),  # of caption and alt text
        pa.field("review_status", pa.string(), nullable=False),  # one of REVIEW_STATUSES
        pa.field("reviewer", pa.string()),
        pa.field("reviewed_at", pa.timestamp("us", tz="UTC")),
        pa.field("language", pa.string()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("model_revision", pa.string()),
        pa.field("model_sha256", pa.string(), nullable=False),
        pa.field("training_run_id", pa.string()),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)
