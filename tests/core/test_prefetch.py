"""Prefetching returns all items in order, and their errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.run.prefetch import one_ahead


@settings(deadline=None)
@given(st.lists(st.integers()))
def test_items_keep_their_order(numbers: list[int]) -> None:
    with one_ahead(iter(numbers)) as once, one_ahead(number + 1 for number in once) as twice:
        assert list(twice) == [number + 1 for number in numbers]


def test_the_next_item_is_computed_while_the_current_one_is_used() -> None:
    second_computed = threading.Event()

    def numbers() -> Iterator[int]:
        yield 1
        second_computed.set()
        yield 2

    with one_ahead(numbers()) as items:
        assert next(items) == 1
        assert second_computed.wait(timeout=120)
        assert list(items) == [2]


def test_an_error_is_raised_at_the_position_of_its_item() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    with one_ahead(numbers()) as items, one_ahead(item for item in items) as outer:
        assert next(outer) == 1
        with pytest.raises(OSError, match="gone"):
            next(outer)


def test_stopping_early_leaves_no_thread_running() -> None:
    before = set(threading.enumerate())

    with one_ahead(iter(range(100))) as items:
        next(items)

    assert set(threading.enumerate()) <= before
