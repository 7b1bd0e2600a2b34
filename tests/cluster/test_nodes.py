"""Two raylets: shares that fit each node, a pool that grows when a node joins, and a doctor that asks every node."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers import REPORTS_EVERY_S

from captioner.config import ClusterConfig
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import GATE_MARKER, decoder_faults, make_folder
from ray_jobs.cluster import Resources, share_out
from ray_jobs.metrics import STEPS

IMAGES = 160
# With a real model and some beams: a pool grows where captioning is what takes the time.
SLOW_MODEL = ["--model", "starter", "--num-beams", "3"]
DEADLINE_S = 1200.0
METRICS = [  # name, lowest and highest value
    ("running_wer", 0, 1),
    ("queue_pictures", 0, IMAGES),
    ("batch_size", 1, 512),
    ("device_busy_share", 0, 1),
    ("chunk_pictures", 1, 512),
]


@dataclass
class Observed:
    """What was seen of a run, and how it ended."""

    out: Path
    metrics: dict[str, float] = field(default_factory=dict)
    workers: set[tuple[str, str, str]] = field(default_factory=set)
    exit_code: int | None = None
    log: str = ""

    def num_workers(self, stage: str) -> int:
        return len({actor for name, actor, _ in self.workers if stage in name})

    @property
    def nodes(self) -> set[str]:
        return {node for _, _, node in self.workers}

    def values(self, name: str) -> list[float]:
        """Of a metric, with all its tags."""
        return [value for metric, value in self.metrics.items() if metric.startswith(f"ray_captioner_{name}{{")]

    @property
    def steps(self) -> set[str]:
        return {step for step in STEPS if any(f'step="{step}"' in name for name in self.metrics)}

    @property
    def is_whole(self) -> bool:
        """Whether everything that the tests ask for was seen."""
        measured = all(self.values(name) for name, _, _ in METRICS) and self.steps == set(STEPS)
        return measured and self.num_workers("CaptionStage") > 1 and len(self.nodes) > 1


@pytest.fixture(scope="module")
def grown(head, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """A run on one node that a second joins.

    Its first image waits until Ray Data uses the node, so that there is something to caption then; its last one until
    the run was seen to grow.
    """
    root = tmp_path_factory.mktemp("grown")
    archive, joined, gate = make_folder(root / "archive", IMAGES, width=32), root / "joined", root / "gate"
    for number, waits_at in ((0, joined), (IMAGES - 1, gate)):
        waits_at.mkdir()
        with (archive / f"{number:06d}.png").open("ab") as image:
            image.write(GATE_MARKER + bytes(waits_at))
    flags = [*SLOW_MODEL, "--device", "cpu", "--num-workers", "1:2", "--decode-timeout", "3600"]
    environment = f"PYTHONPATH={decoder_faults()['PYTHONPATH']}"
    job = head.submit("--env", environment, "--", "caption", str(archive), str(root / "out"), *flags)
    head.add_node(num_cpus=2)
    run, deadline = Observed(root / "out"), time.monotonic() + DEADLINE_S
    while job.poll() is None:
        for name, value in re.findall(r"^(ray_captioner_\w+\{.*\}) (\S+)$", head.scrape(), re.MULTILINE):
            run.metrics[name] = float(value)
        run.workers |= workers(head)
        is_late = time.monotonic() > deadline
        # A second decoder needs a CPU of the second node, of which Ray Data learns up to 30 s late.
        if is_late or run.num_workers("DecodeStage") > 1:
            (joined / "open").touch()
        if is_late or run.is_whole:
            (gate / "open").touch()
        time.sleep(REPORTS_EVERY_S)  # each look costs the nodes CPU
    run.exit_code, run.log = job.returncode, job.stdout.read()
    return run


def workers(head) -> set[tuple[str, str, str]]:
    """(stage, actor, node) of every worker that a run had: a pool that has grown gives one back as soon as it can."""
    actors = head.get_json("/api/v0/actors?detail=1")["data"]["result"]["result"]
    return {
        (actor["class_name"], actor["actor_id"], actor["node_id"])
        for actor in actors
        if "MapBatches" in actor["class_name"] and actor["state"] in ("ALIVE", "DEAD") and actor["pid"]
    }


def test_nodes_that_join_are_used_by_a_pool_that_grows(grown: Observed) -> None:
    assert grown.exit_code == 0, grown.log
    assert verify(open_table(str(grown.out))).proven
    assert grown.num_workers("CaptionStage") > 1
    assert len(grown.nodes) > 1


def test_a_running_job_is_counted_on_the_metrics_endpoint(grown: Observed) -> None:
    ok = sum(value for name, value in grown.metrics.items() if "pictures_total" in name and 'status="ok"' in name)

    assert 0 < ok <= IMAGES
    for name, low, high in METRICS:
        values = grown.values(name)
        assert values, name
        assert all(low <= value <= high for value in values), (name, values)
    assert grown.steps == set(STEPS)


def test_the_doctor_asks_every_node(head, tmp_path: Path) -> None:
    job = head.submit("--", "doctor", "--model", "fake", "--device", "cpu", "--out", str(tmp_path / "out"))
    log, _ = job.communicate()

    assert job.returncode == 0, log
    assert "all checks passed" in log


@pytest.mark.parametrize("cpus", [(2, 2, 2), (2, 2, 4), (1, 1, 1), (8, 8), (4, 4, 4, 4), (3, 16)])
@pytest.mark.parametrize("num_workers", ["auto", 4, 5])
def test_workers_fill_nodes_and_leave_one_decoder_its_place(cpus: tuple[int, ...], num_workers) -> None:
    resources = Resources(sum(cpus), 0, len(cpus), min(cpus))
    sizes = share_out(resources, ClusterConfig(num_workers=num_workers))

    free = list(map(float, cpus))
    for _ in range(sizes.num_workers):  # Ray spreads them: each goes where most is free
        free.sort()
        free[-1] -= sizes.cpus_per_worker
    assert min(free) >= -0.01
    assert max(free) >= sizes.cpus_per_decoder - 0.01


@pytest.mark.parametrize(
    ("resources", "cluster", "expected"),
    [
        (Resources(2, 0, 1, 2), {"num_workers": "1:3"}, (1, 3, 1.0, 0.0, 1, 3)),
        (Resources(8, 0, 1, 8), {"num_workers": "2:8", "gpus_per_worker": 1}, (2, 8, 1.0, 1.0, 2, 32)),
        (Resources(16, 2, 2, 8), {"num_workers": "1:4"}, (1, 4, 1.0, 1.0, 2, 16)),
    ],
)
def test_a_pool_that_grows_is_sized_for_nodes_that_are_not_there_yet(
    resources: Resources, cluster: dict, expected: tuple
) -> None:
    sizes = share_out(resources, ClusterConfig(**cluster))

    shares = (sizes.num_workers, sizes.max_workers, sizes.cpus_per_worker, sizes.gpus_per_worker)
    assert (*shares, sizes.decode_cpus, sizes.max_decode_cpus) == expected
