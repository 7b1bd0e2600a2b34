"""List the units of a source in parallel, and return the listings in order."""

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
    """Yield (unit, listing) in the order of `units` and, within one, of the source.

    The next units are listed in threads, which wait when they are a few listings ahead.
    """
    stop = threading.Event()
    queues: deque[queue.Queue[_Item]] = deque()
    with ThreadPoolExecutor(_UNITS_AT_ONCE, thread_name_prefix="listing") as pool:
        try:
            for number, unit in enumerate(units):
                for following in units[number + len(queues) : number + _UNITS_AT_ONCE]:
                    queues.append(queue.Queue(_LISTINGS_AHEAD))
                    pool.submit(_list_into, queues[-1], source, following, stop)
                listings = queues.popleft()
                while (item := listings.get()) is not None:
                    if isinstance(item, BaseException):
                        raise item
                    yield unit, item
        finally:
            stop.set()


def _list_into(listings: queue.Queue[_Item], source: Source, unit: str, stop: threading.Event) -> None:
    try:
        for listing in source.list_unit(unit):
            if not _put(listings, listing, stop):
                return
        _put(listings, None, stop)
    except BaseException as error:  # raised again where the listing is used
        _put(listings, error, stop)


def _put(items: queue.Queue[_Item], item: _Item, stop: threading.Event) -> bool:
    """Put the item in the queue; return whether that was possible before the consumer stopped."""
    while not stop.is_set():
        try:
            items.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
