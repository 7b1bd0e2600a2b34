"""Select the texts to publish, add their provenance and count what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.publishing.alt_text.schemas import TEXTS_SCHEMA, UNREVIEWED

# A text and its provenance. `text_by`: who wrote it: "machine", "person" (a reviewer), or "source" (the text came with
# the image). `review_status` and `reviewer`: who reviewed it and how.
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
MAX_PROBLEMS = 1_000
_PUBLISHED = ("approved", "edited", "decorative")
_REASONS = {
    UNREVIEWED: "not reviewed (--include-unreviewed exports them, those of a model marked as automatic)",
    "rejected": "rejected",
    "expert": "waiting for an expert",
    "decorative": "decorative, which {to} cannot express",
    "blank": "without words",
}


@dataclass
class Tally:
    """Counts of exported texts by review status and of the others by reason, and the first problems."""

    written: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, str]] = field(default_factory=list)  # (image_id, reason) of the first MAX_PROBLEMS
    withdrawn: int = 0  # texts of an earlier export that were removed

    def leave_out(self, row: dict[str, Any], reason: str) -> None:
        """Count a selected text that could not be written as left out, and keep the reason."""
        self.written[row["review_status"]] -= 1
        self.left_out[reason] += 1
        self.name_all([row["image_id"]], reason)

    def leave_out_all(self, image_ids: list[str], reason: str) -> None:
        """Count images that have no text as left out, and name them."""
        self.left_out.update({reason: len(image_ids)} if image_ids else {})
        self.name_all(image_ids, reason)

    def name_all(self, image_ids: list[str], reason: str) -> None:
        """Keep the reason of images, up to MAX_PROBLEMS of them."""
        space = MAX_PROBLEMS - len(self.problems)
        self.problems.extend((image_id, reason) for image_id in image_ids[:space])


@dataclass(frozen=True)
class Wording:
    """What an export adds to texts. `mark`: to those of a model that nobody has reviewed, or ""."""

    mark: str
    prefix: str = ""
    suffix: str = ""

    def variants(self, texts: Iterable[str]) -> set[bytes]:
        """Return how these texts may have been written by an earlier export, as UTF-8."""
        endings = ("", f" {self.mark}")
        return {f"{self.prefix}{text}{end}{self.suffix}".encode() for text in texts if text for end in endings}


AS_THEY_ARE = Wording("")


def select_texts(
    texts: Iterator[pa.Table],
    tally: Tally,
    to: str,
    wording: Wording,
    *,
    include_unreviewed: bool,
    supports_decorative: bool,
    field: str | None = None,
) -> Iterator[pa.Table]:
    """Yield tables of CHOSEN_SCHEMA with the texts to publish.

    `to`: the name of the format, for the reasons in the tally. `field`: the column that the texts are of, if not alt
    texts; images without a value in it are named in the tally.
    """
    words = _REASONS | ({"blank": f"without a value in {field}"} if field else {})
    for rows in texts:
        reasons = [_reason(*row, include_unreviewed, supports_decorative) for row in _columns(rows)]
        tally.left_out.update(words[reason].format(to=to) for reason in reasons if reason)
        if field:
            ids = rows.filter(pa.array([reason == "blank" for reason in reasons], pa.bool_()))["image_id"]
            tally.name_all(ids.to_pylist(), words["blank"])
        kept = rows.filter(pa.array([not reason for reason in reasons], pa.bool_()))
        tally.written.update(kept["review_status"].to_pylist())
        yield _with_author(_worded(kept, wording))


def unselected_texts(
    texts: Iterator[pa.Table], *, include_unreviewed: bool, supports_decorative: bool
) -> Iterator[pa.Table]:
    """Yield the other texts, which an update has to remove from an earlier export."""
    for rows in texts:
        unselected = [bool(_reason(*row, include_unreviewed, supports_decorative)) for row in _columns(rows)]
        yield _with_author(rows.filter(pa.array(unselected, pa.bool_())))


def _columns(rows: pa.Table) -> Iterator[tuple[str, str, list[str]]]:
    return zip(*(rows[name].to_pylist() for name in ("review_status", "alt_text", "flags")), strict=True)


def _reason(status: str, text: str, flags: list[str], include_unreviewed: bool, supports_decorative: bool) -> str:
    """Return why a text is left out; "" when it is exported."""
    if status == "decorative":
        return "" if supports_decorative else status
    if status not in _PUBLISHED and not (include_unreviewed and status == UNREVIEWED):
        return status
    blank = not text.strip() or (status == UNREVIEWED and "no_words" in flags)
    return "blank" if blank else ""


def _worded(rows: pa.Table, wording: Wording) -> pa.Table:
    column = rows.schema.get_field_index("alt_text")
    texts = rows["alt_text"]
    if wording.mark:
        marked = pc.binary_join_element_wise(texts, wording.mark, " ")
        is_automatic = pc.and_(pc.equal(rows["review_status"], UNREVIEWED), pc.is_valid(rows["model"]))
        texts = pc.if_else(is_automatic, marked, texts)
    if wording.prefix or wording.suffix:
        worded = pc.binary_join_element_wise(wording.prefix, texts, wording.suffix, "")
        texts = pc.if_else(pc.equal(rows["review_status"], "decorative"), texts, worded)
    return rows.set_column(column, TEXTS_SCHEMA.field("alt_text"), texts)


def _with_author(rows: pa.Table) -> pa.Table:
    by_person = pc.is_in(rows["review_status"], pa.array(["edited", "decorative"]))
    author = pc.if_else(by_person, "person", pc.if_else(pc.is_valid(rows["model"]), "machine", "source"))
    return rows.append_column(CHOSEN_SCHEMA.field("text_by"), author).cast(CHOSEN_SCHEMA)


def as_json(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with times as ISO 8601 strings."""
    return {name: value.isoformat() if hasattr(value, "isoformat") else value for name, value in row.items()}


def provenance(row: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance of a text as JSON values."""
    return as_json({name: row[name] for name in PROVENANCE})


def caption_writer(row: dict[str, Any]) -> str:
    """Return who wrote and reviewed a text in one line, for fields such as photoshop:CaptionWriter."""
    model = f"{row['model']}@{row['model_revision']}" if row["model_revision"] else row["model"]
    author, first_text = (f"Machine: {model}", f"by machine: {model}") if model else ("Source", "from the source")
    if row["review_status"] == UNREVIEWED:
        return f"{author} (unreviewed)"
    if row["text_by"] == "person":
        return f"{row['reviewer']} ({row['review_status']}; first text {first_text})"
    return f"{author} ({row['review_status']} by {row['reviewer']})"
