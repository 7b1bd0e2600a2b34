"""List the units of a source side by side, and hand the listings over in order."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from captioner.data import Listing, Source

_UNITS_AT_ONCE = 8
_LISTINGS_AHEAD = 4  # of each unit: a unit of any size is held in part only

_Item = Listing | BaseException | None


def list_units(source: Source, units: Sequence[str]) -> Iterator[tuple[str, Listing]]:
    """(unit, listing) in the order of `units` and, within one, of the source. Units ahead are listed in threads, which
    wait once they are a few listings ahead."""
    stop = threading.Event()
    waiting: deque[queue.Queue[_Item]] = deque()
    with ThreadPoolExecutor(_UNITS_AT_ONCE, thread_name_prefix="listing") as pool:
        try:
            for number, unit in enumerate(units):
                for following in units[number + len(waiting) : number + _UNITS_AT_ONCE]:
                    waiting.append(queue.Queue(_LISTINGS_AHEAD))
                    pool.submit(_list_into, waiting[-1], source, following, stop)
                listings = waiting.popleft()
                while (item := listings.get()) is not None:
                    if isinstance(item, BaseException):
                        raise item
                    yield unit, item
        finally:
            stop.set()


def _list_into(ahead: queue.Queue[_Item], source: Source, unit: str, stop: threading.Event) -> None:
    try:
        for listing in source.list_unit(unit):
            if not _put(ahead, listing, stop):
                return
        _put(ahead, None, stop)
    except BaseException as error:  # it is raised where the listing is used
        _put(ahead, error, stop)


def _put(ahead: queue.Queue[_Item], item: _Item, stop: threading.Event) -> bool:
    """Whether the item was taken before the consumer went away."""
    while not stop.is_set():
        try:
            ahead.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
