"""`captioner spot-check`: people judge a random sample of captions on a page; their verdicts go to OUT/spot_checks."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, cast

from captioner.console.text import counted, printable, shell_command
from captioner.errors import UsageError
from captioner.files import local_path
from captioner.publishing.review.acceptance import seconds_per_image
from captioner.publishing.review.decisions import Decisions
from captioner.publishing.review.rows import Row
from captioner.publishing.review.session import seconds_from
from captioner.scoring.verdicts import (
    VERDICT_LABELS,
    Sample,
    SampledCaption,
    SampleSpec,
    columns_to_stratify,
    describe,
    draw,
    figures_of,
    read_spec,
    write_spec,
)
from captioner.store.journal import SPOT_CHECKS, VERDICTS, Review, Verdict
from captioner.store.table import CaptionsTable


@dataclass(frozen=True, slots=True)
class VerdictRequest:
    """A verdict as the page sends it. `shown`: the caption that the page showed. `verdict`: or "skipped"."""

    verdict: str
    index: int
    shown: str
    seconds: float | None = None

    @classmethod
    def from_json(cls, value: Any, num_images: int) -> VerdictRequest:
        """Parse a request. Raises UsageError for anything that our page does not send."""
        if not isinstance(value, dict):
            raise UsageError("a verdict is a JSON object")
        verdict, index, shown = value.get("verdict"), value.get("index"), value.get("shown")
        if verdict not in (*VERDICTS, "skipped") or not isinstance(shown, str):
            raise UsageError(f"verdict: give one of {', '.join(VERDICTS)} or skipped, with the caption that was shown")
        if type(index) is not int or not 0 <= index < num_images:
            raise UsageError("index: no such image")
        return cls(verdict, index, shown, seconds_from(value.get("seconds")))


class SpotCheckSession:
    """One reviewer's session; thread-safe, and a context manager. Others' verdicts are not shown while one judges.

    Raises OutputError when OUT cannot be written.
    """

    page = "spot_check"

    def __init__(self, table: CaptionsTable, reviewer: str, sample: Sample) -> None:
        self._table, self._reviewer, self.sample = table, reviewer, sample
        self.decisions = Decisions(table.directory, reviewer, SPOT_CHECKS)
        self._index_of = {caption.image_id: index for index, caption in enumerate(sample.captions)}
        self._shown_again: set[str] = set()  # review ids of skips that no longer count
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self.sample.captions)

    def __enter__(self) -> SpotCheckSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.decisions.__exit__()

    def row(self, index: int) -> Row:
        """Return the data of one image."""
        row = self.sample.captions[index].row
        names = ("image_id", "uri", "width", "height", "num_bytes", "logprob_mean", "chunk_id", "chunk_row")
        caption = self.sample.captions[index].text
        return Row(**{name: row[name] for name in names}, caption=caption, alt_text=caption, flags=())

    def next(self) -> dict[str, Any]:
        """Return what the page shows: the next image, the progress and a message."""
        with self._lock:
            self.decisions.read_new()
            return self._state("")

    def parse(self, body: Any) -> VerdictRequest:
        """Parse the body of a request. Raises UsageError for anything that our page does not send."""
        return VerdictRequest.from_json(body, len(self))

    def decide(self, request: VerdictRequest) -> tuple[bool, dict[str, Any]]:
        """Save a verdict; returns whether it was saved, and the next state of the page.

        True: the verdict is on the disk. False: the reviewer has judged this caption already, in another window.
        Raises OutputError when the verdict cannot be written.
        """
        with self._lock:
            self.decisions.read_new()
            caption = self.sample.captions[request.index]
            if request.index in self._judged() or request.shown != caption.text:
                return False, self._state("You have already judged this caption; nothing was changed")
            self.decisions.add(
                Review(
                    cast(Verdict, request.verdict),
                    (caption.image_id,),
                    None,
                    self._reviewer,
                    shown=request.shown,
                    queue="random",
                    seconds=request.seconds,
                )
            )
            self.decisions.read_new()
            return True, self._state(_describe(request.verdict))

    def undo(self) -> dict[str, Any]:
        """Undo this reviewer's last verdict about a caption of the sample, and show the caption again."""
        with self._lock:
            self.decisions.read_new()
            last = next((review for review in reversed(self.decisions.own) if self._is_of_sample(review)), None)
            if last is None:
                return self._state("There is nothing to undo")
            self.decisions.add(
                Review("undo", last.image_ids, None, self._reviewer, queue="random", undoes=last.review_id)
            )
            self.decisions.read_new()
            return self._state(f"Undone: {_describe(last.decision)}", self._index_of[last.image_ids[0]])

    def show_skipped(self) -> dict[str, Any]:
        """Show again what this reviewer skipped."""
        with self._lock:
            self._shown_again |= {review.review_id for review in self.decisions.own if review.decision == "skipped"}
            return self._state("The skipped captions are shown again")

    def figures(self) -> dict[str, Any]:
        """Return the figures of the verdicts of all reviewers, see `captioner.scoring.verdicts.figures_of`."""
        with self._lock:
            self.decisions.read_new()
            return figures_of(self.sample, self.decisions.current())

    def summary(self) -> dict[str, Any]:
        """Return the figures in lines ("lines"), and the commands that come next ("commands")."""
        out = local_path(self._table.directory.location)
        commands = {
            "The report, with these figures": ["report", out, "--open"],
            "Fail a script where fewer than 90 % are right": ["check", out, "--min-right", "0.9"],
        }
        return {
            "lines": describe(self.figures()),
            "commands": [{"purpose": purpose, "command": shell_command(*words)} for purpose, words in commands.items()],
        }

    def _is_of_sample(self, review: Review) -> bool:
        index = self._index_of.get(review.image_ids[0])
        return index is not None and self.sample.captions[index].text == review.shown

    def _judged(self) -> set[int]:
        return self._indices(review for review in self.decisions.own if review.decision in VERDICTS)

    def _skipped(self) -> set[int]:
        skips = (review for review in self.decisions.own if review.decision == "skipped")
        return self._indices(review for review in skips if review.review_id not in self._shown_again) - self._judged()

    def _indices(self, reviews: Any) -> set[int]:
        return {self._index_of[review.image_ids[0]] for review in reviews if self._is_of_sample(review)}

    def _state(self, message: str, index: int | None = None) -> dict[str, Any]:
        """Return what the page shows; `index`: the caption to show instead of the next one."""
        judged, skipped = self._judged(), self._skipped()
        left = [other for other in range(len(self)) if other not in judged and other not in skipped]
        if index is None:
            index = left[0] if left else None
        after = next((other for other in left if other != index), None)
        seconds = seconds_per_image([review for review in self.decisions.own if review.decision in VERDICTS])
        return {
            "card": None if index is None else _card(index, self.sample.captions[index]),
            "after": after,
            "message": message,
            "progress": {
                "total": len(self),
                "judged": len(judged),
                "skipped": len(skipped),
                "can_undo": any(map(self._is_of_sample, self.decisions.own)),
                "minutes_left": None if seconds is None else len(left) * seconds / 60,
            },
        }


