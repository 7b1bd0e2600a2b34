"""Join captions, alt texts and reviews into the current texts of a table, one part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.console.text import shell_command
from captioner.data import STATUS_FAILED
from captioner.errors import OutputError
from captioner.publishing.alt_text.schemas import ALT_TEXT_SCHEMA, TEXTS_SCHEMA, UNREVIEWED
from captioner.publishing.fields import CAPTION_FIELD, check_field, is_from_source, texts_of
from captioner.store.journal import Review, read_latest_reviews
from captioner.store.read import read_parts
from captioner.store.replan import generation_of_parts
from captioner.store.table import CaptionsTable

SETTINGS_FILE = "alt_text/settings.json"  # written last: exists only when the alt texts are complete
_JOINED = {"alt_text", "flags", "review_status", "reviewer", "reviewed_at", "language"}
LeaveOut = Callable[[list[str], str], None]  # takes the ids of images that have no text, and the reason
_OF_A_MODEL = {"model", "model_revision", "model_sha256", "training_run_id"}
_FROM_CAPTIONS = [name for name in TEXTS_SCHEMA.names if name not in _JOINED]


def alt_text_name(part: int) -> str:
    """Return the file name of one part's alt texts."""
    return f"alt_text/part-{part:05d}.parquet"


def require_finished(table: CaptionsTable) -> None:
    """Raise OutputError when the table has rows that are not captioned yet."""
    if not table.plans() or table.open_plans():
        raise OutputError(f"{table.directory.location} is not finished; run the same `captioner caption` again")


def lacking(field: str) -> str:
    """Return in words what images without a text of this column lack."""
    return "without a caption" if field == CAPTION_FIELD else f"without a caption or a value in {field}"


def read_texts(table: CaptionsTable, leave_out: LeaveOut = lambda ids, reason: None) -> Iterator[pa.Table]:
    """Yield one table of TEXTS_SCHEMA for each part of the captions table, in order, without images that have no text.

    All reviews are kept in memory. Raises OutputError when the table is not finished, or its alt texts are missing or
    outdated.
    """
    reviews = read_latest_reviews(table.directory)
    settings = read_settings(table)
    field = settings.get("field", CAPTION_FIELD)
    for _, rows, alt_texts in read_alt_texts(table, [*_FROM_CAPTIONS, "flags"]):
        leave_out(_without(alt_texts["alt_text"], rows), lacking(field))
        yield _join(_with_author(table, rows, field), alt_texts, reviews, settings["language"])


def read_field(table: CaptionsTable, field: str, leave_out: LeaveOut = lambda ids, reason: None) -> Iterator[pa.Table]:
    """Yield tables as `read_texts` does, with the texts of a column; "" where an image has no value in it.

    Needs no alt texts. Decisions of reviewers that keep an image back hold for every column; those that let a text
    pass hold for the column that the alt texts were made of, and give the text that the person saw or wrote.
    """
    require_finished(table)
    check_field(table, field)
    settings = table.directory.read_json(SETTINGS_FILE) if table.directory.exists(SETTINGS_FILE) else {}
    is_reviewed = settings.get("field", CAPTION_FIELD) == field
    reviews = {
        image_id: review
        for image_id, review in read_latest_reviews(table.directory).items()
        if is_reviewed or review.decision not in ("approved", "edited")
    }
    for rows in read_parts(table, list(dict.fromkeys([*_FROM_CAPTIONS, "flags", field]))):
        leave_out(_without(rows["caption"], rows), lacking(CAPTION_FIELD))
        captioned = rows.filter(pc.is_valid(rows["caption"]))
        texts = pc.fill_null(texts_of(captioned, field), "")
        flags = pa.repeat(pa.scalar([], pa.list_(pa.string())), captioned.num_rows)
        field_texts = pa.table({"alt_text": texts, "flags": flags})
        yield _join(_with_author(table, captioned, field), field_texts, reviews, settings.get("language"))


def _with_author(table: CaptionsTable, rows: pa.Table, field: str) -> pa.Table:
    """Return the rows without a model where the texts of the column came with the source."""
    for name in _OF_A_MODEL if is_from_source(table, field) else ():
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.nulls(len(rows), pa.string()))
    return rows


