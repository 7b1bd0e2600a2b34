"""Approved and edited texts as training pairs: what people wrote teaches the next model.

PAIRS is a directory with one Parquet file that `captioner train` takes as it is, pictures included, so that it trains
anywhere. Training keeps the sha256 of its pictures beside the model, and checks of that model leave them out.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner.config import SourceConfig
from captioner.console.text import printable
from captioner.errors import OK, OutputError
from captioner.files import is_uri, local_path
from captioner.publishing.alt_text.journal import latest_reviews, read_reviews
from captioner.publishing.alt_text.schemas import Review
from captioner.publishing.alt_text.texts import require_finished
from captioner.sources import open_source
from captioner.store.replan import founded_by
from captioner.store.table import CaptionsTable, captions_name, open_table, plan_part_name

PAIRS_FILE, RECORD_FILE = "pairs.parquet", "feedback.json"
_PICTURES_AT_ONCE = 64

FEEDBACK_SCHEMA = pa.schema(
    [
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),  # one: the person's text
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("review_status", pa.string(), nullable=False),  # "approved" or "edited"
        pa.field("reviewer", pa.string(), nullable=False),
        pa.field("reviewed_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("machine_text", pa.string()),  # the model's own words
        pa.field("model_sha256", pa.string(), nullable=False),
    ]
)


@dataclass
class Feedback:
    """What became pairs, by decision, and what was left out, by reason."""

    pairs: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    damaged: int = 0

    @property
    def text(self) -> str:
        made = ", ".join(f"{count:,} {name}" for name, count in self.pairs.most_common())
        left = ", ".join(f"{count:,} {name}" for name, count in self.left_out.most_common())
        lines = f"; {self.damaged:,} damaged lines of the journal were passed over" if self.damaged else ""
        return f"{self.pairs.total():,} pairs ({made or 'none'}); left out: {left or 'none'}{lines}"


def run(out: str, pairs: str) -> int:
    """Write PAIRS and print what is in it; returns the exit code. Raises CaptionerError."""
    made = write_feedback(open_table(out), pairs)
    print(f"{printable(pairs)}: {made.text}")
    print(f"teach a model: captioner train {printable(pairs)} TRAINED --model MODEL")
    return OK


def write_feedback(table: CaptionsTable, location: str) -> Feedback:
    """Write the directory of training pairs, whole or not at all.

    Left out, and counted: decisions that give no text to learn (rejected, decorative, expert), pictures that the table
    no longer has, that cannot be read, or whose bytes are not those that were captioned.
    Raises OutputError where PAIRS exists or is no local path, the table is not finished, or no text was approved.
    """
    if is_uri(location):
        raise OutputError(f"{location}: pairs are written to a local disk; give a local PAIRS and copy it")
    target = Path(local_path(location))
    if target.exists():
        raise OutputError(f"{location} is there already; give another PAIRS, or remove it")
    require_finished(table)
    reviews, damaged = read_reviews(table.directory)
    if not reviews:
        raise OutputError(f"{table.directory.location} has no reviews; run `captioner review` on it first")
    feedback = Feedback(damaged=damaged)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(table, _texts(latest_reviews(reviews), feedback), temporary / PAIRS_FILE, feedback)
        if not feedback.pairs:
            raise OutputError(
                f"{table.directory.location}: no pairs: {feedback.text}; approve or edit some texts first"
            )
        (temporary / RECORD_FILE).write_text(json.dumps(_record(table, feedback), indent=2) + "\n", encoding="utf-8")
        os.rename(temporary, target)
    except OSError as error:
        raise OutputError(f"{location} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary)
    return feedback


def _record(table: CaptionsTable, feedback: Feedback) -> dict[str, Any]:
    return {
        "table": table.directory.location,
        "table_id": table.table_id,
        "pairs": dict(feedback.pairs),
        "left_out": dict(feedback.left_out),
        "damaged_journal_lines": feedback.damaged,
    }


def _texts(reviews: dict[str, Review], feedback: Feedback) -> dict[str, Review]:
    """The decisions with a text to learn; the others are counted."""
    kept = {}
    for image_id, review in reviews.items():
        if review.decision in ("approved", "edited") and (review.text or "").strip():
            kept[image_id] = review
        else:
            feedback.left_out[review.decision] += 1
    return kept


def _write(table: CaptionsTable, texts: dict[str, Review], file: Path, feedback: Feedback) -> None:
    found = 0
    with pq.ParquetWriter(file, FEEDBACK_SCHEMA, compression="zstd") as writer:
        for planned, rows in _reviewed_rows(table, texts):
            found += len(rows)
            pairs = list(_pairs(table, planned, rows, texts, feedback))
            writer.write_table(pa.Table.from_pylist(pairs, schema=FEEDBACK_SCHEMA))
    if len(texts) > found:
        feedback.left_out["not in the table"] += len(texts) - found


def _reviewed_rows(table: CaptionsTable, texts: dict[str, Review]) -> Iterator[tuple[pa.Table, list[dict[str, Any]]]]:
    """Planned rows and their captions, a few pictures at a time, in the order of the table."""
    columns = ["image_id", "sha256", "caption", "model_sha256"]
    for part, generation in founded_by(table).items():
        rows = table.directory.read_table(captions_name(part), columns)
        places = np.array([n for n, image_id in enumerate(rows["image_id"].to_pylist()) if image_id in texts], int)
        if not len(places):
            continue
        planned = table.directory.read_table(plan_part_name(generation, part))
        for first in range(0, len(places), _PICTURES_AT_ONCE):
            some = places[first : first + _PICTURES_AT_ONCE]
            yield planned.take(some), rows.take(some).to_pylist()


def _pairs(
    table: CaptionsTable,
    planned: pa.Table,
    rows: list[dict[str, Any]],
    texts: dict[str, Review],
    feedback: Feedback,
) -> Iterator[dict[str, Any]]:
    source = open_source(SourceConfig.model_validate(table.info["source"]))
    for raw, row in zip(source.read(planned), rows, strict=True):
        if raw.data is None:
            feedback.left_out[raw.error_code] += 1
        elif sha256(raw.data).hexdigest() != row["sha256"]:
            feedback.left_out["changed since it was captioned"] += 1
        else:
            review = texts[raw.image_id]
            feedback.pairs[review.decision] += 1
            yield {
                "image": {"bytes": raw.data, "path": os.path.basename(raw.image_id)},
                "image_id": raw.image_id,
                "captions": [review.text],
                "sha256": row["sha256"],
                "review_status": review.decision,
                "reviewer": review.reviewer,
                "reviewed_at": review.reviewed_at,
                "machine_text": row["caption"],
                "model_sha256": row["model_sha256"],
            }
