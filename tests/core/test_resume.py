"""Exactly once, in one process: a run that dies at any write, resumed, ends like an undisturbed one."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import caption_config, contents, with_few_references

from captioner import pipeline
from captioner.config import CaptionConfig
from captioner.console.commands import status
from captioner.errors import (
    ClusterError,
    FingerprintError,
    OutputError,
    SourceError,
    TooManyFailedError,
    UsageError,
)
from captioner.store.directory import Directory
from captioner.store.journal import Journal, Review
from captioner.store.publish import publish
from captioner.store.table import Plan, open_table
from captioner.store.verify import count_rows, verify
from captioner.testing import make_folder
from captioner.testing.faults import Killed, killed_at_write

pytestmark = pytest.mark.usefixtures("tiny_thumbnails")
BAD = {"bad/empty.jpg": b"", "bad/page.jpg": b"<html>no image</html>"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = with_few_references(make_folder(tmp_path_factory.mktemp("archive"), 40))
    for name, data in BAD.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return root


def superseded(out: Path) -> list[dict]:
    """What lies in history/, in the order of the table."""
    parts = [pq.read_table(file) for file in sorted((out / "history/g001").iterdir())]
    return pa.concat_tables(parts).drop_columns(["run_id", "created_at"]).to_pylist()


def with_prompt(config: CaptionConfig, prompt: str) -> CaptionConfig:
    """Another model, as far as a table is concerned."""
    return config.model_copy(update={"model": config.model.model_copy(update={"prompt": prompt})})


def reject(out: Path, image_ids: list[str], decision: str = "rejected") -> None:
    with Journal(Directory(str(out)), "Ada") as journal:
        for image_id in image_ids:
            journal.append(Review(decision, (image_id,), None, "Ada"))


def run_until_killed(config: CaptionConfig, write: int) -> bool:
    """Whether the run lived."""
    try:
        with killed_at_write(write):
            pipeline.run(config)
    except Killed:
        return False
    return True


def run_with_kills(first: CaptionConfig, write: int, again: CaptionConfig | None = None) -> bool:
    """Run, die at the given write, run again; whether the first run lived to its end."""
    lived = run_until_killed(first, write)
    pipeline.run(again or first)
    return lived


def test_a_run_killed_at_any_write_resumes_to_the_same_table(tmp_path: Path, archive: Path) -> None:
    pipeline.run(caption_config(archive, tmp_path / "undisturbed"))
    expected = contents(tmp_path / "undisturbed")
    assert len(expected) == 42
    assert len({row["caption"] for row in expected}) > 20

    write, lived = 0, False
    while not lived:
        write += 1
        out = tmp_path / f"killed-{write}"
        lived = run_with_kills(caption_config(archive, out), write)

        assert verify(open_table(str(out))).proven
        assert contents(out) == expected
    assert write > 15  # table, plan, chunks, parts and records were each written


def test_a_retry_killed_at_any_write_resumes_to_the_same_table(tmp_path: Path, archive: Path) -> None:
    source, finished = make_folder(tmp_path / "archive", 20), tmp_path / "finished"
    whole = (source / "000003.png").read_bytes()
    for name in ("000003.png", "000017.png"):
        (source / name).write_bytes(b"")
    pipeline.run(caption_config(source, finished))
    assert count_rows(open_table(str(finished))).failed_by_reason == {"empty_file": 2}
    before = contents(finished)
    (source / "000003.png").write_bytes(whole)

    write, lived = 0, False
    while not lived:
        write += 1
        out = shutil.copytree(finished, tmp_path / f"killed-{write}")

        lived = run_with_kills(caption_config(source, out, retry_failed=True), write)

        assert verify(open_table(str(out))).proven
        after = contents(out)
        assert [row["image_id"] for row in after] == [row["image_id"] for row in before]
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old["caption"] != new["caption"]]
        assert [(old["status"], new["status"]) for old, new in changed] == [("failed", "ok")]
        superseded = pa.concat_tables(
            open_table(str(out)).directory.read_table(f"history/g001/part-{part:05d}.parquet") for part in (0, 1)
        )
        assert superseded["image_id"].to_pylist() == ["000003.png", "000017.png"]
        assert set(superseded["generation"].to_pylist()) == {0}
    assert write > 5


def test_a_recaptioning_killed_at_any_write_resumes_to_the_same_table(tmp_path: Path, archive: Path) -> None:
    """Weak rows with another model: the one change of fingerprint that a table allows."""

    def recaption(out: Path) -> CaptionConfig:
        return with_prompt(caption_config(archive, out, only="logprob<25% or rejected or failed"), "another")

    finished = tmp_path / "finished"
    pipeline.run(caption_config(archive, finished))
    reject(finished, ["000004.png", "000020.png"])
    pipeline.run(recaption(shutil.copytree(finished, tmp_path / "undisturbed")))
    expected = contents(tmp_path / "undisturbed")
    again = [row for row in expected if row["generation"] == 1]
    assert {"000004.png", "000020.png", *BAD} <= {row["image_id"] for row in again}
    assert 12 <= len(again) <= 14
    assert all(row["caption"].startswith("another ") for row in again if row["status"] == "ok")
    older = superseded(tmp_path / "undisturbed")
    assert [row["image_id"] for row in older] == [row["image_id"] for row in again]

    write, lived = 0, False
    while not lived:
        write += 1
        out = shutil.copytree(finished, tmp_path / f"killed-{write}")
        lived = run_with_kills(recaption(out), write)

        assert verify(open_table(str(out))).proven
        assert contents(out) == expected
        assert superseded(out) == older
    assert write > 15


def test_an_overwrite_killed_at_any_write_never_mixes_tables(tmp_path: Path, archive: Path) -> None:
    small, finished = make_folder(tmp_path / "small", 5), tmp_path / "finished"
    pipeline.run(caption_config(archive, finished))
    write, lived = 0, False
    while not lived:
        write += 1
        out = shutil.copytree(finished, tmp_path / f"killed-{write}")

        lived = run_until_killed(caption_config(small, out, overwrite=True), write)
        pipeline.run(caption_config(small, out, overwrite=not (out / "overwrite.json").exists()))

        assert verify(open_table(str(out))).proven
        assert len(contents(out)) == 5
    assert write > 5


def test_an_overwrite_that_was_cut_off_is_made_good_without_the_flag(tmp_path: Path, archive: Path) -> None:
    small, out = make_folder(tmp_path / "small", 5), tmp_path / "out"
    pipeline.run(caption_config(archive, out))
    write = 1
    while not (out / "overwrite.json").exists():  # until then nothing is deleted
        assert len(contents(out)) == 42
        assert not run_until_killed(caption_config(small, out, overwrite=True), write)
        write += 1
    assert write > 4

    pipeline.run(caption_config(small, out))

    assert len(contents(out)) == 5


class WithoutDevice(pipeline.LocalEngine):
    """An engine that finds no cluster, as with a wrong --address."""

    def device(self) -> str:
        raise ClusterError("nothing listens there")


@pytest.mark.parametrize(
    ("source", "model", "engine", "error"),
    [
        ({"include": ["*.tiff"]}, {}, pipeline.LocalEngine, SourceError),
        ({"path": "twice.csv", "id_column": "id"}, {}, pipeline.LocalEngine, SourceError),
        ({}, {"prompt": "of {year}"}, pipeline.LocalEngine, UsageError),
        ({}, {}, WithoutDevice, ClusterError),
    ],
    ids=["no image", "an id twice", "no such column", "no cluster"],
)
def test_an_overwrite_that_cannot_start_leaves_the_old_table(
    tmp_path: Path, archive: Path, source: dict, model: dict, engine: type, error: type, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    (tmp_path / "twice.csv").write_text(f"id,image\na,{archive}/000000.png\na,{archive}/000001.png\n")
    pipeline.run(caption_config(archive, out))
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    source = {"path": str(archive), **source}

    config = caption_config(archive, out, source=source, model=model, overwrite=True)
    with pytest.raises(error):
        pipeline.run(config, engine(config))

    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == files
    assert verify(open_table(str(out))).proven


def test_an_overwrite_keeps_nothing_of_the_old_table_but_reviews(tmp_path: Path, archive: Path, capsys) -> None:
    out, references = tmp_path / "out", tmp_path / "references.csv"
    references.write_text("path,text\n000000.png,a red circle\n")
    pipeline.run(caption_config(archive, out, check={"references": str(references)}))
    reject(out, ["000001.png"])
    assert {"run.json", "references.json", "checks", "runs", "report"} <= {path.name for path in out.iterdir()}

    pipeline.run(caption_config(make_folder(tmp_path / "small", 5), out, overwrite=True, plan_only=True))

    assert {path.name for path in out.iterdir()} == {"table.json", "plan", "reviews"}
    capsys.readouterr()
    assert status(str(out)) == 0
    assert "latest start" not in capsys.readouterr().out


def test_a_run_that_was_overwritten_publishes_nothing_into_the_new_table(tmp_path: Path, archive: Path) -> None:
    small, out = make_folder(tmp_path / "small", 5), tmp_path / "out"
    run_until_killed(caption_config(archive, out), 14)
    old = open_table(str(out))
    pipeline.run(caption_config(small, out, overwrite=True))
    before = contents(out)

    with pytest.raises(OutputError, match="overwritten by another run"):
        publish(old, Plan(0, "archive", 16, {0: 16}))

    assert contents(out) == before


def test_rerunning_a_finished_job_changes_nothing_and_says_so(tmp_path: Path, archive: Path, capsys) -> None:
    pipeline.run(caption_config(archive, tmp_path / "out"))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/captions").iterdir()}
    capsys.readouterr()

    assert pipeline.run(caption_config(archive, tmp_path / "out")) == 0

    assert "nothing to do" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/captions").iterdir()} == before


def test_an_extended_table_holds_old_and_new(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "archive", 20), tmp_path / "out"
    pipeline.run(caption_config(source, out))
    before = contents(out)
    for number in range(3):
        (source / f"{number}-new.png").write_bytes((source / "000000.png").read_bytes())

    pipeline.run(caption_config(source, out))
    assert len(contents(out)) == 20  # without the flag the plan stays
    pipeline.run(caption_config(source, out, extend=True))

    assert contents(out)[:20] == before
    assert [row["image_id"] for row in contents(out)[20:]] == [f"{n}-new.png" for n in range(3)]
    assert verify(open_table(str(out))).proven


def test_an_extension_with_a_limit_goes_on_and_does_not_grow_with_each_start(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "archive", 24), tmp_path / "out"
    first, more = {"limit": 8}, caption_config(source, out, source={"limit": 6}, extend=True)
    pipeline.run(caption_config(source, out, source=first))
    pipeline.run(more.model_copy(update={"output": more.output.model_copy(update={"plan_only": True})}))

    assert pipeline.run(more) == 0
    assert len(contents(out)) == 14
    assert pipeline.run(more) == 0  # the first six are captioned: six more
    assert len(contents(out)) == 20
    assert verify(open_table(str(out))).proven


def test_what_an_extension_lists_again_is_counted_and_noted_once(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "archive", 2), tmp_path / "out"
    (source / "notes.txt").write_text("no image")
    (source / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for number in range(3):
        shutil.copy(source / "000000.png", source / f"new-{number}.png")
        pipeline.run(caption_config(source, out, extend=out.exists(), max_failed=1.0))

    assert len(open_table(str(out)).plans()) == 3
    record = json.loads((out / "run.json").read_text())
    assert record["counts"]["ignored"] == open_table(str(out)).plans()[0].num_ignored > 0
    assert len(record["notes"]) == len(set(record["notes"])) > 0


def test_another_limit_is_named_as_it_is_given(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "archive", 4), tmp_path / "out"
    pipeline.run(caption_config(source, out, source={"limit": 2}))

    with pytest.raises(OutputError, match=r"was created with --limit 2, not without; give the same, --extend to add"):
        pipeline.run(caption_config(source, out))
    assert pipeline.run(caption_config(source, out, extend=True)) == 0
    assert len(contents(out)) == 4


def test_files_of_another_size_are_refused_where_none_are_added(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "archive", 6), tmp_path / "out"
    pipeline.run(caption_config(source, out, rows_per_file=4))

    with pytest.raises(OutputError, match=r"was created with --rows-per-file 4, not 2; leave it out, or"):
        pipeline.run(caption_config(source, out, rows_per_file=2))
    assert pipeline.run(caption_config(source, out, rows_per_file=50_000)) == 0  # the default
    assert pipeline.run(caption_config(source, out, rows_per_file=2, extend=True)) == 0


def test_another_model_or_source_is_refused(tmp_path: Path, archive: Path) -> None:
    config = caption_config(archive, tmp_path / "out")
    pipeline.run(config)
    other_beams = config.model_copy(update={"model": config.model.model_copy(update={"num_beams": 3})})
    other_source = caption_config(make_folder(tmp_path / "other", 3), tmp_path / "out")

    with pytest.raises(FingerprintError, match=r"--num-beams 1 instead of 3.*--overwrite"):
        pipeline.run(other_beams)
    with pytest.raises(OutputError, match=r"was created from .*--overwrite"):
        pipeline.run(other_source)


def test_a_mistyped_source_of_a_table_is_said_to_be_missing(tmp_path: Path, archive: Path) -> None:
    pipeline.run(caption_config(archive, tmp_path / "out"))

    with pytest.raises(SourceError, match=r"archive2: no such file or directory"):
        pipeline.run(caption_config(tmp_path / "archive2", tmp_path / "out"))


def test_status_says_where_failed_images_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = make_folder(tmp_path / "archive", 3), tmp_path / "out"
    pipeline.run(caption_config(source, out))
    status(str(out))
    assert "names and causes" not in capsys.readouterr().out

    (source / "000003.png").write_bytes(b"")
    pipeline.run(caption_config(source, out, extend=True))
    status(str(out))
    assert f"names and causes of failed images: captioner report {out} --open" in capsys.readouterr().out


def test_a_start_that_planned_nothing_leaves_out_free(tmp_path: Path, archive: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice.csv").write_text(f"image_id,path\na,{archive}/000000.png\na,{archive}/000001.png\n")
    out = tmp_path / "out"
    for source in (tmp_path / "empty", tmp_path / "twice.csv"):
        with pytest.raises(SourceError):
            pipeline.run(caption_config(source, out))
        assert not out.exists()

    out.mkdir()
    with pytest.raises(SourceError):
        pipeline.run(caption_config(tmp_path / "empty", out))
    assert list(out.iterdir()) == []
    assert pipeline.run(caption_config(archive, out)) == 0


def test_a_listing_that_was_interrupted_gives_way_to_another_source(tmp_path: Path, archive: Path) -> None:
    small, out = make_folder(tmp_path / "small", 5), tmp_path / "out"
    assert not run_until_killed(caption_config(archive, out), 4)
    assert list(out.glob("plan/*/part-*"))
    assert not list(out.glob("plan/*/plan.json"))

    assert pipeline.run(caption_config(small, out)) == 0
    assert len(contents(out)) == 5
    with pytest.raises(OutputError, match=r"was (planned|created)"):
        pipeline.run(caption_config(archive, out))


def test_max_failed_keeps_the_table_and_fails_the_run(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(TooManyFailedError, match="2 of 42 images failed"):
        pipeline.run(caption_config(archive, tmp_path / "out", max_failed=0.01))

    assert verify(open_table(str(tmp_path / "out"))).proven


def test_an_archive_without_one_good_image_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive/a.jpg").write_bytes(b"")

    with pytest.raises(TooManyFailedError):
        pipeline.run(caption_config(tmp_path / "archive", tmp_path / "out"))

    assert contents(tmp_path / "out")[0]["error_code"] == "empty_file"


def test_committed_rows_of_an_open_run_can_be_read(tmp_path: Path, archive: Path) -> None:
    run_until_killed(caption_config(archive, tmp_path / "out"), 12)
    table = open_table(str(tmp_path / "out"))
    counts = count_rows(table)

    assert 0 < counts.ok + counts.failed < 42
    assert not verify(table).proven
    assert verify(table).lost == 0


def test_verify_finds_what_was_tampered_with(tmp_path: Path, archive: Path) -> None:
    out = tmp_path / "out"
    pipeline.run(caption_config(archive, out))
    table = open_table(str(out))
    rows = table.directory.read_table("captions/part-00000.parquet")

    table.directory.write_table("captions/part-00000.parquet", pa.concat_tables([rows.slice(1), rows.slice(3, 1)]))
    verification = verify(table)
    assert (verification.lost, verification.doubled, verification.proven) == (1, 1, False)

    table.directory.delete("captions/part-00001.parquet")
    assert verify(table).lost == 1 + 16
