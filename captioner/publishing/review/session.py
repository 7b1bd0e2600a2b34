"""One reviewer's desk: what lies on it, and what a decision does."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

from captioner.console.text import printable
from captioner.errors import UsageError
from captioner.publishing.alt_text.schemas import Decision, Review
from captioner.publishing.alt_text.texts import read_settings
from captioner.publishing.review.acceptance import acceptance, seconds_per_picture
from captioner.publishing.review.decisions import Decisions
from captioner.publishing.review.queue import Queue, QueueKind
from captioner.publishing.review.rows import Row, read_row
from captioner.publishing.review.standing_flags import in_words
from captioner.store.table import CaptionsTable

SAID = {
    "approved": "Accepted",
    "edited": "Saved",
    "rejected": "Rejected",
    "decorative": "Marked as decorative",
    "expert": "Left for an expert",
    "skipped": "Skipped",
}
_ROWS_KEPT = 256
_LONGEST_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A decision as the page sends it. `places`: the picture, then those decided with it; `shown`: the alt text that
    the page showed; `text`: of an edit."""

    decision: str
    places: tuple[int, ...]
    shown: str
    text: str | None = None
    seconds: float | None = None

    @classmethod
    def from_json(cls, value: Any, num_places: int) -> Asked:
        """Raises UsageError for what no page of ours sends."""
        if not isinstance(value, dict):
            raise UsageError("a decision is a JSON object")
        decision, places, shown = value.get("decision"), value.get("places"), value.get("shown")
        text, seconds = value.get("text"), value.get("seconds")
        if decision not in SAID or not isinstance(shown, str) or not isinstance(text, str | None):
            raise UsageError(f"decision: one of {', '.join(SAID)}, with the text that was shown")
        if not isinstance(places, list) or not places or not all(type(place) is int for place in places):
            raise UsageError("places: a list of numbers")
        if not all(0 <= place < num_places for place in places):
            raise UsageError("places: no such picture")
        known = isinstance(seconds, int | float) and 0 <= seconds <= _LONGEST_S
        return cls(decision, tuple(dict.fromkeys(places)), shown, text, float(cast(float, seconds)) if known else None)


