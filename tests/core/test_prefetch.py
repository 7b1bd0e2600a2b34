"""Prefetching returns all items in order, and their errors; calls that run together are returned as they end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.run.prefetch import as_finished, one_ahead


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


def test_a_call_that_takes_long_holds_up_none_of_the_others() -> None:
    last_called = threading.Event()

    def call(number: int) -> int:
        if number == 0:
            assert last_called.wait(timeout=120)
        elif number == 9:
            last_called.set()
        return number

    assert sorted(as_finished(call, iter(range(10)), 2)) == list(range(10))


@given(st.lists(st.integers()), st.integers(1, 4))
def test_calls_that_run_together_give_every_result_once(numbers: list[int], count: int) -> None:
    assert sorted(as_finished(lambda number: -number, iter(numbers), count)) == sorted(-number for number in numbers)


def test_calls_under_way_are_told_where_nobody_waits_for_them() -> None:
    stopped = threading.Event()

    def call(number: int) -> int:
        assert number == 0 or stopped.wait(timeout=120)
        return number

    results = as_finished(call, iter(range(3)), 2, stopped.set)
    assert next(results) == 0
    results.close()
    assert stopped.is_set()


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_of_a_call_is_raised(count: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(as_finished(lambda number: 1 // number, iter([1, 0, 1, 1, 1]), count))
