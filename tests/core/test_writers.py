"""More than one writer on an OUT: late commits of workers whose driver is dead, and a second driver."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pytest
from helpers import caption_config, contents

from captioner import pipeline
from captioner.errors import FingerprintError, ModelError, OutputError
from captioner.run.job import open_job
from captioner.store.lock import sole_writer
from captioner.store.publish import commit_chunk, publish
from captioner.store.table import CaptionsTable, open_table
from captioner.store.verify import verify
from captioner.testing import make_folder


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "archive", 40)


def captioned_but_not_published(archive: Path, out: Path) -> CaptionsTable:
    """Every chunk committed, none published: where a driver may be when it dies."""
    config = caption_config(archive, out)
    engine = pipeline.LocalEngine(config)
    job = open_job(config, engine, lambda line: None)
    assert len(list(engine.caption_chunks(job.work, job.missing_chunks(job.table.open_plans()[0])))) == 3
    return job.table


def commit_late(table: CaptionsTable, rows: dict[str, pa.Table]) -> None:
    """A worker that was thought dead puts its chunk in place."""
    for chunk in table.plans()[0].chunks():
        commit_chunk(table, chunk, rows[chunk.chunk_id])


def test_a_late_commit_during_and_after_publish_doubles_nothing(tmp_path: Path, archive: Path) -> None:
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    pipeline.run(caption_config(archive, undisturbed))
    table = captioned_but_not_published(archive, out)
    plan = table.plans()[0]
    rows = {chunk.chunk_id: table.directory.read_table(table.chunk_name(chunk.chunk_id)) for chunk in plan.chunks()}

    publish(table, plan, on_part=lambda part: commit_late(table, rows))
    commit_late(table, rows)

    assert contents(out) == contents(undisturbed)
    assert verify(table).proven
    assert pipeline.run(caption_config(archive, out)) == 0
    assert table.committed_chunks(0) == set()  # the next start has cleared them away
    assert contents(out) == contents(undisturbed)
    assert verify(table).proven


class WithoutModel(pipeline.LocalEngine):
    """An engine whose workers cannot load the model."""

    def caption_chunks(self, *_: object) -> NoReturn:
        raise ModelError("the model does not fit")


def test_a_table_without_a_caption_takes_another_model_and_no_late_commit_of_the_first_one(
    tmp_path: Path, archive: Path
) -> None:
    """With other dtypes, prompts, numbers of captions: whatever the start that failed was given."""
    out, done = tmp_path / "out", captioned_but_not_published(archive, tmp_path / "done")
    sampled = caption_config(archive, out, model={"temperature": 1.0, "num_captions": 2})
    with pytest.raises(ModelError):
        pipeline.run(sampled, WithoutModel(sampled))
    before = open_table(str(out))
    with pytest.raises(OutputError, match=r"--only: .* holds no captions yet; run without --only first"):
        pipeline.run(caption_config(archive, out, only="failed"))

    config = caption_config(archive, out, model={"num_beams": 3})
    job = open_job(config, pipeline.LocalEngine(config), lambda line: None)
    for chunk in before.plans()[0].chunks():  # by workers of the first start
        columns = done.directory.read_table(done.chunk_name(chunk.chunk_id))
        before.directory.write_table(before.chunk_name(chunk.chunk_id), columns)
    assert len(job.missing_chunks(job.table.plans()[0])) == before.plans()[0].num_chunks
    with pytest.raises(OutputError, match="was overwritten by another run"):
        before.check_current()
    assert pipeline.run(config) == 0

    table = open_table(str(out))
    assert verify(table).proven
    assert list(table.info["models"]) == [table.info["fingerprint"]]
    assert {row["fingerprint"] for row in contents(out)} == {table.info["fingerprint"]}
    with pytest.raises(FingerprintError):
        pipeline.run(caption_config(archive, out))


def test_a_late_commit_after_an_overwrite_does_not_reach_the_new_table(tmp_path: Path, archive: Path) -> None:
    out = tmp_path / "out"
    table = captioned_but_not_published(archive, out)
    plan = table.plans()[0]
    rows = {chunk.chunk_id: table.directory.read_table(table.chunk_name(chunk.chunk_id)) for chunk in plan.chunks()}
    small = make_folder(tmp_path / "small", 5, seed=1)
    pipeline.run(caption_config(small, out, overwrite=True))
    expected = contents(out)

    for chunk in plan.chunks():
        commit_chunk(table, chunk, rows[chunk.chunk_id])

    assert contents(out) == expected
    assert verify(open_table(str(out))).proven


def test_a_second_driver_on_one_out_is_refused(tmp_path: Path, archive: Path) -> None:
    out = tmp_path / "out"
    holding, done = threading.Event(), threading.Event()

    def first_driver() -> None:
        with sole_writer(str(out)):
            holding.set()
            done.wait()

    thread = threading.Thread(target=first_driver)
    thread.start()
    holding.wait()
    try:
        with pytest.raises(OutputError, match="another run is writing to it"):
            pipeline.run(caption_config(archive, out))
        words = ["caption", str(archive), str(out), "--model", "fake", "--local"]
        second = subprocess.run([sys.executable, "-m", "ray_jobs.cli", *words], capture_output=True, text=True)
    finally:
        done.set()
        thread.join()

    assert second.returncode == 1
    assert "another run is writing to it" in second.stderr
    assert pipeline.run(caption_config(archive, out)) == 0


def test_a_run_that_comes_to_nothing_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be used as a directory"), sole_writer(__file__):
        pass
    with sole_writer(str(tmp_path / "out")):
        assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "out").exists()


def test_an_out_that_can_only_be_read_is_refused(archive: Path) -> None:
    config = caption_config(archive, Path("out"))
    output = config.output.model_copy(update={"path": "hf://datasets/someone/captions"})
    with pytest.raises(OutputError, match="hf:// can only be read"):
        pipeline.run(config.model_copy(update={"output": output}))
