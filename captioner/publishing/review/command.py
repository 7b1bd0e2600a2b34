"""`captioner review`: open the table, serve the page until Ctrl-C."""

from __future__ import annotations

import contextlib
import getpass
import sys
import webbrowser

from captioner.console.stopping import say, stoppable
from captioner.console.text import printable
from captioner.errors import OK, UsageError
from captioner.publishing.review.previews import Pictures
from captioner.publishing.review.queue import QueueKind
from captioner.publishing.review.server import HOST, ReviewServer
from captioner.publishing.review.session import Desk
from captioner.store.table import open_table

_LONGEST_NAME = 100


def run(out: str, port: int, reviewer: str | None, queue: QueueKind, open_page: bool) -> int:
    """Serve the review page of OUT until it is stopped. Prints its address on standard output.

    Raises OutputError where OUT has no finished table, no alt texts, or cannot be written; UsageError where the port is
    in use.
    """
    name = _reviewer(reviewer)
    table = open_table(out)
    with stoppable("every decision is saved"), Desk(table, name, queue) as desk:
        if desk.decisions.num_damaged:
            say(f"{out}: damaged lines in its journals passed over: {desk.decisions.num_damaged}; the rest counts")
        pictures = Pictures(table)
        try:
            with _server(desk, pictures, port) as server:
                print(f"reviewing {len(desk):,} alt texts as {name}: {server.url}", flush=True)
                print("captioner: every decision is saved at once; Ctrl-C ends the review", file=sys.stderr)
                if open_page:
                    webbrowser.open(server.url)
                server.serve_forever()
        finally:
            pictures.close()
    return OK


def _server(desk: Desk, pictures: Pictures, port: int) -> ReviewServer:
    try:
        return ReviewServer(desk, pictures, port)
    except (OSError, OverflowError) as error:
        words = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--port {port}: {HOST} cannot be listened on there: {words}; give another port, or 0"
        ) from error


def _reviewer(given: str | None) -> str:
    """The name under which decisions are kept: the login name unless given. Raises UsageError."""
    name = given
    if name is None:
        with contextlib.suppress(Exception):  # no such user in a container
            name = getpass.getuser()
    name = printable(name or "").strip()
    if not name or len(name) > _LONGEST_NAME:
        raise UsageError(
            f"--reviewer: a name of 1 to {_LONGEST_NAME} characters is wanted; it is kept with each decision"
        )
    return name