class Desk:
    """Safe for several threads. A context manager. Raises OutputError where the table is not finished or has no alt
    texts, or OUT cannot be written."""

    def __init__(self, table: CaptionsTable, reviewer: str, kind: QueueKind) -> None:
        self._table, self._reviewer, self._kind = table, reviewer, kind
        self._settings = read_settings(table)
        self.decisions = Decisions(table.directory, reviewer)
        self._queue = Queue(table, kind, self.decisions.latest())
        self._shown_again: set[str] = set()  # review ids of skips that count no more
        self._skipped = self._skips()
        self._rows: dict[int, Row] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._queue)

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *_: object) -> None:
        self.decisions.__exit__()

    def row(self, place: int) -> Row:
        """Raises OutputError where the table was changed meanwhile."""
        with self._lock:
            if place not in self._rows:
                if len(self._rows) >= _ROWS_KEPT:
                    self._rows.clear()
                self._rows[place] = read_row(self._table, *self._queue.where(place))
            return self._rows[place]

    def next(self) -> dict[str, Any]:
        """What the page shows: the next picture, how far the review is, and what happened."""
        with self._lock:
            self._take_in_news()
            return self._state("")

    def decide(self, asked: Asked) -> tuple[bool, dict[str, Any]]:
        """Keep a decision: when this returns True, it is on the disk. False: somebody else has decided meanwhile, or
        the text is no longer the one that was shown; nothing was kept. Raises UsageError for an edit that cannot stand,
        OutputError where it was not saved."""
        with self._lock:
            self._take_in_news()
            free = [place for place in asked.places if self._is_open(place)]
            if asked.places[0] not in free:
                return False, self._state(self._conflict(asked.places[0]))
            rows = [row for row in map(self.row, free) if row.alt_text == asked.shown]
            if not rows or rows[0].image_id != self.row(free[0]).image_id:
                return False, self._state("The text of this picture has changed; look at it again")
            review = self._review(asked, rows)
            self.decisions.add(review)
            self._take_in_news()
            return True, self._state(_said(review, len(asked.places) - len(rows)))

    def undo(self) -> dict[str, Any]:
        """Take back this reviewer's last decision that holds, of this start or an earlier one, and show its picture."""
        with self._lock:
            self._take_in_news()
            if not self.decisions.own:
                return self._state("There is nothing to undo")
            last = self.decisions.own[-1]
            self.decisions.add(
                Review("undo", last.image_ids, None, self._reviewer, queue=self._kind, undoes=last.review_id)
            )
            self._take_in_news()
            place = next(iter(self._places([last])), None)
            return self._state(f"Undone: {_said(last)}", place if place is not None and self._is_open(place) else None)

    def show_skipped(self) -> dict[str, Any]:
        """Show again what this reviewer skipped."""
        with self._lock:
            self._take_in_news()
            self._shown_again |= {review.review_id for review in self.decisions.own if review.decision == "skipped"}
            self._skipped = self._skips()
            return self._state("The skipped pictures are shown again")

    def _take_in_news(self) -> None:
        news = self.decisions.news()
        if any(review.decision == "undo" for review in news):
            latest = self.decisions.latest()
            self._skipped = self._skips()
        for review in news:
            if review.decision == "skipped":
                self._skipped |= self._places([review]) if review.reviewer == self._reviewer else set()
                continue
            for image_id, place in zip(review.image_ids, map(self._queue.place_of, review.image_ids), strict=True):
                if place is not None:
                    self._queue.decide(place, latest.get(image_id) if review.decision == "undo" else review)

    def _is_open(self, place: int) -> bool:
        held = self._queue.decision(place)
        return held is None or (held.decision == "expert" and held.reviewer != self._reviewer)

    def _skips(self) -> set[int]:
        own = self.decisions.own
        return self._places(r for r in own if r.decision == "skipped" and r.review_id not in self._shown_again)

    def _places(self, reviews: Iterable[Review]) -> set[int]:
        found = (self._queue.place_of(image_id) for review in reviews for image_id in review.image_ids)
        return {place for place in found if place is not None}

    def _conflict(self, place: int) -> str:
        held = self._queue.decision(place)
        assert held is not None
        who = "You have" if held.reviewer == self._reviewer else f"{printable(held.reviewer)} has"
        return f"{who} decided this picture meanwhile ({SAID[held.decision].lower()}); nothing was changed"

    def _review(self, asked: Asked, rows: list[Row]) -> Review:
        decision, text = asked.decision, None
        if decision == "edited":
            text = self._edited(asked.text or "")
            decision = "approved" if text == asked.shown else "edited"
        elif decision == "approved" and not asked.shown.strip():
            raise UsageError("There is no text to accept: edit it, or choose Decorative")
        elif decision in ("approved", "decorative"):
            text = asked.shown if decision == "approved" else ""
        return Review(
            cast(Decision, decision),
            tuple(row.image_id for row in rows),
            text,
            self._reviewer,
            shown=asked.shown,
            queue=self._kind,
            seconds=asked.seconds,
        )

    def _edited(self, text: str) -> str:
        """The text as one line. Raises UsageError."""
        line = " ".join(printable(text).split())
        hard = self._settings["hard_max"]
        if not line:
            raise UsageError("The text is empty. A picture that needs none is decorative: cancel and choose Decorative")
        if len(line) > hard:
            raise UsageError(
                f"The text has {len(line)} characters; the limit is {hard} (captioner alt-text --hard-max)"
            )
        return line

    def _state(self, message: str, place: int | None = None) -> dict[str, Any]:
        taken = self._taken()
        waiting = [at for at in self._queue.for_expert if self._is_open(at)]
        left_out = self._skipped | taken
        if place is None:
            place = self._queue.next(waiting, left_out)
        if place is None and taken:  # others have what is left before them; they may have gone
            place, left_out = self._queue.next(waiting, self._skipped), self._skipped
        group: list[int] = []
        num_same = 0
        if place is not None and self._kind != "random":  # a sample is drawn one by one
            group, num_same = self._queue.same_text(place, left_out)
        shown = [] if place is None else [place, *group]
        self.decisions.show(self.row(at).image_id for at in shown)
        return {
            "card": None if place is None else self._card(place, group, num_same),
            "after": self._queue.next(waiting, left_out.union(shown)),
            "message": message,
            "progress": self._progress(len(waiting)),
        }

    def _taken(self) -> set[int]:
        places = (self._queue.place_of(image_id) for image_id in self.decisions.shown_to_others())
        return {place for place in places if place is not None}

    def _card(self, place: int, group: list[int], num_same: int) -> dict[str, Any]:
        row, held = self.row(place), self._queue.decision(place)
        return {
            "place": place,
            "image_id": printable(row.image_id),
            "uri": printable(row.uri),
            "alt_text": row.alt_text,
            "caption": printable(row.caption),
            "flags": [in_words(flag) for flag in row.flags],
            "certainty": None if row.logprob_mean is None else _share(row.logprob_mean),
            "width": row.width,
            "height": row.height,
            "num_bytes": row.num_bytes,
            "group": [{"place": at, "image_id": printable(self.row(at).image_id)} for at in group],
            "num_same": num_same,
            "note": f"{printable(held.reviewer)} asks for an expert" if held else "",
            "language": self._settings["language"],
            "soft_limit": self._settings["max_chars"],
            "hard_limit": self._settings["hard_max"],
        }

    def _progress(self, num_waiting: int) -> dict[str, Any]:
        left, flagged = self._queue.num_open()
        seconds = seconds_per_picture(self.decisions.own)
        found = acceptance(self._queue.random_sample())
        return {
            "total": len(self),
            "left": left,
            "flagged_left": flagged,
            "skipped": len(self._skipped),
            "for_expert": num_waiting,
            "can_undo": bool(self.decisions.own),
            "hours_left": None if seconds is None else left * seconds / 3600,
            "acceptance": None if found is None else asdict(found),
        }


def _share(logprob_mean: float) -> float | None:
    """The mean probability of a token, 0 to 1."""
    return math.exp(min(0.0, logprob_mean)) if math.isfinite(logprob_mean) else None


def _said(review: Review, num_left: int = 0) -> str:
    many = f" for {len(review.image_ids)} pictures" if len(review.image_ids) > 1 else ""
    left = f"; {num_left} were decided by somebody else meanwhile" if num_left else ""
    return f"{SAID[review.decision]}{many}{left}"
