"""The plan: frozen, cut into chunks, resumable, with every id once."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.config import SourceConfig
from captioner.errors import OutputError, SourceError
from captioner.sources import open_source
from captioner.store.creating import create_table
from captioner.store.ids import IdIndex
from captioner.store.plan import compare_with_source, make_plan, read_planned
from captioner.store.table import CaptionsTable, Plan, open_table
from captioner.testing import make_parquet, make_tar


def make_archive(root: Path, names: list[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # listing never opens an image, so an empty file will do
    return root


def make_table(out: Path) -> CaptionsTable:
    return create_table(str(out), {}, [])


def plan_folder_of(table: CaptionsTable, archive: Path, rows_per_chunk=4, rows_per_file=8, **settings_) -> Plan | None:
    config = SourceConfig(path=str(archive), **settings_)
    return make_plan(table, open_source(config), rows_per_chunk, rows_per_file, config.limit)


def planned_ids(table: CaptionsTable) -> list[str]:
    return [
        image_id
        for plan in table.plans()
        for chunk in plan.chunks()
        for image_id in read_planned(table, chunk)["image_id"].to_pylist()
    ]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    names = [f"{folder}/{number:03d}.jpg" for folder in ("a", "b", "c") for number in range(10)]
    return make_archive(tmp_path / "archive", names)


def test_every_image_is_planned_once_in_a_stable_order(tmp_path: Path, archive: Path) -> None:
    first, second = make_table(tmp_path / "one"), make_table(tmp_path / "two")
    plan = plan_folder_of(first, archive)
    plan_folder_of(second, archive)

    assert plan is not None
    assert plan.parts == {0: 8, 1: 8, 2: 8, 3: 6}
    assert [chunk.num_rows for chunk in plan.chunks()] == [4, 4, 4, 4, 4, 4, 4, 2]
    assert sorted(planned_ids(first)) == sorted(str(p.relative_to(archive)) for p in archive.rglob("*.jpg"))
    assert planned_ids(first) == planned_ids(second)


def test_a_small_archive_is_cut_into_small_chunks(tmp_path: Path, archive: Path) -> None:
    plan = plan_folder_of(make_table(tmp_path / "out"), archive, rows_per_chunk=512, rows_per_file=50_000)

    assert plan is not None
    assert plan.rows_per_chunk == 16
    assert plan.parts == {0: 30}


def test_chunks_of_a_collection_that_is_not_large_are_whole_batches(tmp_path: Path) -> None:
    collection = tmp_path / "collection"
    collection.mkdir()
    for number in range(1100):
        (collection / f"{number:04}.jpg").touch()

    plan = plan_folder_of(make_table(tmp_path / "out"), collection, rows_per_chunk=512, rows_per_file=50_000)

    assert plan is not None
    assert plan.rows_per_chunk == 32  # 1100 / 64 is 18
    assert plan.num_chunks == 35


class StopsAfter:
    """A source whose listing dies after some units, as a killed process would."""

    def __init__(self, source, units: int) -> None:
        self._source, self._left = source, units

    def __getattr__(self, name):
        return getattr(self._source, name)

    def list_unit(self, unit):
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        return self._source.list_unit(unit)


@pytest.mark.parametrize("units", [0, 1, 2, 3])
def test_a_listing_that_was_cut_off_goes_on_to_the_same_plan(tmp_path: Path, archive: Path, units: int) -> None:
    whole, cut = make_table(tmp_path / "whole"), make_table(tmp_path / "cut")
    for name in ("a/003", "b/001", "b/007", "c/009"):
        (archive / name).with_suffix(".txt").write_text("a caption")
        (archive / name).with_suffix(".npz").touch()
    plan_folder_of(whole, archive, rows_per_chunk=2, rows_per_file=4)
    config = SourceConfig(path=str(archive))
    with pytest.raises(KeyboardInterrupt):
        make_plan(cut, StopsAfter(open_source(config), units), 2, 4)
    assert cut.plans() == []

    plan_folder_of(cut, archive, rows_per_chunk=2, rows_per_file=4)

    assert planned_ids(cut) == planned_ids(whole)
    assert cut.plans() == whole.plans()
    (plan,) = cut.plans()
    assert plan.ignored_kinds == {"*.npz": 4}
    assert plan.notes == [
        "26 of 30 images without a reference caption, e.g. 'a/000.jpg', 'a/001.jpg', 'a/002.jpg'",
    ]


def remove_listed(archive: Path) -> None:
    (archive / "b/001.jpg").unlink()


def add_before(archive: Path) -> None:
    (archive / "b/0015.jpg").touch()


def remove_and_add(archive: Path) -> None:
    remove_listed(archive)
    add_before(archive)


def remove_folder(archive: Path) -> None:
    shutil.rmtree(archive / "b")


@pytest.mark.parametrize("change", [remove_listed, add_before, remove_and_add, remove_folder])
def test_a_source_that_changes_while_its_listing_is_interrupted_loses_and_doubles_no_image(
    tmp_path: Path, archive: Path, change: Callable[[Path], None]
) -> None:
    table, before = make_table(tmp_path / "out"), image_files(archive)
    with pytest.raises(KeyboardInterrupt):
        make_plan(table, StopsAfter(open_source(SourceConfig(path=str(archive))), 3), 2, 8)
    assert table.parts_in_folder(0) == [0, 1]  # the last of them ends in the middle of b
    change(archive)

    plan_folder_of(table, archive, rows_per_chunk=2)

    planned = planned_ids(table)
    assert len(planned) == len(set(planned))
    assert before & image_files(archive) <= set(planned)


def image_files(archive: Path) -> set[str]:
    return {str(path.relative_to(archive)) for path in archive.rglob("*.jpg")}


def test_an_interrupted_listing_of_another_selection_is_not_taken_over(tmp_path: Path, archive: Path) -> None:
    table, config = make_table(tmp_path / "out"), SourceConfig(path=str(archive), include=["[ab]/*"])
    with pytest.raises(KeyboardInterrupt):
        make_plan(table, StopsAfter(open_source(config), 2), 2, 4, selection="a and b")
    assert table.parts_in_folder(0)

    config = SourceConfig(path=str(archive), include=["[bc]/*"])
    make_plan(table, open_source(config), 2, 4, selection="b and c")

    assert {image_id[0] for image_id in planned_ids(table)} == {"b", "c"}
    assert len(planned_ids(table)) == 20


@pytest.fixture
def unreadable(tmp_path: Path) -> Path:
    """Folders with two images each, and metadata in each that is none: 30 notes."""
    names = [f"{number:02d}/{name}" for number in range(30) for name in ("a.jpg", "b.jpg", "metadata.csv")]
    return make_archive(tmp_path / "unreadable", names)


def test_notes_about_a_source_are_all_kept_and_counted(tmp_path: Path, unreadable: Path) -> None:
    plan = plan_folder_of(make_table(tmp_path / "out"), unreadable)

    assert plan is not None
    assert plan.notes[20:] == ["and 10 more such notes; all are in plan/g000/notes.txt of OUT"]
    lines = (tmp_path / "out/plan/g000/notes.txt").read_text().splitlines()
    assert lines[:20] == plan.notes[:20]
    assert [f"/{number:02d}/metadata.csv" in line for number, line in enumerate(lines)] == [True] * 30
    assert open_table(str(tmp_path / "out")).plans()[0].notes == plan.notes


def test_a_listing_killed_before_its_last_file_keeps_each_note_once(tmp_path: Path, unreadable: Path) -> None:
    make_archive(unreadable, ["zz/metadata.csv", "zz/notes.txt"])
    table = make_table(tmp_path / "out")
    plan_folder_of(table, unreadable)
    before = table.plans()
    (tmp_path / "out/plan/g000/plan.json").unlink()

    plan_folder_of(table, unreadable)

    assert table.plans() == before
    assert before[0].notes[20:] == ["and 11 more such notes; all are in plan/g000/notes.txt of OUT"]


@pytest.mark.parametrize("units", [2, 11, 30])
def test_notes_of_a_listing_that_was_cut_off_are_each_kept_once(tmp_path: Path, unreadable: Path, units: int) -> None:
    whole, cut = make_table(tmp_path / "whole"), make_table(tmp_path / "cut")
    plan_folder_of(whole, unreadable)
    source = open_source(SourceConfig(path=str(unreadable)))
    with pytest.raises(KeyboardInterrupt):
        make_plan(cut, StopsAfter(source, units), 4, 8)

    plan_folder_of(cut, unreadable)

    assert cut.plans() == whole.plans()
    notes = "plan/g000/notes.txt"
    assert (tmp_path / "cut" / notes).read_text() == (tmp_path / "whole" / notes).read_text()


def test_an_empty_source_says_what_was_passed_over(tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "archive", ["notes.txt", ".hidden.jpg"])

    with pytest.raises(SourceError, match=r"no images found; skipped 2 files.*(notes|hidden)"):
        plan_folder_of(make_table(tmp_path / "out"), archive)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_empty_containers_are_named(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "archive"
    make = {"tar": make_tar, "parquet": make_parquet}[kind]
    make(archive / f"empty.{kind}", 0 if kind == "tar" else 1)
    if kind == "parquet":
        pq.write_table(pq.read_table(archive / "empty.parquet").slice(0, 0), archive / "empty.parquet")
    with pytest.raises(SourceError, match=rf"no images found; empty.{kind}: an empty (tar|table): it has no "):
        plan_folder_of(make_table(tmp_path / "none"), archive)
    make(archive / f"full.{kind}", 2)

    plan = plan_folder_of(make_table(tmp_path / "some"), archive)

    assert plan is not None
    assert plan.num_rows == 2
    assert len(plan.notes) == 1
    assert f"empty.{kind}: an empty" in plan.notes[0]


def test_include_exclude_and_limit_choose_what_is_planned(tmp_path: Path, archive: Path) -> None:
    table = make_table(tmp_path / "out")
    plan_folder_of(table, archive, include=["a/*", "b/*"], exclude=["*3.jpg"], limit=15)

    expected = [f"{folder}/{number:03d}.jpg" for folder in ("a", "b") for number in range(10) if number != 3]
    assert planned_ids(table) == expected[:15]


def test_extending_adds_what_is_new_and_nothing_twice(tmp_path: Path, archive: Path) -> None:
    table = make_table(tmp_path / "out")
    plan_folder_of(table, archive)
    before = planned_ids(table)
    make_archive(archive, ["a/new.jpg", "d/000.jpg"])

    plan = plan_folder_of(table, archive)

    assert plan is not None
    assert (plan.kind, plan.generation, plan.parts) == ("extend", 1, {4: 2})
    assert planned_ids(table) == [*before, "a/new.jpg", "d/000.jpg"]
    assert plan_folder_of(table, archive) is None


def test_a_changed_source_is_counted(tmp_path: Path, archive: Path) -> None:
    table, config = make_table(tmp_path / "out"), SourceConfig(path=str(archive))
    plan_folder_of(table, archive)
    (archive / "a/000.jpg").unlink()
    make_archive(archive, ["a/x.jpg", "a/y.jpg"])

    change = compare_with_source(table, open_source(config))

    assert (change.num_new, change.num_gone) == (2, 1)


def test_a_table_refuses_a_directory_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("precious")

    with pytest.raises(OutputError, match="not empty"):
        create_table(str(tmp_path / "out"), {}, [])
    with pytest.raises(OutputError, match="will not delete"):
        create_table(str(tmp_path / "out"), {}, [], overwrite=True)
    with pytest.raises(OutputError, match="holds no captions table"):
        open_table(str(tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.doc").read_text() == "precious"


ids = st.lists(st.text(max_size=6), max_size=60)


@settings(max_examples=60, deadline=None)
@given(added=st.lists(ids, max_size=4), asked=ids, buffered=st.sampled_from([1, 3, 1000]))
def test_the_id_index_is_a_set_in_memory_and_on_disk(added: list[list[str]], asked: list[str], buffered: int) -> None:
    everything = [image_id for batch in added for image_id in batch]
    with IdIndex(buffered) as index:
        for batch in added:
            index.add(batch)
            assert index.contains(batch).all()

        assert len(index.duplicates()) == len({i for i in everything if everything.count(i) > 1})
        assert index.contains(asked).tolist() == [image_id in everything for image_id in asked]


def test_progress_counts_what_is_listed_and_not_what_is_new(tmp_path: Path) -> None:
    config = SourceConfig(path=str(make_archive(tmp_path / "archive", [f"{number}.png" for number in range(12)])))
    table = make_table(tmp_path / "out")
    texts: list[str] = []
    assert make_plan(table, open_source(config), 4, 8, on_progress=texts.append)
    assert texts[-1] == "listing images, 12 listed"

    texts.clear()
    assert make_plan(table, open_source(config), 4, 8, on_progress=texts.append) is None

    assert "reading the ids of planned images, 12 of 12" in texts
    assert texts[-1] == "listing images, 12 listed"
