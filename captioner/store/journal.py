"""Read and append the journals of people's decisions: OUT/reviews about alt texts, OUT/spot_checks about captions.

Each folder has one JSON Lines file for each reviewer, one line for each decision.

A line is on the disk before the page shows the next image. Files are only appended to; an undo is a line of its own. A
killed process can truncate only the last line, which was not yet acknowledged; readers ignore it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

from captioner.errors import OutputError
from captioner.store.directory import Directory, sync_folder

FOLDER, SPOT_CHECKS = "reviews", "spot_checks"
_SUFFIX = ".jsonl"

Decision = Literal["approved", "edited", "rejected", "decorative", "expert", "skipped", "undo"]
Verdict = Literal["right", "small_fault", "wrong", "offensive"]  # about a caption, from the best to the worst
DECISIONS: tuple[str, ...] = get_args(Decision)
VERDICTS: tuple[str, ...] = get_args(Verdict)
_DECISIONS_IN = {FOLDER: DECISIONS, SPOT_CHECKS: (*VERDICTS, "skipped", "undo")}
# Decisions about the image itself, which also apply to its later captions as long as its file holds the same bytes; the
# others are about one caption.
SETTLED = ("approved", "edited", "decorative")


@dataclass(frozen=True, slots=True)
class Review:
    """One person's decision about one image, or about several with the same alt text.

    `text`: the approved or edited alt text; "" for a decorative image, None when the decision gives none. `shown`: the
    text that the person saw. `queue`: the review order ("flagged", "random" or "all"). `undoes`: the `review_id` that
    an "undo" reverts. `sha256`: of the files of the images, in hex; () in journals of earlier versions, and of undos. A
    spot-check of captions has a verdict in place of a decision.
    """

    decision: Decision | Verdict
    image_ids: tuple[str, ...]
    text: str | None
    reviewer: str
    shown: str = ""
    queue: str = "all"
    seconds: float | None = None  # time between display and decision
    undoes: str | None = None
    sha256: tuple[str, ...] = ()
    reviewed_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    review_id: str = field(default_factory=lambda: uuid4().hex)

    @property
    def is_settled(self) -> bool:
        """Whether the decision also applies to later captions of the image."""
        return self.decision in SETTLED

    def applies_to(self, created_at: datetime, sha256: str | None) -> bool:
        """Return whether the decision applies to a caption created at `created_at`, and not to an earlier one only.

        `sha256`: of the file that was captioned. A settled decision holds for the bytes that the reviewer saw.
        """
        if self.is_settled:
            return not self.sha256 or sha256 in self.sha256
        return created_at <= self.reviewed_at


class Journal:
    """Appends one reviewer's decisions to OUT; a context manager that keeps the file open.

    Raises OutputError when OUT is not a local directory or cannot be written.
    """

    def __init__(self, out: Directory, reviewer: str, folder: str = FOLDER) -> None:
        if not out.is_local:
            raise OutputError(f"{out.location}: reviews are written to a local disk; copy OUT to one and review there")
        path = Path(out.path(f"{folder}/{journal_name(reviewer)}"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
            sync_folder(path.parent)
            self._truncated = bool(path.stat().st_size) and not _ends_with_newline(path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}; fix it, then start again") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, review: Review) -> None:
        """Append a decision; it is on the disk when this returns. Raises OutputError."""
        text = json.dumps(asdict(review) | {"reviewed_at": review.reviewed_at.isoformat()}, ensure_ascii=False)
        # A truncated line stays a damaged line of its own. One write call: another process may append too.
        line = (b"\n" if self._truncated else b"") + text.encode("utf-8", "surrogatepass") + b"\n"
        self._truncated = True
        old_size, written = os.fstat(self._file.fileno()).st_size, 0
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._remove_partial_line(old_size, written)
            raise OutputError(f"{self._file.name}: the decision was not saved: {error.strerror}") from error
        self._truncated = False

    def _remove_partial_line(self, old_size: int, written: int) -> None:
        """Remove what was written of a failed line, unless another process has appended after it."""
        with suppress(OSError):
            if os.fstat(self._file.fileno()).st_size == old_size + written:
                os.ftruncate(self._file.fileno(), old_size)


def read_reviews(out: Directory, folder: str = FOLDER) -> tuple[list[Review], int]:
    """Return every decision that was not undone, oldest first, and the number of damaged lines."""
    reviews: list[Review] = []
    damaged = 0
    for name in journal_names(out, folder):
        for review in parse_lines(out.read_bytes(f"{folder}/{name}"), folder):
            if review is None:
                damaged += 1
            else:
                reviews.append(review)
    undone = {review.undoes for review in reviews if review.decision == "undo"}
    kept = [review for review in reviews if review.decision != "undo" and review.review_id not in undone]
    return sorted(kept, key=lambda review: (review.reviewed_at, review.review_id)), damaged


def journal_names(out: Directory, folder: str = FOLDER) -> list[str]:
    """Return the file names of all journals in a folder, sorted."""
    return [name for name in out.list_names(folder) if name.endswith(_SUFFIX)]


def latest_reviews(reviews: list[Review]) -> dict[str, Review]:
    """Return the latest decision about each image, skips not counted, by image id."""
    return {image_id: review for review in reviews if review.decision != "skipped" for image_id in review.image_ids}


def read_latest_reviews(out: Directory) -> dict[str, Review]:
    """Return the latest decision about each image from the journals, by image id."""
    return latest_reviews(read_reviews(out)[0])


def parse_lines(data: bytes, folder: str = FOLDER) -> Iterator[Review | None]:
    """Yield the decision of every line of a journal; `None` for a damaged line."""
    for line in data.splitlines():
        if line.strip():
            yield _parse_line(line, _DECISIONS_IN[folder])


def _parse_line(line: bytes, decisions: tuple[str, ...]) -> Review | None:
    try:
        value: dict[str, Any] = json.loads(line)
        review = Review(
            **value
            | {
                "image_ids": tuple(value["image_ids"]),
                "sha256": tuple(value.get("sha256", ())),
                "reviewed_at": datetime.fromisoformat(value["reviewed_at"]),
            }
        )
    except (ValueError, TypeError, KeyError):
        return None
    return review if review.decision in decisions else None


def journal_name(reviewer: str) -> str:
    """Return a file name that is different for every reviewer."""
    slug = re.sub(r"[^a-z0-9]+", "-", reviewer.lower()).strip("-")[:40] or "reviewer"
    return f"{slug}-{hashlib.sha256(reviewer.encode()).hexdigest()[:8]}{_SUFFIX}"


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
