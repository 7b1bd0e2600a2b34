"""Print messages next to the progress display, open pages, and stop a run on Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from captioner.console.phases import HEARTBEAT
from captioner.console.text import printable
from captioner.errors import InterruptedRunError, TerminatedRunError


@contextmanager
def stoppable(what_stays: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into errors that say what is kept and that the same command continues the run.

    `what_stays`: what is kept, such as "progress is saved in OUT". Another Ctrl-C while the run cleans up ends the
    process.
    """
    advice = f"{what_stays}; run the same command to continue"

    def terminate(*_: Any) -> None:
        raise TerminatedRunError(f"stopped by SIGTERM; {advice}")

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, quit_at_once)
        raise KeyboardInterrupt

    try:
        with _handlers({signal.SIGTERM: terminate, signal.SIGINT: interrupt}):
            yield
    except KeyboardInterrupt:
        raise InterruptedRunError(f"stopped by Ctrl-C; {advice}") from None


def quit_at_once(signal_number: int, _: Any = None) -> NoReturn:
    """End the process without cleaning up, as a handler of signals.

    Python's own way out would unload modules while threads of Ray's core still use them: a segmentation fault.
    """
    os._exit(128 + signal_number)


def drop_failed_output() -> bool:
    """Return whether the reader of standard output or standard error has closed it, as `head -1` does.

    What such a one, or one that fails otherwise, has not taken yet is dropped: Python would fail at it at its end.
    """
    is_closed = False
    for stream in (sys.stdout, sys.stderr):
        is_closed |= _has_no_reader(stream)
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return is_closed


def _has_no_reader(stream: TextIO) -> bool:
    """Return whether a stream is a pipe whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors are told in any case
        return bool(poll.poll(0))
    except (OSError, ValueError):  # it is no file
        return False


@contextmanager
def _handlers(handlers: dict[signal.Signals, Callable[..., None]]) -> Iterator[None]:
    """Install handlers of signals, except of those that are ignored, and bring the former ones back."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def notify(line: str) -> None:
    """Print one line on standard error, next to the progress display."""
    print(f"captioner: {printable(line)}", file=sys.stderr, flush=True)
    HEARTBEAT.line_printed()


def open_in_browser(address: str) -> None:
    """Open a page in the browser; where there is none, say that it is to be opened by hand."""
    if not webbrowser.open(address):
        notify(f"no browser could be opened; open this page in one yourself: {address}")