def _card(index: int, caption: SampledCaption) -> dict[str, Any]:
    return {"index": index, "image_id": printable(caption.image_id), "text": caption.text}


def _describe(verdict: str) -> str:
    return "Skipped" if verdict == "skipped" else f"Judged {VERDICT_LABELS[verdict]}"


def choose_sample(table: CaptionsTable, size: int | None, seed: int | None, by: str | None) -> tuple[Sample, str]:
    """Draw the sample to look at and note it in OUT; returns it, and a sentence about it.

    What is not given is as in the latest spot-check of the table, so that every reviewer sees the same captions. Raises
    UsageError when the table has no caption, or `by` is not a column or has more values than the sample has images.
    """
    columns = columns_to_stratify(table)
    if by and by not in columns:
        raise UsageError(f"--by {by}: give folder or a column of the table: {', '.join(columns[1:])}")
    latest = read_spec(table)
    base = latest or SampleSpec()
    spec = SampleSpec(
        base.size if size is None else size, base.seed if seed is None else seed, base.by if by is None else by
    )
    sample = draw(table, spec)
    if not sample.captions:
        raise UsageError(f"{table.directory.location} has no caption to judge")
    if len(sample.strata) > spec.size:
        raise UsageError(
            f"--by {spec.by}: the captions have {len(sample.strata):,} values of it, more than --sample {spec.size}; "
            "give a larger sample, or another column"
        )
    if spec != latest:
        write_spec(table, spec)
    stratified = f", stratified by {spec.by}: {counted(len(sample.strata), 'stratum', 'strata')}" if spec.by else ""
    replaced = "; the sample differs from the last one" if latest and spec != latest else ""
    return sample, (
        f"{len(sample.captions):,} of {counted(sum(sample.strata.values()), 'caption')}, drawn with seed {spec.seed}"
        f"{stratified}{replaced}"
    )
