"""The decisions of this reviewer and of others: follows the journals of OUT as they grow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from captioner.errors import OutputError
from captioner.store.directory import Directory
from captioner.store.journal import FOLDER, Journal, Review, journal_name, journal_names, latest_reviews, parse_lines

_CLAIM_LIFETIME = timedelta(minutes=15)


class Decisions:
    """Every decision that has not been undone; a few hundred bytes of memory for each.

    A context manager that keeps this reviewer's journal open. Raises OutputError when OUT cannot be written.
    """

    def __init__(self, out: Directory, reviewer: str, folder: str = FOLDER) -> None:
        self._out, self._reviewer, self._folder = out, reviewer, folder
        self._journal = Journal(out, reviewer, folder)
        # The images that each reviewer is looking at, so that two do not get the same one. Only a hint.
        self._claims_folder = f"{folder}/shown"
        self._claims_file = Path(out.path(f"{self._claims_folder}/{journal_name(reviewer)}"))
        self._offsets: dict[str, int] = {}  # journal -> number of bytes read
        self._undone: set[str | None] = set()
        self._current: dict[str, Review] = {}
        self.own: list[Review] = []  # this reviewer's decisions that have not been undone, oldest first
        self.num_damaged = 0
        self.read_new()

    def __enter__(self) -> Decisions:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.__exit__()
        self._claims_file.unlink(missing_ok=True)

    def add(self, review: Review) -> None:
        """Append a decision to the journal; it is on the disk when this returns. Raises OutputError.

        `read_new` returns it like every other decision.
        """
        self._journal.append(review)

    def read_new(self) -> list[Review]:
        """Return the decisions written since the last call, including undos, oldest first."""
        new = [review for name in journal_names(self._out, self._folder) for review in self._new_lines(name)]
        new.sort(key=lambda review: (review.reviewed_at, review.review_id))
        undone = {review.undoes for review in new if review.decision == "undo"}
        self._undone |= undone
        kept = [review for review in new if review.decision != "undo" and review.review_id not in self._undone]
        self._current |= {review.review_id: review for review in kept}
        for review_id in undone & set(self._current):
            del self._current[str(review_id)]
        own = [*self.own, *(review for review in kept if review.reviewer == self._reviewer)]
        self.own = [review for review in own if review.review_id not in undone]
        return [review for review in new if review.review_id not in self._undone]

    def current(self) -> list[Review]:
        """Return every decision that has not been undone, oldest first."""
        return sorted(self._current.values(), key=lambda review: (review.reviewed_at, review.review_id))

    def latest(self) -> dict[str, Review]:
        """Return the latest decision about each image."""
        return latest_reviews(self.current())

    def claim(self, image_ids: Iterable[str]) -> None:
        """Let other reviewers know which images this one is looking at."""
        claim = {"image_ids": list(image_ids), "at": datetime.now(UTC).isoformat()}
        temporary = self._claims_file.with_suffix(f".{os.getpid()}.tmp")  # readers ignore this suffix
        try:
            temporary.parent.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(claim))
            temporary.replace(self._claims_file)
        except OSError as error:
            raise OutputError(f"{temporary} cannot be written: {error.strerror}; fix it, then start again") from error

    def claimed_by_others(self) -> set[str]:
        """Return the ids of the images that others started to look at less than 15 minutes ago."""
        claimed: set[str] = set()
        for name in self._out.list_names(self._claims_folder):
            if name == journal_name(self._reviewer):
                continue
            try:
                claim = self._out.read_json(f"{self._claims_folder}/{name}")
                if datetime.now(UTC) - datetime.fromisoformat(claim["at"]) < _CLAIM_LIFETIME:
                    claimed.update(claim["image_ids"])
            except (OutputError, OSError, ValueError, TypeError, KeyError):
                continue  # being replaced, or damaged
        return claimed

    def _new_lines(self, name: str) -> list[Review]:
        path, start = Path(self._out.path(f"{self._folder}/{name}")), self._offsets.get(name, 0)
        if path.stat().st_size <= start:
            return []
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
        num_complete = data.rfind(b"\n") + 1  # a line that is still being written is read later
        self._offsets[name] = start + num_complete
        reviews = list(parse_lines(data[:num_complete], self._folder))
        self.num_damaged += reviews.count(None)
        return [review for review in reviews if review is not None]
