"""Compute the next item in a thread while the caller uses the current one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


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
    """Yield an iterator over `items` that computes each in a thread while the caller uses the one before it."""
    with ThreadPoolExecutor(1) as thread:
        yield _prefetched(thread, items, thread.submit(lambda: next(items, None)))


def in_parallel(function: Callable[[T], U], items: Iterator[T], count: int) -> Generator[U, None, None]:
    """Yield `function` of each item, in order; `count` calls run at the same time, in threads where it is above 1.

    Whoever may leave it before its end closes it (`contextlib.closing`). The garbage collector would do so at any later
    time, also while `threading` holds a lock that the end of the threads needs.
    """
    if count == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(count) as threads:
        pending: deque[Future[U]] = deque()
        try:
            for item in items:
                pending.append(threads.submit(function, item))
                while len(pending) >= count or (pending and pending[0].done()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def as_finished(
    function: Callable[[T], U], items: Iterator[T], count: int, stop: Callable[[], None] = lambda: None
) -> Generator[U, None, None]:
    """Yield `function` of each item as `in_parallel` does, but in the order in which the calls end.

    A call that takes long holds up none of the others. `stop`: called where the iteration ends early, by an error or by
    the caller; it lets the calls under way end, which are waited for.
    """
    if count == 1:
        yield from map(function, items)
        return
    pending: set[Future[U]] = set()
    with ThreadPoolExecutor(count) as threads:
        try:
            for item in items:
                pending.add(threads.submit(function, item))
                is_full = len(pending) == count
                finished, pending = wait(pending, None if is_full else 0, FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
            for future in as_completed(pending):
                yield future.result()
        except BaseException:  # GeneratorExit too
            for future in pending:
                future.cancel()
            stop()
            raise


def _prefetched(thread: ThreadPoolExecutor, items: Iterator[T], pending: Future[T | None]) -> Iterator[T]:
    while (item := pending.result()) is not None:
        pending = thread.submit(lambda: next(items, None))
        yield item
