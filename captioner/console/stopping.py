"""Print messages next to the progress display, and stop a run on Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from captioner.console.text import printable
from captioner.errors import InterruptedRunError, TerminatedRunError


@contextmanager
def stoppable(what_stays: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into errors that say what is kept and that the same command continues the run.

    `what_stays`: what is kept, such as "committed rows stay".
    """
    advice = f"{what_stays}, the same command goes on"

    def terminate(*_: Any) -> None:
        raise TerminatedRunError(f"stopped by SIGTERM; {advice}")

    main_thread = threading.current_thread() is threading.main_thread()
    old_handler = signal.signal(signal.SIGTERM, terminate) if main_thread else None
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(f"stopped; {advice}") from None
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, old_handler)


def notify(line: str) -> None:
    """Print one line on standard error, next to the progress display."""
    print(f"captioner: {printable(line)}", file=sys.stderr, flush=True)