def _without(texts: pa.ChunkedArray, rows: pa.Table) -> list[str]:
    """Return the ids of the images that have no text."""
    ids: list[str] = rows["image_id"].filter(pc.is_null(texts)).to_pylist()
    return ids


def read_settings(table: CaptionsTable) -> dict[str, Any]:
    """Return the settings of `captioner alt-text`: "language", "max_chars", "hard_max", ...

    Raises OutputError when the table is not finished or has no alt texts.
    """
    require_finished(table)
    if not table.directory.exists(SETTINGS_FILE):
        out = table.directory.shown("")
        raise OutputError(f"{out} has no alt texts; run `{shell_command('alt-text', out)}` first")
    settings = table.directory.read_json(SETTINGS_FILE)
    if not {"language", "max_chars", "hard_max"} <= settings.keys():
        raise table.directory.damage(SETTINGS_FILE, "is damaged: it holds no settings of alt texts")
    return settings


def read_alt_texts(table: CaptionsTable, columns: list[str]) -> Iterator[tuple[int, pa.Table, pa.Table]]:
    """Yield (part, these columns of its captions, its rows of ALT_TEXT_SCHEMA). Raises as `read_texts`."""
    read_settings(table)
    columns = list(dict.fromkeys([*columns, "image_id", "status", "run_id", "created_at"]))
    for part, rows in zip(generation_of_parts(table), read_parts(table, columns), strict=True):
        alt_texts = table.directory.read_table(alt_text_name(part), ALT_TEXT_SCHEMA.names)
        if not _are_of(rows, alt_texts):
            out = table.directory.shown("")
            raise OutputError(f"{out} has newer captions than alt texts; run `{shell_command('alt-text', out)}` again")
        yield part, rows, alt_texts


def _are_of(rows: pa.Table, alt_texts: pa.Table) -> bool:
    """Return whether the alt texts were made of these captions.

    An image that had no caption and still has none may have been tried again since.
    """
    if not alt_texts["image_id"].equals(rows["image_id"]):
        return False
    same = pc.and_(*(pc.equal(alt_texts[name], rows[name]) for name in ("run_id", "created_at")))
    without = pc.and_(pc.equal(rows["status"], STATUS_FAILED), pc.is_null(alt_texts["alt_text"]))
    return pc.all(pc.or_(same, without)).as_py() is not False


def _join(rows: pa.Table, alt_texts: pa.Table, reviews: dict[str, Review], language: str | None) -> pa.Table:
    captioned = pc.is_valid(alt_texts["alt_text"])
    rows, alt_texts = rows.filter(captioned), alt_texts.filter(captioned)
    texts = alt_texts["alt_text"].to_pylist()
    status: list[str] = [UNREVIEWED] * len(texts)
    reviewers: list[Any] = [None] * len(texts)
    times: list[Any] = [None] * len(texts)
    for index, review in _applicable_reviews(rows, reviews):
        texts[index] = texts[index] if review.text is None else review.text
        status[index], reviewers[index], times[index] = review.decision, review.reviewer, review.reviewed_at
    joined: dict[str, Any] = {
        "alt_text": texts,
        "flags": [
            sorted({*(of_caption or ()), *of_text})
            for of_caption, of_text in zip(rows["flags"].to_pylist(), alt_texts["flags"].to_pylist(), strict=True)
        ],
        "review_status": status,
        "reviewer": reviewers,
        "reviewed_at": times,
        "language": [language] * len(texts),
    }
    arrays = [
        pa.array(joined[field.name], field.type) if field.name in _JOINED else rows[field.name].combine_chunks()
        for field in TEXTS_SCHEMA
    ]
    return pa.table(arrays, schema=TEXTS_SCHEMA)


def _applicable_reviews(rows: pa.Table, reviews: dict[str, Review]) -> Iterator[tuple[int, Review]]:
    """Yield the index of each reviewed row with its review, unless that was about an earlier caption or file."""
    if not reviews:
        return
    created, sha256 = rows["created_at"], rows["sha256"]
    for index, image_id in enumerate(rows["image_id"].to_pylist()):
        review = reviews.get(image_id)
        if review and review.applies_to(created[index].as_py(), sha256[index].as_py()):
            yield index, review
