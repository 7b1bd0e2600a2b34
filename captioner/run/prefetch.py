"""Work done ahead of whoever waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def in_background(function: Callable[[], T]) -> Future[T]:
    """Call `function` in a thread that ends with the process, whatever it is doing."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised by `result()`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextmanager
def one_ahead(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """The items, each made in a thread of its own while the caller works on the one before; the first at once."""
    with ThreadPoolExecutor(1) as thread:
        yield _handed_out(thread, items, thread.submit(lambda: next(items, None)))


def _handed_out(thread: ThreadPoolExecutor, items: Iterator[T], made: Future[T | None]) -> Iterator[T]:
    while (item := made.result()) is not None:
        made = thread.submit(lambda: next(items, None))
        yield item
