"""The schemas of alt texts and of the published texts, which join captions, alt texts and reviews."""

from __future__ import annotations

import pyarrow as pa

# One row for each row of the captions part of the same number, in the same order. `run_id` and `created_at` are those
# of the caption, which shows when a newer caption has replaced it.
ALT_TEXT_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("alt_text", pa.string()),  # null: the image has no caption, or no value in the column
        pa.field("rules", pa.list_(pa.string()), nullable=False),  # names of the rules that changed something
        pa.field("flags", pa.list_(pa.string()), nullable=False),  # names of the findings
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)

UNREVIEWED = "unreviewed"
REVIEW_STATUSES = (UNREVIEWED, "approved", "edited", "rejected", "decorative", "expert")

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
        pa.field("model", pa.string()),  # null, as all of a model: the text is not a model's but came with the source
        pa.field("model_revision", pa.string()),
        pa.field("model_sha256", pa.string()),
        pa.field("training_run_id", pa.string()),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)
