"""Byte-equal images are captioned once, and each still has its row."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import caption_config, rows_of
from hypothesis import given
from hypothesis import strategies as st

from captioner import pipeline
from captioner.run.dedupe import CaptionMemory, find_copies
from captioner.sources.copies import with_known_sha256
from captioner.sources.root import Root
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import FakeCaptioner, make_folder
from captioner.testing.faults import Killed, killed_at_write

DISTINCT, COPIES = 12, 3


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, each three times, in an order that puts copies into one chunk and into others."""
    root = make_folder(tmp_path_factory.mktemp("archive"), DISTINCT)
    (root / "metadata.jsonl").unlink()
    for image in sorted(root.glob("*.png")):
        (root / f"{image.stem}-again.png").write_bytes(image.read_bytes())
        (root / f"late-{image.stem}.png").write_bytes(image.read_bytes())
    (root / "broken.png").write_bytes(b"no image")
    return root


class Counting(FakeCaptioner):
    """Counts the images it is asked for; refuses those of `refused`, by their place in the order of asking."""

    def __init__(self, refused: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.asked, self.refused = 0, refused

    def caption(self, pixels):
        if len(pixels) == 1 and self.asked in self.refused:
            self.asked += 1
            raise RuntimeError("refused")
        if self.refused and len(pixels) > 1:
            raise RuntimeError("one at a time")
        self.asked += len(pixels)
        return super().caption(pixels)


@pytest.fixture
def captioner(monkeypatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: counting)
    return counting


def run(archive: Path, out: Path, **output) -> list[dict]:
    pipeline.run(caption_config(archive, out, rows_per_file=8, **output))
    return rows_of(out)


def by_bytes(rows: list[dict]) -> dict[str, list[dict]]:
    by_sha256: dict[str, list[dict]] = {}
    for row in rows:
        if row["status"] == "ok":
            by_sha256.setdefault(row["sha256"], []).append(row)
    return by_sha256


def test_copies_take_the_caption_of_the_one_that_was_captioned(tmp_path, archive, captioner) -> None:
    rows = run(archive, tmp_path / "out")

    assert captioner.asked == DISTINCT
    assert len(rows) == DISTINCT * COPIES + 1
    for same in by_bytes(rows).values():
        (original,) = (row for row in same if row["duplicate_of"] is None)
        assert len(same) == COPIES
        assert {row["duplicate_of"] for row in same} == {None, original["image_id"]}
        assert len({(row["caption"], row["num_tokens"], row["logprob_mean"]) for row in same}) == 1
    assert len({row["chunk_id"] for row in rows}) > 1


def test_the_record_counts_what_was_saved(tmp_path, archive, captioner) -> None:
    run(archive, tmp_path / "out")

    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["counts"]["duplicates"] == DISTINCT * (COPIES - 1)


def test_no_dedupe_captions_every_image(tmp_path, archive, captioner) -> None:
    rows = run(archive, tmp_path / "out", no_dedupe=True)

    assert captioner.asked == DISTINCT * COPIES
    assert {row["duplicate_of"] for row in rows} == {None}


def test_captions_are_the_same_with_and_without(tmp_path, archive) -> None:
    with_, without = run(archive, tmp_path / "with"), run(archive, tmp_path / "without", no_dedupe=True)

    kept = ("image_id", "status", "error_code", "caption", "num_tokens", "fingerprint")
    assert [[row[name] for name in kept] for row in with_] == [[row[name] for name in kept] for row in without]


@pytest.mark.parametrize("write", range(4, 30, 3))
def test_a_killed_run_still_ends_with_each_image_once(tmp_path, archive, write) -> None:
    try:
        with killed_at_write(write):
            pipeline.run(caption_config(archive, tmp_path / "out", rows_per_file=8))
    except Killed:
        pass
    rows = run(archive, tmp_path / "out")

    assert verify(open_table(str(tmp_path / "out"))).proven
    assert len({row["image_id"] for row in rows}) == len(rows) == DISTINCT * COPIES + 1
    assert all(row["duplicate_of"] != row["image_id"] for row in rows)
    assert all(len({row["caption"] for row in same}) == 1 for same in by_bytes(rows).values())


def test_copies_of_what_the_model_refused_fail_like_it(tmp_path, archive, monkeypatch) -> None:
    refusing = Counting(refused=(0,))
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: refusing)

    rows = run(archive, tmp_path / "out")

    failed = [row for row in rows if row["error_code"] == "generate_error"]
    assert {row["sha256"] for row in failed} == {failed[0]["sha256"]}
    assert 1 <= len(failed) <= COPIES
    assert all(row["duplicate_of"] is None and row["caption"] is None for row in failed)


@given(st.lists(st.sampled_from([None, "a", "b", "c", "d"])), st.sets(st.sampled_from("abcd")))
def test_each_place_is_new_or_a_copy_and_nothing_new_twice(sha256s, remembered) -> None:
    memory: CaptionMemory[str] = CaptionMemory()
    for sha256 in remembered:
        memory.add(sha256, f"id of {sha256}", f"caption of {sha256}")

    copies = find_copies(range(len(sha256s)), sha256s, memory)

    assert sorted([*copies.unique, *copies.first_of, *copies.remembered]) == list(range(len(sha256s)))
    captioned = [sha256s[index] for index in copies.unique if sha256s[index]]
    assert len(set(captioned)) == len(captioned)
    assert not set(captioned) & remembered
    assert all(sha256s[index] == sha256s[first] and first < index for index, first in copies.first_of.items())
    assert all(copies.remembered[index][1] == f"caption of {sha256s[index]}" for index in copies.remembered)
    assert find_copies(range(len(sha256s)), sha256s, None).unique == list(range(len(sha256s)))


