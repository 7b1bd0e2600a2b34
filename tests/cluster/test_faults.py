"""Workers and nodes that die at a chosen moment: the run ends by itself, no row lost or doubled."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from helpers import caption_config, rows_of

from captioner import pipeline
from captioner.config import CaptionConfig
from captioner.errors import ClusterError
from captioner.run.job import open_job
from captioner.store.table import CaptionsTable, open_table
from captioner.store.verify import verify
from captioner.testing import ABORT_MARKER, GATE_MARKER, HANG_MARKER, GatedDirectory, make_folder
from ray_jobs.caption import RayEngine, run

DEADLINE_S = 600.0
SHARES = {"num_workers": 1, "decode_cpus": 1}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Images of which one waits at the gate while it is decoded."""
    root = make_folder(tmp_path / "archive", 60, width=32)
    (tmp_path / "gate").mkdir()
    first = (root / "000000.png").read_bytes()
    (root / "000020x.png").write_bytes(first + GATE_MARKER + bytes(tmp_path / "gate"))
    return root


def settings(archive: Path, out: Path, decode_timeout: float = 600, **cluster) -> CaptionConfig:
    source, model = {"decode_timeout": decode_timeout}, {"preprocess": "processor"}  # decoders need no torch
    return caption_config(archive, out, source=source, model=model, cluster=cluster or SHARES)


