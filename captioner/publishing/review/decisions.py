"""What was decided, by this reviewer and meanwhile by others: the journals of OUT/reviews, followed as they grow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from captioner.errors import OutputError
from captioner.publishing.alt_text.journal import FOLDER, Journal, journal_name, latest_reviews, parse_lines
from captioner.publishing.alt_text.schemas import Review
from captioner.store.directory import Directory

# What each reviewer has before them, so that two do not get the same picture. A hint: decisions alone count.
_SHOWN_FOLDER = f"{FOLDER}/shown"
_SHOWN_LASTS = timedelta(minutes=15)


class Decisions:
    """Every decision that holds. Memory is a few hundred bytes for each one that people made.

    A context manager: it holds this reviewer's journal open. Raises OutputError where OUT cannot be written.
    """

    def __init__(self, out: Directory, reviewer: str) -> None:
        self._out, self._reviewer = out, reviewer
        self._journal = Journal(out, reviewer)
        self._shown_file = Path(out.path(f"{_SHOWN_FOLDER}/{journal_name(reviewer)}"))
        self._read: dict[str, int] = {}  # journal -> bytes taken in
        self._undone: set[str | None] = set()
        self._held: dict[str, Review] = {}
        self.own: list[Review] = []  # this reviewer's that hold, oldest first
        self.num_damaged = 0
        self.news()

    def __enter__(self) -> Decisions:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.__exit__()
        self._shown_file.unlink(missing_ok=True)

    def add(self, review: Review) -> None:
        """When this returns, the decision is on the disk; `news` tells it like every other. Raises OutputError."""
        self._journal.append(review)

    def news(self) -> list[Review]:
        """The decisions written since the last call, undos among them, oldest first."""
        found = [review for name in self._out.list_names(FOLDER) for review in self._new_lines(name)]
        found.sort(key=lambda review: (review.reviewed_at, review.review_id))
        undone = {review.undoes for review in found if review.decision == "undo"}
        self._undone |= undone
        kept = [r for r in found if r.decision != "undo" and r.review_id not in self._undone]
        self._held |= {review.review_id: review for review in kept}
        for review_id in undone & set(self._held):
            del self._held[str(review_id)]
        own = [*self.own, *(review for review in kept if review.reviewer == self._reviewer)]
        self.own = [review for review in own if review.review_id not in undone]
        return [review for review in found if review.review_id not in self._undone]

    def holding(self) -> list[Review]:
        """Every decision that holds, oldest first."""
        return sorted(self._held.values(), key=lambda review: (review.reviewed_at, review.review_id))

    def latest(self) -> dict[str, Review]:
        """The decision that holds for each picture."""
        return latest_reviews(self.holding())

    def show(self, image_ids: Iterable[str]) -> None:
        """Tell other reviewers what this one has before them."""
        told = {"image_ids": list(image_ids), "at": datetime.now(UTC).isoformat()}
        temporary = self._shown_file.with_suffix(f".{os.getpid()}.tmp")  # no reader lists such names
        try:
            temporary.parent.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(told))
            temporary.replace(self._shown_file)
        except OSError as error:
            raise OutputError(f"{temporary} cannot be written: {error.strerror}; free it and start again") from error

    def shown_to_others(self) -> set[str]:
        """Ids of the pictures that others have had before them for less than 15 minutes."""
        found: set[str] = set()
        for name in self._out.list_names(_SHOWN_FOLDER):
            if name == journal_name(self._reviewer):
                continue
            try:
                told = self._out.read_json(f"{_SHOWN_FOLDER}/{name}")
                if datetime.now(UTC) - datetime.fromisoformat(told["at"]) < _SHOWN_LASTS:
                    found.update(told["image_ids"])
            except (OutputError, OSError, ValueError, TypeError, KeyError):
                continue  # being replaced, or damaged
        return found

    def _new_lines(self, name: str) -> list[Review]:
        path, start = Path(self._out.path(f"{FOLDER}/{name}")), self._read.get(name, 0)
        if path.stat().st_size <= start:
            return []
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
        whole = data.rfind(b"\n") + 1  # a line that is being written is read when it is whole
        self._read[name] = start + whole
        lines = list(parse_lines(data[:whole]))
        self.num_damaged += lines.count(None)
        return [review for review in lines if review is not None]
