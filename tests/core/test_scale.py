"""A table that grows: parts are published while others are captioned, and no command reads more than it needs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner import pipeline
from captioner.config import CaptionConfig
from captioner.errors import DamagedFileError
from captioner.run import job
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
RATIO = 0.24  # see docs/scale.md


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


def test_publishing_and_verifying_take_no_more_than_a_few_times_what_writing_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By CPU time of this process, the least of three rounds in which both take turns: others may load the machine."""
    monkeypatch.setattr(job, "open_source", lambda settings: SyntheticSource(100_000))
    config = caption_config("synthetic://", tmp_path / "out", rows_per_file=50_000)
    opened = job.open_job(config, InstantEngine(), lambda line: None)
    (plan,) = opened.generations()
    for _ in InstantEngine().caption_chunks(opened.work, opened.missing_chunks(plan)):
        pass
    ours, plain = [], []
    for number in range(3):
        table = open_table(str(shutil.copytree(tmp_path / "out", tmp_path / str(number))))
        ours.append(cpu_seconds(lambda table=table: publish(table, plan) == [] and verify(table).proven))
        parts = [table.directory.read_table(captions_name(part)) for part in plan.parts]
        plain.append(cpu_seconds(lambda parts=parts: [pq.write_table(part, tmp_path / "plain") for part in parts]))

    assert min(plain) / min(ours) >= RATIO


def cpu_seconds(action: Callable[[], object]) -> float:
    started = time.process_time()
    assert action()
    return time.process_time() - started
