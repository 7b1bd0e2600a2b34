"""The state of one review session: what is shown, and what a decision changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

from captioner.console.text import printable
from captioner.errors import UsageError
from captioner.files import local_path
from captioner.publishing.alt_text.texts import read_settings
from captioner.publishing.review.acceptance import acceptance, seconds_per_image
from captioner.publishing.review.decisions import Decisions
from captioner.publishing.review.drafts import Drafts
from captioner.publishing.review.grid import FAILED, Grid, GridRequest
from captioner.publishing.review.next_steps import next_commands
from captioner.publishing.review.queue import Queue, QueueKind
from captioner.publishing.review.rows import Row, read_catalogue, read_failed, read_rows
from captioner.publishing.review.view import (
    DECISION_LABELS,
    current_text,
    describe_decision,
    describe_earlier,
    describe_failed,
    describe_image,
)
from captioner.store.journal import Decision, Review, latest_reviews
from captioner.store.replan import RowIndices
from captioner.store.table import CaptionsTable

ChooseRows = Callable[[CaptionsTable, dict[str, Review]], RowIndices]

_ROW_CACHE_SIZE = 256
_MAX_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class DecisionRequest:
    """A decision as the page sends it.

    `indices`: the image on the card, then those decided with it. `shown`: the alt text that the page showed. `text`:
    the edited text. `replaces`: the id of the earlier decision about the image that the page showed.
    """

    decision: str
    indices: tuple[int, ...]
    shown: str
    text: str | None = None
    seconds: float | None = None
    replaces: str | None = None

    @classmethod
    def from_json(cls, value: Any, num_images: int) -> DecisionRequest:
        """Parse a request. Raises UsageError for anything that our page does not send."""
        if not isinstance(value, dict):
            raise UsageError("a decision is a JSON object")
        decision, indices, shown = value.get("decision"), value.get("indices"), value.get("shown")
        text, seconds, replaces = value.get("text"), value.get("seconds"), value.get("replaces")
        if decision not in DECISION_LABELS or not isinstance(shown, str) or not isinstance(text, str | None):
            raise UsageError(f"decision: give one of {', '.join(DECISION_LABELS)}, with the text that was shown")
        if not isinstance(replaces, str | None):
            raise UsageError("replaces: give the id of a decision")
        if not isinstance(indices, list) or not indices or not all(type(index) is int for index in indices):
            raise UsageError("indices: give a list of numbers")
        if not all(0 <= index < num_images for index in indices):
            raise UsageError("indices: no such image")
        return cls(decision, tuple(dict.fromkeys(indices)), shown, text, seconds_from(seconds), replaces)


def seconds_from(value: Any) -> float | None:
    """Return the time of a decision that a page sent; None where it is not a plausible number."""
    timed = isinstance(value, int | float) and 0 <= value <= _MAX_SECONDS
    return float(cast(float, value)) if timed else None


class ReviewSession:
    """One reviewer's session on a table; thread-safe, and a context manager.

    `choose`: returns the rows to review by the decisions so far, by image id; None for all of the table. Raises
    OutputError when the table is not finished, has no alt texts, or OUT cannot be written.
    """

    page = "page"

    def __init__(self, table: CaptionsTable, reviewer: str, kind: QueueKind, choose: ChooseRows | None = None) -> None:
        self._table, self._reviewer, self._kind = table, reviewer, kind
        self._settings = read_settings(table)
        self.decisions = Decisions(table.directory, reviewer)
        self._drafts = Drafts(table.directory, reviewer)
        latest = self.decisions.latest()
        self._queue = Queue(table, kind, latest, choose(table, latest) if choose else None)
        self._grid = Grid(table, self._queue)
        self._opened: int | None = None  # the image that was opened from the grid
        self._shown_again: set[str] = set()  # review ids of skips that no longer count
        self._skipped = self._skipped_in(self.decisions.own)
        self._rows: dict[int, Row] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._queue)

    def __enter__(self) -> ReviewSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.decisions.__exit__()

    def row(self, index: int) -> Row:
        """Return the data of one image. Raises OutputError when the table was changed during the review."""
        with self._lock:
            return self._rows_of([index])[0]

    def _rows_of(self, indices: list[int]) -> list[Row]:
        missing = [index for index in indices if index not in self._rows]
        if missing:
            if len(self._rows) + len(missing) > _ROW_CACHE_SIZE:
                self._rows.clear()
                missing = indices
            rows = read_rows(self._table, [self._queue.location(index) for index in missing])
            self._rows.update(zip(missing, rows, strict=True))
        return [self._rows[index] for index in indices]

    def open(self, index: int) -> dict[str, Any]:
        """Return what the page shows for one image, decided or not."""
        with self._lock:
            self._apply_new_decisions()
            self._opened = index
            return self._state("", index)

    def grid(self, request: GridRequest) -> dict[str, Any]:
        """Return one page of the grid: its images, and how many there are of each kind."""
        with self._lock:
            self._apply_new_decisions()
            indices, around = self._grid.page(request, *self._skipped_and_drafts())
            if request.show == FAILED:
                rows = read_failed(self._table, list(map(self._queue.failed_location, indices)))
                return {"images": list(map(describe_failed, indices, rows)), **around}
            return {"images": list(map(self._tile, indices, self._rows_of(indices))), **around}

    def failed_row(self, number: int) -> Row | None:
        """Return the data of an image without a caption; None where there is no such image."""
        with self._lock:
            if number >= self._queue.num_failed:
                return None
            return read_failed(self._table, [self._queue.failed_location(number)])[0].row

    def summary(self) -> dict[str, Any]:
        """Return the number of images by decision ("counts"), and the commands that come next ("commands")."""
        with self._lock:
            self._apply_new_decisions()
            counts = self._grid.counts(*self._skipped_and_drafts())
            out = local_path(self._table.directory.location)
            return {"counts": counts, "commands": next_commands(out, self._reviewer, counts)}

    def _skipped_and_drafts(self) -> tuple[list[int], set[int]]:
        skipped = [index for index in self._skipped if self._is_open(index)]
        return skipped, self._indices(self._drafts.image_ids())

    def next(self) -> dict[str, Any]:
        """Return what the page shows: the next image, the progress and a message."""
        with self._lock:
            self._apply_new_decisions()
            return self._state("")

    def parse(self, body: Any) -> DecisionRequest:
        """Parse the body of a request. Raises UsageError for anything that our page does not send."""
        return DecisionRequest.from_json(body, len(self))

    def decide(self, request: DecisionRequest) -> tuple[bool, dict[str, Any]]:
        """Save a decision; returns whether it was saved, and the next state of the page.

        True: the decision is on the disk. False: somebody else has decided in the meantime, or the text is no longer
        the one that was shown; nothing was saved. Raises UsageError for an invalid edit, OutputError when the decision
        cannot be written.
        """
        with self._lock:
            self._apply_new_decisions()
            still_open = [index for index in request.indices if self._is_as_shown(index, request.replaces)]
            if request.indices[0] not in still_open:
                return False, self._state(self._conflict(request.indices[0]))
            rows = [row for row in map(self.row, still_open) if row.alt_text == request.shown]
            if not rows or rows[0].image_id != self.row(still_open[0]).image_id:
                return False, self._state("The text of this image has changed; check it again")
            review = self._review(request, rows)
            self.decisions.add(review)
            if request.text is not None:
                self._drafts.discard(rows[0].image_id)
            self._apply_new_decisions()
            return True, self._state(describe_decision(review, len(request.indices) - len(rows)))

    def keep_draft(self, index: int, text: str) -> None:
        """Keep what was typed about an image; an empty text discards the draft."""
        with self._lock:
            image_id = self.row(index).image_id
            if text.strip():
                self._drafts.keep(image_id, text)
            else:
                self._drafts.discard(image_id)

    def undo(self) -> dict[str, Any]:
        """Undo this reviewer's last decision, of this session or an earlier one, and show its image again.

        An edited text stays as a draft.
        """
        with self._lock:
            self._apply_new_decisions()
            if not self.decisions.own:
                return self._state("There is nothing to undo")
            last = self.decisions.own[-1]
            self.decisions.add(
                Review("undo", last.image_ids, None, self._reviewer, queue=self._kind, undoes=last.review_id)
            )
            if last.decision == "edited" and last.text:
                self._drafts.keep(last.image_ids[0], last.text)
            self._apply_new_decisions()
            index = next(iter(self._indices(last.image_ids)), None)
            return self._state(
                f"Undone: {describe_decision(last)}", index if index is not None and self._is_open(index) else None
            )

    def show_skipped(self) -> dict[str, Any]:
        """Show again what this reviewer skipped."""
        with self._lock:
            self._apply_new_decisions()
            self._shown_again |= {review.review_id for review in self.decisions.own if review.decision == "skipped"}
            self._skipped = self._skipped_in(self.decisions.own)
            return self._state("The skipped images are shown again")

    def _apply_new_decisions(self) -> None:
        """Update the queue with the decisions that this and other reviewers wrote since the last call."""
        new = self.decisions.read_new()
        changed: dict[str, Review | None]
        if any(review.decision == "undo" for review in new):  # an earlier decision about the same image holds again
            latest = self.decisions.latest()
            changed = {image_id: latest.get(image_id) for review in new for image_id in review.image_ids}
            self._skipped = self._skipped_in(self.decisions.own)
        else:
            changed = {**latest_reviews(new)}
            self._skipped |= self._skipped_in(new)
        for image_id, review in changed.items():
            index = self._queue.index_of(image_id)
            if index is not None:
                self._queue.set_decision(index, review)

    def _is_open(self, index: int) -> bool:
        review = self._queue.decision(index)
        return review is None or (review.decision == "expert" and review.reviewer != self._reviewer)

    def _is_as_shown(self, index: int, replaces: str | None) -> bool:
        """Return whether an image has no decision but the one that the page showed."""
        review = self._queue.decision(index)
        return self._is_open(index) or (review is not None and review.review_id == replaces)

    def _skipped_in(self, reviews: Iterable[Review]) -> set[int]:
        """Return the images that this reviewer skipped in `reviews` and that are not to be shown again."""
        return self._indices(
            image_id
            for review in reviews
            if review.decision == "skipped" and review.reviewer == self._reviewer
            if review.review_id not in self._shown_again
            for image_id in review.image_ids
        )

    def _indices(self, image_ids: Iterable[str]) -> set[int]:
        return {index for index in map(self._queue.index_of, image_ids) if index is not None}

    def _conflict(self, index: int) -> str:
        review = self._queue.decision(index)
        assert review is not None
        who = "You have" if review.reviewer == self._reviewer else f"{printable(review.reviewer)} has"
        label = DECISION_LABELS[review.decision].lower()
        return f"{who} already decided about this image ({label}); nothing was changed"

    def _review(self, request: DecisionRequest, rows: list[Row]) -> Review:
        decision, text = request.decision, None
        if decision == "edited":
            text = self._edited(request.text or "")
            decision = "approved" if text == request.shown else "edited"
        elif decision == "approved" and not request.shown.strip():
            raise UsageError("There is no text to approve: edit it, or choose Decorative")
        elif decision in ("approved", "decorative"):
            text = request.shown if decision == "approved" else ""
        return Review(
            cast(Decision, decision),
            tuple(row.image_id for row in rows),
            text,
            self._reviewer,
            shown=request.shown,
            queue=self._queue_of(request.indices[0]),
            seconds=request.seconds,
            sha256=tuple(row.sha256 for row in rows if row.sha256),
        )

    def _queue_of(self, index: int) -> str:
        """Return the queue to store with a decision: an image from the grid is not part of the random sample."""
        replaced = self._queue.decision(index)
        if replaced is not None:
            return replaced.queue
        return "all" if index == self._opened else self._kind

    def _edited(self, text: str) -> str:
        """Return the edited text as one line. Raises UsageError when it is empty or too long."""
        line = " ".join(printable(text).split())
        hard = self._settings["hard_max"]
        if not line:
            raise UsageError("The text is empty. For an image that needs no text, cancel and choose Decorative")
        if len(line) > hard:
            raise UsageError(
                f"The text has {len(line)} characters; the limit is {hard} (captioner alt-text --hard-max)"
            )
        return line

    def _state(self, message: str, index: int | None = None) -> dict[str, Any]:
        """Return what the page shows; `index`: the image to show instead of the next one."""
        claimed = self._indices(self.decisions.claimed_by_others())
        waiting = [expert_index for expert_index in self._queue.for_expert if self._is_open(expert_index)]
        excluded = self._skipped | claimed
        if index is None and self._kind != "random":  # drafts come first, but a random sample keeps its order
            drafts = self._indices(self._drafts.image_ids())
            index = min(filter(self._is_open, drafts - excluded), default=None)
        if index is None:
            index = self._queue.next(waiting, excluded)
        if index is None and claimed:  # others look at all that is left, but they may have stopped
            index, excluded = self._queue.next(waiting, self._skipped), self._skipped
        group: list[int] = []
        num_same = 0
        if (
            index is not None and self._is_open(index) and self._kind != "random"
        ):  # a random sample is decided one image at a time
            group, num_same = self._queue.same_text(index, excluded)
        on_page = [] if index is None else [index, *group]
        self.decisions.claim(self.row(shown).image_id for shown in on_page)
        return {
            "card": None if index is None else self._card(index, group, num_same),
            "after": self._queue.next(waiting, excluded.union(on_page)),
            "message": message,
            "progress": self._progress(len(waiting)),
        }

    def _card(self, index: int, group: list[int], num_same: int) -> dict[str, Any]:
        row, review = self.row(index), self._queue.decision(index)
        is_open = self._is_open(index)
        catalogue = read_catalogue(self._table, *self._queue.location(index))
        return {
            **describe_image(index, row, review),
            "lift": self._queue.lift(index),
            "alt_text": row.alt_text,
            "draft": self._drafts.get(row.image_id),
            "decided": None if is_open or review is None else review.review_id,
            "note": describe_earlier(review, is_open, self._reviewer) if review else "",
            "catalogue": [{"name": printable(name), "text": text} for name, text in catalogue.items()],
            "group": [{"index": other, "image_id": printable(self.row(other).image_id)} for other in group],
            "num_same": num_same,
            "language": self._settings["language"],
            "soft_limit": self._settings["max_chars"],
            "hard_limit": self._settings["hard_max"],
        }

    def _tile(self, index: int, row: Row) -> dict[str, Any]:
        review = self._queue.decision(index)
        return {
            "index": index,
            "image_id": printable(row.image_id),
            "text": current_text(row, review),
            "state": "undecided" if review is None else review.decision,
            "flagged": bool(row.flags),
            "has_draft": self._drafts.get(row.image_id) is not None,
        }

    def _progress(self, num_waiting: int) -> dict[str, Any]:
        num_left, num_flagged_left = self._queue.num_open()
        seconds = seconds_per_image(self.decisions.own)
        rate = acceptance(self._queue.random_sample())
        return {
            "total": len(self),
            "left": num_left,
            "flagged_left": num_flagged_left,
            "skipped": len(self._skipped),
            "for_expert": num_waiting,
            "can_undo": bool(self.decisions.own),
            "hours_left": None if seconds is None else num_left * seconds / 3600,
            "acceptance": None if rate is None else asdict(rate),
        }
