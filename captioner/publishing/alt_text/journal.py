"""What people decided, in OUT/reviews: one JSON line a decision, appended and flushed to the disk before the next
picture is shown.

A file for each reviewer, so that several work at once. Nothing is ever rewritten: an undo is a line of its own. A kill
can cut off the last line only; that line was never acknowledged, and the next start puts it aside.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from captioner.errors import OutputError
from captioner.publishing.alt_text.schemas import DECISIONS, Review
from captioner.store.directory import Directory, sync_folder

FOLDER = "reviews"


class Journal:
    """Appends one reviewer's decisions to OUT. A context manager: it holds the file open. Raises OutputError where
    OUT is no local directory or cannot be written."""

    def __init__(self, out: Directory, reviewer: str) -> None:
        if not out.is_local:
            raise OutputError(f"{out.location}: reviews are written to a local disk; copy OUT to one and review there")
        path = Path(out.path(f"{FOLDER}/{journal_name(reviewer)}"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
            sync_folder(path.parent)
            self._torn = bool(path.stat().st_size) and not _ends_a_line(path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}; free it and start again") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, review: Review) -> None:
        """When this returns, the decision is on the disk. Raises OutputError."""
        text = json.dumps(asdict(review) | {"reviewed_at": review.reviewed_at.isoformat()}, ensure_ascii=False)
        # What a kill cut off stays a damaged line of its own. One write: another process may append too.
        line = (b"\n" if self._torn else b"") + text.encode("utf-8", "surrogatepass") + b"\n"
        self._torn = True
        before, written = os.fstat(self._file.fileno()).st_size, 0
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._take_back(before, written)
            raise OutputError(f"{self._file.name}: the decision was not saved: {error.strerror}") from error
        self._torn = False

    def _take_back(self, before: int, written: int) -> None:
        """What was not acknowledged should not count; unless another process has written behind it."""
        with suppress(OSError):
            if os.fstat(self._file.fileno()).st_size == before + written:
                os.ftruncate(self._file.fileno(), before)


def read_reviews(out: Directory) -> tuple[list[Review], int]:
    """Every decision that holds, oldest first, undone ones left out; and the number of damaged lines passed over."""
    found: list[Review] = []
    damaged = 0
    for name in out.list_names(FOLDER):
        for review in parse_lines(out.read_bytes(f"{FOLDER}/{name}")):
            if review is None:
                damaged += 1
            else:
                found.append(review)
    undone = {review.undoes for review in found if review.decision == "undo"}
    kept = [r for r in found if r.decision != "undo" and r.review_id not in undone]
    return sorted(kept, key=lambda review: (review.reviewed_at, review.review_id)), damaged


def latest_reviews(reviews: list[Review]) -> dict[str, Review]:
    """The decision that holds for each picture: the latest one that decided something."""
    return {image_id: review for review in reviews if review.decision != "skipped" for image_id in review.image_ids}


def parse_lines(data: bytes) -> Iterator[Review | None]:
    """The decisions of whole lines of a journal; `None` for a damaged one."""
    for line in data.splitlines():
        if line.strip():
            yield _review(line)


def _review(line: bytes) -> Review | None:
    try:
        value: dict[str, Any] = json.loads(line)
        review = Review(
            **value
            | {"image_ids": tuple(value["image_ids"]), "reviewed_at": datetime.fromisoformat(value["reviewed_at"])}
        )
    except (ValueError, TypeError, KeyError):
        return None
    return review if review.decision in DECISIONS else None


def journal_name(reviewer: str) -> str:
    """A file name that two different reviewers never share."""
    plain = re.sub(r"[^a-z0-9]+", "-", reviewer.lower()).strip("-")[:40] or "reviewer"
    return f"{plain}-{hashlib.sha256(reviewer.encode()).hexdigest()[:8]}.jsonl"


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
