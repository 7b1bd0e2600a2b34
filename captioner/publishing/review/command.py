"""`captioner review`: open the table and serve the review page until Ctrl-C."""

from __future__ import annotations

import contextlib
import getpass
import sys
import webbrowser

from captioner.console.stopping import notify, stoppable
from captioner.console.text import counted, printable
from captioner.errors import OK, CaptionerError, UsageError
from captioner.publishing.review.next_steps import describe_counts
from captioner.publishing.review.previews import Previews
from captioner.publishing.review.queue import QueueKind
from captioner.publishing.review.server import HOST, ReviewServer
from captioner.publishing.review.session import ReviewSession
from captioner.store.table import open_table

_MAX_NAME_LENGTH = 100


def run(out: str, port: int, reviewer: str | None, queue: QueueKind, open_page: bool) -> int:
    """Serve the review page of OUT until Ctrl-C, and print its address on standard output.

    Raises OutputError when OUT has no finished table, has no alt texts, or cannot be written; UsageError when the port
    is in use.
    """
    name = _reviewer(reviewer)
    table = open_table(out)
    with stoppable("every decision is saved"), ReviewSession(table, name, queue) as session:
        if session.decisions.num_damaged:
            notify(f"{out}: ignored {counted(session.decisions.num_damaged, 'damaged line')} in its review journals")
        previews = Previews(table)
        with contextlib.closing(previews), _server(session, previews, port) as server:
            print(f"reviewing {counted(len(session), 'alt text')} as {name}: {server.url}", flush=True)
            print("captioner: every decision is saved at once; Ctrl-C ends the review", file=sys.stderr)
            if open_page:
                webbrowser.open(server.url)
            try:
                server.serve_forever()
            finally:
                _print_summary(session)
    return OK


def _print_summary(session: ReviewSession) -> None:
    with contextlib.suppress(CaptionerError):  # where OUT has gone, the error that ended the review says so
        summary = session.summary()
        notify(describe_counts(summary["counts"]))
        for line in summary["commands"]:
            print(f"  {line['purpose']}: {line['command']}", file=sys.stderr)


def _server(session: ReviewSession, previews: Previews, port: int) -> ReviewServer:
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
