"""What a check keeps of a stream of any length: bounded, and right as far as it says."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.scoring.frequent import Distinct, Frequent
from captioner.scoring.table_stats import Timeline
from captioner.scoring.vocabulary import compare_vocabulary

TEXTS = st.lists(st.text("abc", min_size=1, max_size=2), max_size=200)


@given(TEXTS, st.integers(1, 6))
def test_counts_are_too_low_by_at_most_the_error_and_never_too_high(texts: list[str], capacity: int) -> None:
    frequent = Frequent(capacity)
    for text in texts:
        frequent.add({text: 1})
    exact, found = Counter(texts), dict(frequent.most_common())

    assert len(found) <= 2 * capacity
    assert all(exact[text] - frequent.error <= found.get(text, 0) <= exact[text] for text in exact)
    if not frequent.error:
        assert found == dict(exact)
        assert len(frequent) == len(exact)


@given(TEXTS)
def test_few_distinct_texts_are_counted_exactly(texts: list[str]) -> None:
    distinct = Distinct()
    distinct.add(texts)

    assert distinct.estimate() == len(set(texts))


def test_many_distinct_texts_are_estimated_whatever_their_order_and_repetition() -> None:
    texts = [f"caption {number}" for number in range(50_000)]
    one, other = Distinct(), Distinct()
    one.add(texts)
    other.add(reversed(texts + texts))

    assert one.estimate() == other.estimate() == pytest.approx(50_000, rel=0.06)


@given(st.dictionaries(st.integers(0, 10_000_000), st.integers(1, 9), max_size=60), st.integers(1, 8))
def test_a_timeline_keeps_every_row_in_few_buckets(rows: dict[int, int], most: int) -> None:
    timeline = Timeline(most)
    for second, count in rows.items():
        timeline.add({second: count})
    kept = timeline.to_list()

    assert len(kept) <= most
    assert sum(count for _, count in kept) == sum(rows.values())
    assert kept == sorted(kept)
    assert {start for start, _ in kept} == {second - second % timeline.width for second in rows}
    assert timeline.width == 1 or len(rows) > most


def test_vocabulary_by_hand() -> None:
    captions = [["a", "red", "dog"], ["a", "zebra", "zebra"]]
    references = [[["a", "red", "hound"], ["the", "hound"]], [["a", "horse"]]]

    found = compare_vocabulary(captions, references)

    assert found is not None
    assert (found["captions"], found["references"], found["shared"]) == (4, 5, 2)
    assert found["missed"] == [("horse", 1), ("hound", 1), ("the", 1)]
    assert found["invented"] == [("dog", 1), ("zebra", 1)]
    assert found["covered"] == 3 / 6  # "a" of two pictures and "red" of one, of six words in pictures
    assert compare_vocabulary([], []) is None