class RunningJob:
    """A captioning run in a thread. `error`: what it ended with."""

    def __init__(self, target: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self._target = target
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._target()
        except BaseException as error:
            self.error = error

    def wait_for_gate(self, gate: Path) -> psutil.Process:
        """The process that waits there."""
        deadline = time.monotonic() + DEADLINE_S
        while not (gate / "pid").exists():
            assert self._thread.is_alive(), f"the job ended early: {self.error!r}"
            assert time.monotonic() < deadline, "nothing came to the gate"
            time.sleep(0.02)
        return psutil.Process(int((gate / "pid").read_text()))

    def end(self) -> None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the job does not end"


def node_of(cluster, process: psutil.Process):
    """The node of the cluster that a worker belongs to."""
    raylet = next(parent.pid for parent in process.parents() if parent.name() == "raylet")
    infos = {node: node.all_processes.get("raylet", []) for node in cluster.list_all_nodes()}
    return next(node for node, raylets in infos.items() if raylet in [info.process.pid for info in raylets])


def assert_whole(archive: Path, out: Path, failures: dict[str, str] | None = None) -> None:
    """Every image has its row; those of `failures`, and no others, failed."""
    rows = rows_of(out)
    failed = {row["image_id"]: row["error_code"] for row in rows if row["status"] == "failed"}
    counts = verify(open_table(str(out)))
    assert (counts.lost, counts.doubled, counts.problems, counts.proven) == (0, 0, [], True)
    assert failed == (failures or {})
    assert len(rows) == 61 + len(failed)
    by_id = {row["image_id"]: row["caption"] for row in rows}
    assert by_id["000020x.png"] == by_id["000000.png"]  # the same pixels
    assert len(set(by_id.values())) > 40


@pytest.mark.usefixtures("cluster")
def test_images_that_crash_or_hang_their_decoder_are_rows_and_the_job_ends_by_itself(
    tmp_path: Path, archive: Path
) -> None:
    (tmp_path / "gate/open").touch()
    first = (archive / "000000.png").read_bytes()
    (archive / "000030x.png").write_bytes(first + ABORT_MARKER)
    (archive / "000040x.png").write_bytes(first + HANG_MARKER)

    assert run(settings(archive, tmp_path / "out", decode_timeout=15)) == 0

    assert_whole(archive, tmp_path / "out", {"000030x.png": "decoder_crashed", "000040x.png": "timeout"})


@pytest.mark.usefixtures("cluster")
def test_a_decoder_actor_killed_while_it_decodes(tmp_path: Path, archive: Path) -> None:
    job = RunningJob(lambda: run(settings(archive, tmp_path / "out")))
    actor = job.wait_for_gate(tmp_path / "gate")
    actor.kill()
    (tmp_path / "gate/open").touch()
    job.end()

    assert job.error is None
    assert_whole(archive, tmp_path / "out")


@pytest.mark.usefixtures("cluster")
def test_a_decoder_actor_that_is_told_to_end(tmp_path: Path, archive: Path) -> None:
    """Ray takes an orderly exit for intended and does not start the actor again: the run stops, and resumes."""
    job = RunningJob(lambda: run(settings(archive, tmp_path / "out")))
    job.wait_for_gate(tmp_path / "gate").terminate()
    (tmp_path / "gate/open").touch()
    job.end()

    assert job.error is None or isinstance(job.error, ClusterError)
    assert pipeline.run(settings(archive, tmp_path / "out")) == 0
    assert_whole(archive, tmp_path / "out")


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_worker_killed_before_and_after_its_rename(tmp_path: Path, archive: Path, moment: str) -> None:
    config = settings(archive, tmp_path / "out")
    (tmp_path / "gate/open").touch()  # of the image
    (tmp_path / "commit").mkdir()
    engine = RayEngine(config)
    job = open_job(config, engine, lambda line: None)
    directory = GatedDirectory(job.table.directory.location, gate=str(tmp_path / "commit"), moment=moment)
    work = replace(job.work, table=CaptionsTable(directory, job.table.info))
    chunks = job.missing_chunks(job.table.open_plans()[0])

    receipts = []
    captioning = RunningJob(lambda: receipts.extend(engine.caption_chunks(work, chunks)))
    captioning.wait_for_gate(tmp_path / "commit").kill()
    (tmp_path / "commit/open").touch()
    captioning.end()

    assert captioning.error is None
    assert sorted(receipt.chunk_id for receipt in receipts) == [chunk.chunk_id for chunk in chunks]
    assert run(config) == 0
    assert_whole(archive, tmp_path / "out")


@pytest.mark.chaos  # three raylets take a minute
@pytest.mark.parametrize("moment", ["decode", "write"])
def test_a_node_that_goes_and_one_that_joins(cluster, tmp_path: Path, archive: Path, moment: str) -> None:
    cluster.add_node(num_cpus=3, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    config = settings(archive, tmp_path / "out", num_workers=4, decode_cpus=2)
    engine = RayEngine(config)
    job = open_job(config, engine, lambda line: None)
    (tmp_path / "commit").mkdir()
    directory = GatedDirectory(job.table.directory.location, gate=str(tmp_path / "commit"))
    gate, other = (tmp_path / "gate", tmp_path / "commit")[:: 1 if moment == "decode" else -1]
    (other / "open").touch()
    work = replace(job.work, table=CaptionsTable(directory, job.table.info))
    chunks = job.missing_chunks(job.table.open_plans()[0])

    captioning = RunningJob(lambda: list(engine.caption_chunks(work, chunks)))
    node = node_of(cluster, captioning.wait_for_gate(gate))
    if node is cluster.head_node:  # a committer takes no CPU and may stand anywhere
        pytest.skip("Ray put the committer on the head, which cannot be removed under its driver")
    cluster.add_node(num_cpus=3, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    cluster.remove_node(node, allow_graceful=False)
    (gate / "open").touch()
    captioning.end()

    assert captioning.error is None
    assert run(settings(archive, tmp_path / "out")) == 0
    assert_whole(archive, tmp_path / "out")


@pytest.mark.chaos  # the shares are computed for such nodes in test_nodes.py
def test_nobody_is_left_without_a_share_on_small_nodes(cluster, tmp_path: Path, archive: Path) -> None:
    """Captioners and decoders of the default settings fit the nodes together: else the run would wait for ever."""
    node = cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    (tmp_path / "gate/open").touch()

    job = RunningJob(lambda: run(settings(archive, tmp_path / "out", num_workers="auto")))
    job.end()
    cluster.remove_node(node)

    assert job.error is None
    assert_whole(archive, tmp_path / "out")
