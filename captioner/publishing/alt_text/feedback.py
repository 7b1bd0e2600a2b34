"""`captioner feedback`: write approved and edited texts as training pairs.

PAIRS is a directory with one Parquet file that `captioner train` reads; it includes the images, so that training does
not need the source. Training saves the sha256 of its images with the model, and `captioner check` excludes them.
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

from captioner.console.text import counted, printable, shell_command
from captioner.errors import OK, OutputError
from captioner.files import is_uri, local_path
from captioner.publishing.alt_text.texts import require_finished
from captioner.sources import reopen_source
from captioner.sources.reading import read_images
from captioner.store.journal import Review, latest_reviews, read_reviews
from captioner.store.replan import current_plan_rows, generation_of_parts
from captioner.store.table import CaptionsTable, captions_name, open_table

PAIRS_FILE, RECORD_FILE = "pairs.parquet", "feedback.json"
_BATCH_SIZE = 64  # images in memory

FEEDBACK_SCHEMA = pa.schema(
    [
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),  # one element: the person's text
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("review_status", pa.string(), nullable=False),  # "approved" or "edited"
        pa.field("reviewer", pa.string(), nullable=False),
        pa.field("reviewed_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("machine_text", pa.string()),  # the model's caption
        pa.field("model_sha256", pa.string(), nullable=False),
    ]
)


@dataclass
class Feedback:
    """Counts of the pairs by decision, and of the reviews left out by reason."""

    pairs: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    damaged: int = 0

    @property
    def text(self) -> str:
        """The counts as one line."""
        pairs = ", ".join(f"{count:,} {name}" for name, count in self.pairs.most_common())
        left_out = ", ".join(f"{count:,} {name}" for name, count in self.left_out.most_common())
        damaged = f"; ignored {counted(self.damaged, 'damaged line')} of the journal" if self.damaged else ""
        return f"{counted(self.pairs.total(), 'pair')} ({pairs or 'none'}); left out: {left_out or 'none'}{damaged}"


def run(out: str, pairs: str) -> int:
    """Write PAIRS, print a summary and return the exit code. Raises CaptionerError."""
    feedback = write_feedback(open_table(out), pairs)
    print(f"{printable(pairs)}: {feedback.text}")
    print(f"train a model: {printable(shell_command('train', pairs, 'TRAINED', '--model', 'MODEL'))}")
    return OK


def write_feedback(table: CaptionsTable, location: str) -> Feedback:
    """Write the directory of training pairs; it appears only when it is complete.

    Left out and counted: decisions without a text to learn (rejected, decorative, expert), and images that are no
    longer in the table, cannot be read, or have changed since they were captioned or reviewed. Raises OutputError when
    PAIRS exists or is not a local path, the table is not finished, or no text was approved.
    """
    if is_uri(location):
        raise OutputError(f"{location}: pairs are written to a local disk; give a local PAIRS and copy it")
    target = Path(local_path(location))
    if target.exists():
        raise OutputError(f"{location} exists already; give another PAIRS, or remove it")
    require_finished(table)
    reviews, damaged = read_reviews(table.directory)
    if not reviews:
        out = table.directory.shown("")
        raise OutputError(f"{out} has no reviews; run `{shell_command('review', out)}` first")
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
    """Return the decisions with a text to learn, by image id; count the others as left out."""
    kept = {}
    for image_id, review in reviews.items():
        if review.decision in ("approved", "edited") and (review.text or "").strip():
            kept[image_id] = review
        else:
            feedback.left_out[review.decision] += 1
    return kept


def _write(table: CaptionsTable, texts: dict[str, Review], file: Path, feedback: Feedback) -> None:
    num_in_table = 0
    with pq.ParquetWriter(file, FEEDBACK_SCHEMA, compression="zstd") as writer:
        for planned, rows in _reviewed_rows(table, texts):
            num_in_table += len(rows)
            pairs = list(_pairs(table, planned, rows, texts, feedback))
            writer.write_table(pa.Table.from_pylist(pairs, schema=FEEDBACK_SCHEMA))
    if len(texts) > num_in_table:
        feedback.left_out["not in the table"] += len(texts) - num_in_table


def _reviewed_rows(table: CaptionsTable, texts: dict[str, Review]) -> Iterator[tuple[pa.Table, list[dict[str, Any]]]]:
    """Yield the plan rows and the captions of reviewed images, a batch at a time, in table order."""
    columns = ["image_id", "sha256", "caption", "model_sha256", "created_at"]
    for part in generation_of_parts(table):
        rows = table.directory.read_table(captions_name(part), columns)
        ids = rows["image_id"].to_pylist()
        reviewed = np.array([index for index, image_id in enumerate(ids) if image_id in texts], int)
        if not len(reviewed):
            continue
        planned = current_plan_rows(table, part)
        for first in range(0, len(reviewed), _BATCH_SIZE):
            batch = reviewed[first : first + _BATCH_SIZE]
            yield planned.take(batch), rows.take(batch).to_pylist()


def _pairs(
    table: CaptionsTable,
    planned: pa.Table,
    rows: list[dict[str, Any]],
    texts: dict[str, Review],
    feedback: Feedback,
) -> Iterator[dict[str, Any]]:
    source = reopen_source(table.info["source"])
    for raw, row in zip(read_images(source, planned), rows, strict=True):
        if raw.data is None:
            feedback.left_out[raw.error_code] += 1
        elif sha256(raw.data).hexdigest() != row["sha256"]:
            feedback.left_out["changed since it was captioned"] += 1
        elif not (review := texts[raw.image_id]).applies_to(row["created_at"], row["sha256"]):
            feedback.left_out["changed since it was reviewed"] += 1
        else:
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
