"""A table that grows: parts are published while others are captioned, and no command reads more than it needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner import pipeline
from captioner.config import CaptionConfig
from captioner.errors import DamagedFileError
from captioner.run import job
from captioner.store import checksum
from captioner.store import publish as publishing
from captioner.store.directory import Directory
from captioner.store.ids import digests_of
from captioner.store.publish import PartPublisher, publish
from captioner.store.read import raise_damage, read_parts
from captioner.store.table import CaptionsTable, captions_name, open_table, publishing_name
from captioner.store.verify import count_rows, verify
from captioner.testing.synthetic import InstantEngine, SyntheticSource
from tests.helpers import caption_config

ROWS, ROWS_PER_FILE, ROWS_PER_CHUNK = 10_000, 1_024, 512  # ten parts of two chunks


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CaptionConfig:
    """Settings of a run over a synthetic source."""
    monkeypatch.setattr(job, "open_source", lambda settings: SyntheticSource(ROWS))
    return caption_config("synthetic://", tmp_path / "out", rows_per_file=ROWS_PER_FILE)


def stopped_after(config: CaptionConfig, chunks: int) -> CaptionsTable:
    """Caption so many chunks and publish the parts that are complete then, as a run does before it is killed."""
    caption_missing(config, chunks)
    return open_table(config.output.path)


def caption_missing(config: CaptionConfig, chunks: int | None = None) -> job.Job:
    engine = InstantEngine()
    opened = job.open_job(config, engine, lambda line: None)
    (plan,) = opened.generations()
    missing = opened.missing_chunks(plan)
    with PartPublisher(opened.table, plan, missing) as publisher:
        for receipt in engine.caption_chunks(opened.work, missing[:chunks]):
            publisher.add(receipt.chunk_id)
    return opened


def read_names(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object], *methods: str) -> set[str]:
    """Return the names of the files that an action reads with these methods."""
    names: set[str] = set()

    def noted(method: Callable) -> Callable:
        def wrapper(self: Directory, name: str) -> object:
            names.add(name)
            return method(self, name)

        return wrapper

    with monkeypatch.context() as patch:
        for method in methods:
            patch.setattr(Directory, method, noted(getattr(Directory, method)))
        action()
    return names


def test_parts_are_published_while_others_are_captioned(config: CaptionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    table = stopped_after(config, 2 * 6 + 1)
    (plan,) = table.plans()

    assert table.published_parts() == set(range(6))
    assert table.committed_chunks(0) == {plan.part_chunks(6)[0].chunk_id}
    assert count_rows(table).remaining == ROWS - 13 * ROWS_PER_CHUNK
    assert (verify(table).lost, verify(table).problems) == (0, [])

    names = read_names(monkeypatch, lambda: missing_rows_are_captioned(config), "read_bytes")
    assert names.isdisjoint(captions_name(part) for part in range(6))
    assert verify(table).proven
    assert not table.directory.exists(publishing_name(0))


def missing_rows_are_captioned(config: CaptionConfig) -> None:
    """Go on with a run up to its end, without the check of all captions that follows."""
    table = caption_missing(config).table
    (plan,) = table.plans()
    assert publish(table, plan) == []
    assert count_rows(table, whole_files=False).remaining == 0


@pytest.mark.parametrize("injury", [lambda data: data[:40], lambda data: data.replace(b"sha256", b"sha255"), None])
def test_a_damaged_record_of_what_is_published_costs_reading_and_no_row(
    config: CaptionConfig, injury: Callable[[bytes], bytes] | None
) -> None:
    table = stopped_after(config, 7)
    name = publishing_name(0)
    before = table.directory.read_bytes(name)
    if injury:
        table.directory.write_bytes(name, injury(before))
    else:
        table.directory.delete(name)

    assert count_rows(table, whole_files=False).ok == count_rows(table).ok
    assert pipeline.run(config, InstantEngine()) == 0
    assert verify(table).proven


def test_the_record_of_many_parts_is_not_written_for_each_and_those_it_lacks_are_read(
    config: CaptionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "PARTS_FOR_ONE_UNRECORDED", 2)
    table = stopped_after(config, 2 * 7)

    assert table.published_parts() == set(range(7))
    assert set(table.files_so_far(0)) == set(range(4))
    assert count_rows(table, whole_files=False) == count_rows(table)
    assert verify(table).lost == 0

    assert pipeline.run(config, InstantEngine()) == 0
    assert verify(table).proven
    assert set(table.published_files(0)) == set(range(10))


def test_a_published_part_that_is_damaged_before_the_end_is_captioned_again(config: CaptionConfig) -> None:
    table = stopped_after(config, 7)
    table.directory.write_bytes(captions_name(1), table.directory.read_bytes(captions_name(1))[:-9])

    assert pipeline.run(config, InstantEngine()) == 0
    assert verify(table).proven


def test_counting_a_finished_table_reads_no_part_but_one_that_was_changed(
    config: CaptionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run(config, InstantEngine())
    pipeline.run(
        config.model_copy(update={"output": config.output.model_copy(update={"retry_failed": True})}), InstantEngine()
    )
    table = open_table(config.output.path)
    assert table.is_published(1)

    names = read_names(monkeypatch, lambda: count_rows(table, whole_files=False), "read_bytes", "open_parquet")
    assert [name for name in names if name.endswith(".parquet")] == []
    assert count_rows(table, whole_files=False) == count_rows(table)

    rows = table.directory.read_table(captions_name(3))
    table.directory.write_table(captions_name(3), rows.slice(0, 1_000))
    with pytest.raises(DamagedFileError):
        count_rows(table, whole_files=False)


def test_a_part_that_is_published_while_it_is_read_is_read_once(config: CaptionConfig) -> None:
    table = stopped_after(config, 3)
    (plan,) = table.plans()
    engine = InstantEngine()
    opened = job.open_job(config, engine, lambda line: None)
    list(engine.caption_chunks(opened.work, opened.missing_chunks(plan)))
    rows = read_parts(table, ["image_id"], on_damage=raise_damage)
    first = next(rows)

    publish(table, plan)

    ids = pa.concat_tables([first, *rows])["image_id"].to_pylist()
    assert len(ids) == len(set(ids)) == ROWS


@given(ids=st.lists(st.text(max_size=300), max_size=40), cut=st.integers(0, 40), number=st.integers(1, 5))
def test_an_id_has_one_digest_wherever_it_stands(ids: list[str], cut: int, number: int) -> None:
    alone = [digests_of([image_id])[0] for image_id in ids]
    column = pa.array(ids, pa.string())
    parts = pa.chunked_array([column.slice(first, number) for first in range(0, len(ids), number)], pa.string())

    assert digests_of(column).tolist() == digests_of(parts).tolist() == [digest.tolist() for digest in alone]
    assert digests_of(column.slice(cut)).tolist() == [digest.tolist() for digest in alone[cut:]]
    assert len(set(digests_of(column).tolist())) == len(set(ids))


def test_publishing_and_verifying_read_write_and_hash_no_more_than_they_must(
    tmp_path: Path, config: CaptionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = InstantEngine()
    opened = job.open_job(config, engine, lambda line: None)
    (plan,), table = opened.generations(), opened.table
    list(engine.caption_chunks(opened.work, opened.missing_chunks(plan)))
    chunks, parts = table.committed_chunks(0), {captions_name(part) for part in plan.parts}
    chunk_files = {table.chunk_name(chunk_id) for chunk_id in chunks}
    read = noted_calls(monkeypatch, Directory, "read_bytes", lambda _, name: name)
    written = noted_calls(monkeypatch, Directory, "write_bytes", lambda _, name, data: name)
    hashed = noted_calls(monkeypatch, checksum, "_checksum_and_digest", lambda data, _: len(data))
    num_bytes = sum((tmp_path / "out" / name).stat().st_size for name in chunk_files)

    assert publish(table, plan) == []
    num_bytes += 2 * sum(file.stat().st_size for file in (tmp_path / "out").glob("captions/*.parquet"))
    num_bytes += 3 * sum(file.stat().st_size for file in (tmp_path / "out").glob("plan/*/*.parquet"))
    assert verify(table).proven

    assert Counter(name for name in read if name in chunk_files) == dict.fromkeys(chunk_files, 1)
    assert Counter(name for name in read if name in parts) == dict.fromkeys(parts, 1)
    assert Counter(name for name in written if name in parts) == dict.fromkeys(parts, 1)
    assert sum(hashed) <= num_bytes


def noted_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, what: Callable[..., Any]) -> list[Any]:
    """Return a list that grows by `what(*arguments)` with each call of a function."""
    function, noted = getattr(owner, name), []

    def wrapper(*arguments: Any) -> Any:
        noted.append(what(*arguments))
        return function(*arguments)

    monkeypatch.setattr(owner, name, wrapper)
    return noted