def test_the_memory_is_bounded_and_forgets_what_was_longest_unused() -> None:
    memory: CaptionMemory[str] = CaptionMemory(limit=2)
    memory.add("a", "1", "x")
    memory.add("b", "2", "y")
    memory.get("a")
    memory.add("c", "3", "z")

    assert len(memory) == 2
    assert memory.get("a") == ("1", "x")
    assert memory.get("b") is None


@pytest.fixture
def manifest(tmp_path, archive) -> Path:
    """The archive as a table of paths that knows each file's sha256, copies far apart."""
    files = sorted(archive.glob("*.png"))
    return write_manifest(tmp_path, files, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def write_manifest(folder: Path, files: list[Path], sha256s: list[str]) -> Path:
    pq.write_table(pa.table({"path": [str(file) for file in files], "sha256": sha256s}), folder / "images.parquet")
    return folder / "images.parquet"


@pytest.fixture
def read(monkeypatch) -> list[bytes]:
    """The files that are read."""
    names: list[bytes] = []
    before = Root.read

    def noted(root: Root, file: bytes, *args):
        names.append(file)
        return before(root, file, *args)

    monkeypatch.setattr(Root, "read", noted)
    return names


def test_a_file_that_the_manifest_knows_as_a_copy_is_not_read(tmp_path, archive, manifest, captioner, read) -> None:
    rows = run(manifest, tmp_path / "out")

    assert captioner.asked == DISTINCT
    assert len(rows) == DISTINCT * COPIES + 1
    for same in by_bytes(rows).values():
        assert {Path(row["uri"]).read_bytes() for row in same} == {Path(same[0]["uri"]).read_bytes()}
        assert len({row["uri"] for row in same}) == len({row["image_id"] for row in same}) == COPIES
    assert len(read) < DISTINCT * COPIES
    assert verify(open_table(str(tmp_path / "out"))).proven


def test_the_table_is_that_of_a_manifest_that_knows_nothing(tmp_path, archive, manifest, read) -> None:
    knowing = run(manifest, tmp_path / "knowing")
    few, read[:] = len(read), []
    every = run(manifest, tmp_path / "every", no_dedupe=True)

    kept = ("image_id", "uri", "sha256", "width", "height", "format", "num_bytes", "status", "error_code", "caption")
    assert [[row[name] for name in kept] for row in knowing] == [[row[name] for name in kept] for row in every]
    assert few < len(read)


def test_a_manifest_that_is_wrong_about_its_files_is_not_believed(tmp_path, archive, captioner) -> None:
    files = sorted(archive.glob("*.png"))
    lie = write_manifest(tmp_path, files, ["0" * 64] * len(files))

    rows = run(lie, tmp_path / "out")

    assert len(by_bytes(rows)) == DISTINCT
    assert all(row["sha256"] == hashlib.sha256(Path(row["uri"]).read_bytes()).hexdigest() for row in rows)
    assert [row["error_code"] for row in rows if row["status"] == "failed"] == ["not_an_image"]


def test_a_copy_of_what_cannot_be_read_is_read_itself(tmp_path, archive, captioner) -> None:
    files = [tmp_path / "gone.png", *sorted(archive.glob("late-*.png"))[:2], tmp_path / "gone too.png"]
    sha256s = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files[1:3]]
    manifest_file = write_manifest(tmp_path, files, [sha256s[0], *sha256s, "not known"])

    rows = run(manifest_file, tmp_path / "out")

    assert sorted((Path(row["uri"]).name, row["error_code"]) for row in rows) == [
        ("gone too.png", "not_found"),
        ("gone.png", "not_found"),
        *((file.name, None) for file in files[1:3]),
    ]


@pytest.mark.parametrize("write", range(4, 30, 5))
def test_a_killed_run_over_such_a_manifest_ends_with_each_image_once(tmp_path, manifest, write) -> None:
    try:
        with killed_at_write(write):
            pipeline.run(caption_config(manifest, tmp_path / "out", rows_per_file=8))
    except Killed:
        pass
    rows = run(manifest, tmp_path / "out")

    assert verify(open_table(str(tmp_path / "out"))).proven
    assert len({row["uri"] for row in rows}) == len(rows) == DISTINCT * COPIES + 1
    assert all(len({row["caption"] for row in same}) == 1 for same in by_bytes(rows).values())


@hypothesis.settings(deadline=None)
@given(st.lists(st.sampled_from([None, "", "not known", "A" * 64, "a" * 64, "b" * 64, "c" * 64])))
def test_copies_are_listed_behind_the_first_and_no_row_is_lost(sha256s) -> None:
    rows = pa.table({"image_id": [str(index) for index in range(len(sha256s))], "told": pa.array(sha256s, pa.string())})

    listed = with_known_sha256(rows, sha256s).to_pylist()

    assert sorted(int(row["image_id"]) for row in listed) == list(range(len(sha256s)))
    assert all(
        row["known_sha256"] == (row["told"].lower() if row["told"] and len(row["told"]) == 64 else None)
        for row in listed
    )
    known_sha256s = [row["known_sha256"] for row in listed]
    for sha256 in set(known_sha256s) - {None}:
        indices = [index for index, other in enumerate(known_sha256s) if other == sha256]
        assert indices == list(range(indices[0], indices[0] + len(indices)))
