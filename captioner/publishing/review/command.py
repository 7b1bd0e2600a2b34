"""`captioner review` and `captioner spot-check`: open the table and serve the page until Ctrl-C."""

from __future__ import annotations

import contextlib
import getpass
import sys

from captioner.console.phases import phase
from captioner.console.stopping import notify, open_in_browser, stoppable
from captioner.console.text import counted, printable
from captioner.errors import OK, CaptionerError, UsageError
from captioner.publishing.review.next_steps import describe_counts
from captioner.publishing.review.previews import Previews
from captioner.publishing.review.queue import QueueKind
from captioner.publishing.review.server import HOST, PageSession, ReviewServer
from captioner.publishing.review.session import ChooseRows, ReviewSession
from captioner.publishing.review.spot_check import SpotCheckSession, choose_sample
from captioner.store.table import CaptionsTable, open_table

_MAX_NAME_LENGTH = 100


def run(
    out: str,
    port: int,
    reviewer: str | None,
    queue: QueueKind,
    open_page: bool,
    choose: ChooseRows | None = None,
) -> int:
    """Serve the review page of OUT until Ctrl-C, and print its address on standard output.

    `choose`: as for `ReviewSession`. Raises OutputError when OUT has no finished table, has no alt texts, or cannot be
    written; UsageError when the port is in use, or no image is chosen.
    """
    name = _reviewer(reviewer)
    if choose and queue == "random":
        raise UsageError("--queue random measures the whole table; leave out --only")
    table = open_table(out)
    with stoppable("every decision is saved"), ReviewSession(table, name, queue, choose) as session:
        if choose and not len(session):
            raise UsageError(f"--only: no image with an alt text in {out} matches; there is nothing to review")
        _note_damage(out, session.decisions.num_damaged)
        _serve(session, table, f"reviewing {counted(len(session), 'alt text')} as {name}", port, open_page)
    return OK


def spot_check(
    out: str, sample: int | None, seed: int | None, by: str | None, reviewer: str | None, port: int, open_page: bool
) -> int:
    """Serve the spot-check page of OUT until Ctrl-C, then print the share of right captions.

    Raises UsageError as `choose_sample`, and when the port is in use; OutputError when OUT cannot be written.
    """
    name = _reviewer(reviewer)
    table = open_table(out)
    with phase("drawing the sample", notify):
        drawn, sentence = choose_sample(table, sample, seed, by)
    notify(sentence)
    with stoppable("every verdict is saved"), SpotCheckSession(table, name, drawn) as session:
        _note_damage(out, session.decisions.num_damaged)
        _serve(session, table, f"judging {counted(len(session), 'caption')} as {name}", port, open_page)
    return OK


def _note_damage(out: str, num_lines: int) -> None:
    if num_lines:
        notify(f"{out}: ignored {counted(num_lines, 'damaged line')} in its review journals")


def _serve(
    session: ReviewSession | SpotCheckSession, table: CaptionsTable, title: str, port: int, open_page: bool
) -> None:
    """Serve the page of a session until Ctrl-C, then print its summary."""
    previews = Previews(table)
    with contextlib.closing(previews), _server(session, previews, port) as server:
        print(f"{title}: {server.url}", flush=True)
        print("captioner: every decision is saved at once; Ctrl-C ends the review", file=sys.stderr)
        if open_page:
            open_in_browser(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:  # the way in which this command ends
            notify("ended by Ctrl-C; everything is saved; run the same command to continue")
        finally:
            _print_summary(session)


def _print_summary(session: ReviewSession | SpotCheckSession) -> None:
    with contextlib.suppress(CaptionerError):  # where OUT has gone, the error that ended the review says so
        summary = session.summary()
        for line in summary["lines"] if "lines" in summary else [describe_counts(summary["counts"])]:
            notify(line)
        for line in summary["commands"]:
            print(f"  {line['purpose']}: {line['command']}", file=sys.stderr)


def _server(session: PageSession, previews: Previews, port: int) -> ReviewServer:
    try:
        return ReviewServer(session, previews, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--port {port}: cannot listen on {HOST}: {reason}; give another port, or 0") from error


def _reviewer(name: str | None) -> str:
    """Return the name saved with each decision, by default the login name. Raises UsageError."""
    if name is None:
        with contextlib.suppress(Exception):  # no such user in a container
            name = getpass.getuser()
    name = printable(name or "").strip()
    if not name or len(name) > _MAX_NAME_LENGTH:
        raise UsageError(
            f"--reviewer: give a name of 1 to {_MAX_NAME_LENGTH} characters; it is saved with each decision"
        )
    return name
