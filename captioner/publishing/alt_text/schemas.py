"""What the rules make of a caption, what a person decides about it, and the text that comes of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, get_args
from uuid import uuid4

import pyarrow as pa

# One row for each row of the captions part of the same number, in the same order. `run_id` and `created_at` are those
# of the caption, so that a later caption is told from the one the alt text was made of.
ALT_TEXT_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("alt_text", pa.string()),  # null: the picture has no caption
        pa.field("rules", pa.list_(pa.string()), nullable=False),  # names of the rules that changed something
        pa.field("flags", pa.list_(pa.string()), nullable=False),  # for a person to decide
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)

Decision = Literal["approved", "edited", "rejected", "decorative", "expert", "skipped", "undo"]
DECISIONS: tuple[str, ...] = get_args(Decision)
# What a person settled about the picture itself holds for later captions too; other decisions were about one caption.
LASTING = ("approved", "edited", "decorative")

UNREVIEWED = "unreviewed"
REVIEW_STATUSES = (UNREVIEWED, "approved", "edited", "rejected", "decorative", "expert")


@dataclass(frozen=True, slots=True)
class Review:
    """One decision of one person, about one picture or several with the same alt text.

    `text`: the alt text approved or written; "" for a decorative picture, None where the decision gives none.
    `shown`: the alt text the person saw. `queue`: the order it came from ("flagged", "random", "all"). `undoes`: of an
    "undo" the `review_id` it takes back.
    """

    decision: Decision
    image_ids: tuple[str, ...]
    text: str | None
    reviewer: str
    shown: str = ""
    queue: str = "all"
    seconds: float | None = None  # from showing to deciding
    undoes: str | None = None
    reviewed_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    review_id: str = field(default_factory=lambda: uuid4().hex)


# What is published, one row for each captioned picture: the joined captions, alt texts and reviews.
TEXTS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("alt_text", pa.string(), nullable=False),  # a person's, else the rules'; "": decorative or blank
        pa.field("caption", pa.string(), nullable=False),  # the model's own words
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
