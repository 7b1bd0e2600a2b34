"""Which texts are published, what each says of where it comes from, and counts of what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.publishing.alt_text.schemas import TEXTS_SCHEMA, UNREVIEWED

# A text and its provenance. `text_by`: "machine" or "person", who wrote it; `review_status` and `reviewer`: who let it
# pass.
CHOSEN_SCHEMA = TEXTS_SCHEMA.append(pa.field("text_by", pa.string(), nullable=False))
PROVENANCE = (
    "text_by",
    "review_status",
    "reviewer",
    "reviewed_at",
    "model",
    "model_revision",
    "model_sha256",
    "training_run_id",
    "run_id",
    "created_at",
)
MOST_NAMED = 1_000
_PUBLISHED = ("approved", "edited", "decorative")
_WHY_NOT = {
    UNREVIEWED: "nobody has reviewed (--include-unreviewed exports them, marked as automatic)",
    "rejected": "rejected",
    "expert": "waiting for an expert",
    "decorative": "decorative, which this form cannot say",
    "blank": "without words",
}


@dataclass
class Tally:
    """What went out by review status, what did not by reason, and which pictures a person should look at."""

    written: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    named: list[tuple[str, str]] = field(default_factory=list)  # (image_id, reason), the first of them
    withdrawn: int = 0  # texts of an earlier export that were taken back

    def leave_out(self, row: dict[str, Any], reason: str) -> None:
        """Take back one that was chosen but could not be written, and name it."""
        self.written[row["review_status"]] -= 1
        self.left_out[reason] += 1
        if len(self.named) < MOST_NAMED:
            self.named.append((row["image_id"], reason))


def choose(
    texts: Iterator[pa.Table], tally: Tally, *, include_unreviewed: bool, mark: str, says_decorative: bool
) -> Iterator[pa.Table]:
    """Tables of CHOSEN_SCHEMA with what may be published; `mark` is put behind what nobody has reviewed."""
    for rows in texts:
        reasons = [_reason(*row, include_unreviewed, says_decorative) for row in _columns(rows)]
        tally.left_out.update(_WHY_NOT[reason] for reason in reasons if reason)
        kept = rows.filter(pa.array([not reason for reason in reasons], pa.bool_()))
        tally.written.update(kept["review_status"].to_pylist())
        yield _with_author(_marked(kept, mark))


def refused(texts: Iterator[pa.Table], *, include_unreviewed: bool, says_decorative: bool) -> Iterator[pa.Table]:
    """The other texts: an earlier export may hold them and has to give them up."""
    for rows in texts:
        keep = [bool(_reason(*row, include_unreviewed, says_decorative)) for row in _columns(rows)]
        yield _with_author(rows.filter(pa.array(keep, pa.bool_())))


def _columns(rows: pa.Table) -> Iterator[tuple[str, str, list[str]]]:
    return zip(*(rows[name].to_pylist() for name in ("review_status", "alt_text", "flags")), strict=True)


def _reason(status: str, text: str, flags: list[str], include_unreviewed: bool, says_decorative: bool) -> str:
    """Why a text is left out; "" where it is not."""
    if status == "decorative":
        return "" if says_decorative else status
    if status not in _PUBLISHED and not (include_unreviewed and status == UNREVIEWED):
        return status
    says_nothing = not text.strip() or (status == UNREVIEWED and "no_words" in flags)
    return "blank" if says_nothing else ""


def _marked(rows: pa.Table, mark: str) -> pa.Table:
    place = rows.schema.get_field_index("alt_text")
    automatic = pc.equal(rows["review_status"], UNREVIEWED)
    texts = pc.if_else(automatic, pc.binary_join_element_wise(rows["alt_text"], mark, " "), rows["alt_text"])
    return rows.set_column(place, TEXTS_SCHEMA.field("alt_text"), texts)


def _with_author(rows: pa.Table) -> pa.Table:
    by_person = pc.is_in(rows["review_status"], pa.array(["edited", "decorative"]))
    author = pc.if_else(by_person, "person", "machine")
    return rows.append_column(CHOSEN_SCHEMA.field("text_by"), author).cast(CHOSEN_SCHEMA)


def as_json(row: dict[str, Any]) -> dict[str, Any]:
    """A row with times as ISO 8601 and NaN-free numbers."""
    return {name: value.isoformat() if hasattr(value, "isoformat") else value for name, value in row.items()}


def provenance(row: dict[str, Any]) -> dict[str, Any]:
    """Where a text comes from, as JSON values."""
    return as_json({name: row[name] for name in PROVENANCE})


def writer_of(row: dict[str, Any]) -> str:
    """The same in words, for fields that name who wrote a description."""
    model = row["model"] + (f"@{row['model_revision']}" if row["model_revision"] else "")
    if row["review_status"] == UNREVIEWED:
        return f"Machine: {model} (unreviewed)"
    if row["text_by"] == "person":
        return f"{row['reviewer']} ({row['review_status']}; first text by machine: {model})"
    return f"Machine: {model} ({row['review_status']} by {row['reviewer']})"
