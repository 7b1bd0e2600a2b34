"""What a run says beside its progress display, and how Ctrl-C and SIGTERM end it."""

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
    """Ctrl-C and SIGTERM end the run with their own errors, which say what stays and that the same command goes on."""
    way_out = f"{what_stays}, the same command goes on"

    def terminate(*_: Any) -> None:
        raise TerminatedRunError(f"stopped by SIGTERM; {way_out}")

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if main_thread else None
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(f"stopped; {way_out}") from None
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def say(line: str) -> None:
    """One line for a person, beside the progress display."""
    print(f"captioner: {printable(line)}", file=sys.stderr, flush=True)
