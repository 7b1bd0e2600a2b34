"""The texts of a table as they stand: captions, alt texts and reviews joined, one part at a time."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.errors import OutputError
from captioner.publishing.alt_text.journal import latest_reviews, read_reviews
from captioner.publishing.alt_text.schemas import LASTING, TEXTS_SCHEMA, UNREVIEWED, Review
from captioner.store.read import read_parts
from captioner.store.table import CaptionsTable

SETTINGS_FILE = "alt_text/settings.json"  # written last: the alt texts are complete
_OWN = {"alt_text", "flags", "review_status", "reviewer", "reviewed_at", "language"}
_FROM_CAPTIONS = [name for name in TEXTS_SCHEMA.names if name not in _OWN]


def alt_text_name(part: int) -> str:
    return f"alt_text/part-{part:05d}.parquet"


def require_finished(table: CaptionsTable) -> None:
    """Raise OutputError where rows of the table are still to be made."""
    if not table.plans() or table.open_plans():
        raise OutputError(f"{table.directory.location} is not finished; run the same `captioner caption` again")


def read_texts(table: CaptionsTable) -> Iterator[pa.Table]:
    """Tables of TEXTS_SCHEMA, one for each part of the captions table, in its order; pictures without a caption are
    left out. Reviews are held in memory: they are as many as people made.

    Raises OutputError where the table is not finished, or has no alt texts or older ones.
    """
    reviews = latest_reviews(read_reviews(table.directory)[0])
    language = read_settings(table)["language"]
    for _, rows, made in read_alt_texts(table, [*_FROM_CAPTIONS, "flags"]):
        yield _joined(rows, made, reviews, language)


def read_settings(table: CaptionsTable) -> dict[str, Any]:
    """With what `captioner alt-text` made the alt texts: "language", "max_chars", "hard_max", ... Raises OutputError
    where the table is not finished or has none."""
    require_finished(table)
    if not table.directory.exists(SETTINGS_FILE):
        raise OutputError(f"{table.directory.location} has no alt texts; run `captioner alt-text` on it first")
    return table.directory.read_json(SETTINGS_FILE)


def read_alt_texts(table: CaptionsTable, columns: list[str]) -> Iterator[tuple[int, pa.Table, pa.Table]]:
    """(part, these columns of its captions, its rows of ALT_TEXT_SCHEMA), row for row. Raises as `read_texts`."""
    read_settings(table)
    columns = list(dict.fromkeys([*columns, "image_id", "run_id", "created_at"]))
    for part, rows in zip(sorted(table.published_parts()), read_parts(table, columns), strict=True):
        made = table.directory.read_table(alt_text_name(part))
        if not all(made[name].equals(rows[name]) for name in ("image_id", "run_id", "created_at")):
            raise OutputError(
                f"{table.directory.location} has newer captions than alt texts; run `captioner alt-text` on it again"
            )
        yield part, rows, made


def holds(review: Review, created_at: datetime) -> bool:
    """Whether a decision holds for a caption made at `created_at`: not where it was about an earlier one."""
    return review.decision in LASTING or created_at <= review.reviewed_at


def _joined(rows: pa.Table, made: pa.Table, reviews: dict[str, Review], language: str | None) -> pa.Table:
    captioned = pc.is_valid(made["alt_text"])
    rows, made = rows.filter(captioned), made.filter(captioned)
    places = list(_decided(rows, reviews))
    texts = made["alt_text"].to_pylist()
    status: list[str] = [UNREVIEWED] * len(texts)
    reviewers: list[Any] = [None] * len(texts)
    times: list[Any] = [None] * len(texts)
    for place, review in places:
        texts[place] = texts[place] if review.text is None else review.text
        status[place], reviewers[place], times[place] = review.decision, review.reviewer, review.reviewed_at
    own: dict[str, Any] = {
        "alt_text": texts,
        "flags": [
            sorted({*(of_caption or ()), *of_text})
            for of_caption, of_text in zip(rows["flags"].to_pylist(), made["flags"].to_pylist(), strict=True)
        ],
        "review_status": status,
        "reviewer": reviewers,
        "reviewed_at": times,
        "language": [language] * len(texts),
    }
    arrays = [
        pa.array(own[field.name], field.type) if field.name in _OWN else rows[field.name].combine_chunks()
        for field in TEXTS_SCHEMA
    ]
    return pa.table(arrays, schema=TEXTS_SCHEMA)


def _decided(rows: pa.Table, reviews: dict[str, Review]) -> Iterator[tuple[int, Review]]:
    """Rows with the decision that holds for them. What was decided about an earlier caption does not hold."""
    if not reviews:
        return
    created = rows["created_at"]
    for place, image_id in enumerate(rows["image_id"].to_pylist()):
        review = reviews.get(image_id)
        if review and holds(review, created[place].as_py()):
            yield place, review
