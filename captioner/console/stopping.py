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

REDELIVERY_S = 0.01  # after which a lost Ctrl-C or SIGTERM is raised again


@contextmanager
def stoppable(what_stays: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into errors that say what is kept and that the same command continues the run.

    `what_stays`: what is kept, such as "progress is saved in OUT". Another Ctrl-C while the run cleans up ends the
    process.
    """
    advice = f"{what_stays}; run the same command to continue"

    def terminate(*_: Any) -> None:
        _cancel_redelivery()
        raise TerminatedRunError(f"stopped by SIGTERM; {advice}")

    def interrupt(*_: Any) -> None:
        _cancel_redelivery()
        signal.signal(signal.SIGINT, quit_at_once)
        raise KeyboardInterrupt

    try:
        with _handlers({signal.SIGTERM: terminate, signal.SIGINT: interrupt}):
            yield
    except KeyboardInterrupt:
        raise InterruptedRunError(f"stopped by Ctrl-C; {advice}") from None


@contextmanager
def stops_redelivered() -> Iterator[None]:
    """Raise Ctrl-C and SIGTERM again where Python has lost their error.

    A handler of signals runs wherever the main thread is. In a destructor or a weakref callback, Python prints
    "Exception ignored in ..." and goes on. The error is raised again REDELIVERY_S later, until it comes elsewhere.
    """
    show = sys.unraisablehook

    def redeliver(lost: Any) -> None:
        error = lost.exc_value
        if not isinstance(error, (KeyboardInterrupt, TerminatedRunError)):
            show(lost)
            return

        def raise_again(*_: Any) -> None:
            raise error.with_traceback(None)

        # By a signal, since nothing else ends a wait of the main thread.
        signal.signal(signal.SIGALRM, raise_again)
        signal.setitimer(signal.ITIMER_REAL, REDELIVERY_S)

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    before = signal.getsignal(signal.SIGALRM)
    sys.unraisablehook = redeliver
    try:
        yield
    finally:
        _cancel_redelivery()
        sys.unraisablehook = show
        signal.signal(signal.SIGALRM, before)


def _cancel_redelivery() -> None:
    """Do not raise a lost stop again: another one has come."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def ignore_ctrl_c() -> None:
    """Let the process end with its own exit code, as the last of its exit handlers.

    When Python unloads its modules it restores the system's handlers, and SIGINT would end the process by the signal.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
