"""The whole job killed with SIGKILL, resumed, and proven: no image lost, none doubled."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import psutil
import pyarrow.parquet as pq
import pytest
from helpers import caption_config, rows_of

from captioner import pipeline
from captioner.console import commands
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import GATE_MARKER, decoder_faults, make_folder, num_committed_chunks

IMAGES, ROWS_PER_FILE = 128, 20  # seven files of a chunk each
# Without GPUs, which are only counted; decoders that need not import torch start in a tenth of the time.
SETTINGS = {"model": {"device": "cpu", "preprocess": "processor"}, "rows_per_file": ROWS_PER_FILE}
DEADLINE_S = 600.0
KILLED_AT_WRITE = """
import sys
from captioner.testing.faults import sigkill_at_write
from ray_jobs.cli import main
with sigkill_at_write(int(sys.argv[1])):
    main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last good image waits at the gate of a job that asks for it (see `gate`)."""
    root = make_folder(tmp_path_factory.mktemp("archive") / "archive", IMAGES, width=32)
    (root / "broken.png").write_bytes(b"no image")
    with (root / f"{IMAGES - 1:06d}.png").open("ab") as last:
        last.write(GATE_MARKER + bytes(root.parent / "gate"))
    return root


@pytest.fixture
def gate(archive: Path) -> Iterator[dict[str, str]]:
    """What the environment of a job needs so that it does not end before it is killed, however fast it is."""
    directory = archive.parent / "gate"
    directory.mkdir(exist_ok=True)
    for name in ("pid", "open"):
        (directory / name).unlink(missing_ok=True)
    yield decoder_faults()
    (directory / "open").touch()  # a decoder that outlives its job ends


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> list[tuple]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    pipeline.run(caption_config(archive, out, **SETTINGS))
    return rows(out)


def rows(out: Path) -> list[tuple]:
    return [(row["image_id"], row["status"], row["caption"], row["chunk_id"]) for row in rows_of(out)]


def start_job(
    archive: Path,
    out: Path,
    *before: str,
    more: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
    stderr: int | None = None,
) -> subprocess.Popen[bytes]:
    """The command line in a process of its own, with a Ray of its own unless `more` has an address.

    `stderr`: None for a file, see `log_of`.
    """
    arguments = ["caption", str(archive), str(out), "--model", "fake", "--device", "cpu", "--preprocess", "processor"]
    # The image at the gate waits for as long as a slow machine takes to come to the kill.
    arguments += ["--rows-per-file", str(ROWS_PER_FILE), "--decode-timeout", f"{DEADLINE_S:g}", *more]
    command = [sys.executable, *before, *arguments] if before else [sys.executable, "-m", "ray_jobs.cli", *arguments]
    with log_of(out).open("wb") as log:
        return subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=log if stderr is None else stderr,
            start_new_session=True,
            env=os.environ | environment,
        )


def log_of(out: Path) -> Path:
    """What a job wrote to standard error."""
    return out.with_name("job.log")


@pytest.fixture
def on_this_ray(ray_instance) -> list[str]:
    """Words for a job on the Ray of these tests."""
    address = ray_instance.get_runtime_context().gcs_address
    return ["--address", address, "--num-workers", "1", "--decode-cpus", "1"]


def wait_for_chunks(job: subprocess.Popen[bytes], out: Path, count: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while num_committed_chunks(out) < count:
        assert job.poll() is None, f"the job ended by itself:\n{log_of(out).read_text(errors='replace')}"
        assert time.monotonic() < deadline, "no chunk was committed"
        time.sleep(0.05)


def kill_tree(job: subprocess.Popen[bytes]) -> None:
    """Driver, raylet, workers: everything at once, as when the machine goes."""
    tree = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    job.wait()


def assert_resumes(archive: Path, out: Path, undisturbed: list[tuple], **changes: bool) -> None:
    """In this process, which takes a fraction of the time. On Ray a run goes on in test_counted_gpus.py."""
    assert pipeline.run(caption_config(archive, out, **SETTINGS, **changes)) == 0
    verification = verify(open_table(str(out)))
    assert (verification.lost, verification.doubled, verification.problems, verification.proven) == (0, 0, [], True)
    assert rows(out) == undisturbed


def test_everything_killed_while_captioning(
    tmp_path: Path,
    archive: Path,
    gate: dict[str, str],
    undisturbed: list[tuple],
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = start_job(archive, tmp_path / "out", environment=gate)
    wait_for_chunks(job, tmp_path / "out", 3)
    assert commands.status(str(tmp_path / "out")) == 0
    assert ": running at" in capsys.readouterr().out
    kill_tree(job)
    assert commands.status(str(tmp_path / "out")) == 0
    assert ": killed before its end" in capsys.readouterr().out
    committed = num_committed_chunks(tmp_path / "out")

    assert 3 <= committed < -(-(IMAGES + 1) // ROWS_PER_FILE)
    assert not verify(open_table(str(tmp_path / "out"))).proven
    assert_resumes(archive, tmp_path / "out", undisturbed)


@pytest.mark.usefixtures("gate")
def test_the_driver_killed_and_restarted_at_once(
    tmp_path: Path, archive: Path, undisturbed: list[tuple], on_this_ray: list[str]
) -> None:
    job = start_job(archive, tmp_path / "out", more=on_this_ray)
    wait_for_chunks(job, tmp_path / "out", 3)
    os.kill(job.pid, signal.SIGKILL)  # its workers live on for a while and may commit late
    job.wait()

    assert_resumes(archive, tmp_path / "out", undisturbed)


def test_the_driver_killed_during_publish(tmp_path: Path, archive: Path, undisturbed: list[tuple]) -> None:
    """In one process: publishing is the same for every engine. The seven chunks are writes of the driver as well."""
    out = tmp_path / "out"
    # Its writes before publishing: table, seven plan parts, plan, the model, two records, chunks.
    job = start_job(archive, out, "-c", KILLED_AT_WRITE, str(1 + 7 + 1 + 1 + 2 + 7 + 3), more=["--local"])
    assert job.wait() == -signal.SIGKILL
    published = len(list(out.glob("captions/*.parquet")))

    assert 0 < published < 7
    assert_resumes(archive, out, undisturbed)


def test_the_driver_killed_while_it_publishes_a_retry(tmp_path: Path, archive: Path) -> None:
    """The failed image is fixed meanwhile: its older row must end in history/, its new one in the table, once."""
    out, ours = tmp_path / "out", tmp_path / "archive"
    shutil.copytree(archive, ours)
    assert pipeline.run(caption_config(ours, out, **SETTINGS)) == 0
    (ours / "broken.png").write_bytes((ours / "000000.png").read_bytes())
    # Before it publishes: two deletes, then plan part, plan, two records, a chunk. Then history, part, published.
    job = start_job(ours, out, "-c", KILLED_AT_WRITE, "9", more=["--retry-failed", "--local"])
    assert job.wait() == -signal.SIGKILL
    assert list(out.glob("history/*/*.parquet"))
    assert not open_table(str(out)).is_published(1)

    assert pipeline.run(caption_config(ours, out, **SETTINGS, retry_failed=True)) == 0
    verification = verify(open_table(str(out)))
    assert (verification.lost, verification.doubled, verification.problems, verification.proven) == (0, 0, [], True)
    assert [row[1] for row in rows(out)] == ["ok"] * (IMAGES + 1)
    assert sum(pq.read_table(file).num_rows for file in out.glob("history/*/*.parquet")) == 1


# Its writes: an empty folder, the new table, seven plan parts, plan, the model, the mark; then it deletes and copies.
@pytest.mark.parametrize(("write", "replaces"), [(6, False), (12, False), (17, True), (27, True)])
def test_the_driver_killed_while_it_overwrites(
    tmp_path: Path, archive: Path, undisturbed: list[tuple], write: int, replaces: bool
) -> None:
    """While it lists, the old table is whole; in the middle of replacing it, the same command without the flag goes on.

    In the end no row of the old table is left.
    """
    out, small = tmp_path / "out", make_folder(tmp_path / "small", 20, seed=1)
    assert pipeline.run(caption_config(small, out, **SETTINGS)) == 0
    before = rows(out)
    job = start_job(archive, out, "-c", KILLED_AT_WRITE, str(write), more=["--overwrite", "--local"])
    assert job.wait() == -signal.SIGKILL

    assert (out / "overwrite.json").exists() == replaces
    if not replaces:
        assert rows(out) == before
        assert verify(open_table(str(out))).proven
    assert_resumes(archive, out, undisturbed, overwrite=not replaces)
    assert not (out / "overwrite").exists()


@pytest.mark.parametrize("line", [b"planned ", b"Ray has "])
@pytest.mark.usefixtures("gate")
def test_a_person_who_presses_ctrl_c_again_and_again_ends_the_job(tmp_path: Path, archive: Path, line: bytes) -> None:
    job = start_job(archive, tmp_path / "out", stderr=subprocess.PIPE)
    assert job.stderr is not None
    while line not in (written := job.stderr.readline()):
        assert written, "the job ended by itself"
    started = psutil.Process(job.pid).children(recursive=True)
    for _ in range(3):
        job.send_signal(signal.SIGINT)

    log = job.stderr.read().decode()
    assert job.wait() == 130
    assert "Traceback" not in log
    assert not psutil.wait_procs(started, timeout=DEADLINE_S)[1]


@pytest.mark.usefixtures("gate")
def test_a_stopped_job_keeps_what_is_committed(
    tmp_path: Path, archive: Path, undisturbed: list[tuple], on_this_ray: list[str]
) -> None:
    """By Ctrl-C; SIGTERM stops the jobs of tests/cluster/test_submit.py."""
    job = start_job(archive, tmp_path / "out", more=on_this_ray)
    wait_for_chunks(job, tmp_path / "out", 1)
    os.kill(job.pid, signal.SIGINT)

    assert job.wait() == 130
    assert open_table(str(tmp_path / "out")).directory.read_json("run.json")["state"].startswith("stopped")
    assert_resumes(archive, tmp_path / "out", undisturbed)
