"""Items made ahead of whoever waits for them: all of them, in order, and their errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.run.prefetch import one_ahead


@settings(deadline=None)
@given(st.lists(st.integers()))
def test_the_items_come_in_order(numbers: list[int]) -> None:
    with one_ahead(iter(numbers)) as once, one_ahead(number + 1 for number in once) as twice:
        assert list(twice) == [number + 1 for number in numbers]


def test_the_next_item_is_made_while_this_one_is_worked_on() -> None:
    second_is_made = threading.Event()

    def made() -> Iterator[int]:
        yield 1
        second_is_made.set()
        yield 2

    with one_ahead(made()) as items:
        assert next(items) == 1
        assert second_is_made.wait(timeout=120)
        assert list(items) == [2]


def test_an_error_comes_where_its_item_would() -> None:
    def made() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    with one_ahead(made()) as items, one_ahead(item for item in items) as again:
        assert next(again) == 1
        with pytest.raises(OSError, match="gone"):
            next(again)


def test_who_stops_early_leaves_nothing_running() -> None:
    before = set(threading.enumerate())

    with one_ahead(iter(range(100))) as items:
        next(items)

    assert set(threading.enumerate()) <= before
