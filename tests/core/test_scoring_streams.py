"""Statistics of tables of any length are bounded in memory and within their stated error."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.data import CAPTIONS_SCHEMA
from captioner.scoring import table_stats
from captioner.scoring.scores import compare_vocabulary
from captioner.scoring.table_stats import COLUMNS, CappedCounter, TableStats

TEXTS = st.lists(st.text("abc", min_size=1, max_size=2), max_size=200)


@given(TEXTS, st.integers(1, 6))
def test_counts_are_too_low_by_at_most_the_error_and_never_too_high(texts: list[str], capacity: int) -> None:
    counter = CappedCounter(capacity)
    for text in texts:
        counter.add({text: 1})
    exact, counts = Counter(texts), dict(counter.most_common())

    assert len(counts) <= 2 * capacity
    assert counter.num_distinct <= len(exact)
    assert all(exact[text] - counter.error <= counts.get(text, 0) <= exact[text] for text in exact)
    if not counter.error:
        assert counts == dict(exact)
        assert counter.num_distinct == len(exact)


@given(st.lists(st.integers(0, 10_000_000), max_size=60), st.integers(1, 8))
def test_rows_by_time_are_all_counted_in_few_buckets(seconds: list[int], max_buckets: int) -> None:
    stats = TableStats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_stats, "MAX_BUCKETS", max_buckets)
        for second in seconds:
            stats.add(rows_made_at(second))
    figures = stats.to_json()
    committed, width = figures["committed"], figures["committed_seconds"]

    assert len(committed) <= max_buckets
    assert sum(count for _, count in committed) == len(seconds)
    assert committed == sorted(committed)
    assert {start for start, _ in committed} == {second - second % width for second in seconds}
    assert width == 1 or len(seconds) > max_buckets


def rows_made_at(second: int) -> pa.Table:
    """Return one failed row of the captions table that was created at that second."""
    return rows_of([{"status": "failed", "error_code": "decode_error"}], second)


def rows_of(rows: list[dict[str, str]], second: int = 0) -> pa.Table:
    """Return rows of the captions table with these values."""
    values = dict.fromkeys(COLUMNS) | {"image_id": "a.png", "created_at": datetime.fromtimestamp(second, UTC)}
    fields = [CAPTIONS_SCHEMA.field(name) for name in COLUMNS]
    return pa.Table.from_pylist([values | row for row in rows], pa.schema(fields))


def test_the_language_of_many_captions_is_that_of_a_sample_of_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_stats, "MAX_LANGUAGES", 20)
    german = [f"ein Hund auf der Wiese {number}" for number in range(15)]
    english = [f"a dog on the grass {number}" for number in range(88)]
    stats = TableStats()
    for captions in (german + english, english + german):
        stats.add(rows_of([{"status": "ok", "caption": text, "sha256": text} for text in captions]))

    assert stats.language == "en"
    assert set(stats.languages) == {"en", "de"}
    assert 2 * 10 < stats.languages.total() <= 2 * 20


def test_vocabulary_by_hand() -> None:
    captions = [["a", "red", "dog"], ["a", "zebra", "zebra"]]
    references = [[["a", "red", "hound"], ["the", "hound"]], [["a", "horse"]]]

    vocabulary = compare_vocabulary(captions, references)

    assert vocabulary is not None
    assert (vocabulary["captions"], vocabulary["references"], vocabulary["shared"]) == (4, 5, 2)
    assert vocabulary["missed"] == [("horse", 1), ("hound", 1), ("the", 1)]
    assert vocabulary["invented"] == [("dog", 1), ("zebra", 1)]
    assert vocabulary["covered"] == 3 / 6  # "a" of two images and "red" of one, of six words in images
    assert compare_vocabulary([], []) is None
