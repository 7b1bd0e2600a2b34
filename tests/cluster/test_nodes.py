"""Three raylets: shares that fit each node, a pool that grows when a node joins, and a doctor that asks every node."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from captioner.config import ClusterConfig
from captioner.errors import ClusterError
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder
from ray_jobs.cluster import Resources, share_out
from ray_jobs.metrics import STEPS

PICTURES = 1_600  # with a real model: a pool grows where captioning is what takes the time


@pytest.fixture(scope="module")
def grown(head, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A run on two nodes that a third joins: its exit code and log, what was scraped, and the workers it had."""
    root = tmp_path_factory.mktemp("grown")
    archive = make_folder(root / "archive", PICTURES, width=32)
    head.add_node(num_cpus=2)
    words = ["caption", str(archive), str(root / "out"), "--model", "starter", "--device", "cpu"]
    job = head.submit("--", *words, "--num-workers", "1:3")
    head.add_node(num_cpus=2)
    seen = {"metrics": {}, "workers": set(), "out": root / "out"}
    while job.poll() is None:
        for name, value in re.findall(r"^(ray_captioner_\w+\{.*\}) (\S+)$", head.scrape(), re.MULTILINE):
            seen["metrics"][name] = float(value)
        seen["workers"] |= workers(head)
    return seen | {"exit_code": job.returncode, "log": job.stdout.read()}


def workers(head) -> set[tuple[str, str, str]]:
    """(stage, actor, node) of every worker of a run that is alive."""
    actors = head.get_json("/api/v0/actors?detail=1")["data"]["result"]["result"]
    return {
        (actor["class_name"], actor["actor_id"], actor["node_id"])
        for actor in actors
        if "MapBatches" in actor["class_name"] and actor["state"] == "ALIVE"
    }


def test_nodes_that_join_are_used_by_a_pool_that_grows(grown: dict) -> None:
    assert grown["exit_code"] == 0, grown["log"]
    assert verify(open_table(str(grown["out"]))).proven
    assert len({actor for stage, actor, _ in grown["workers"] if "CaptionStage" in stage}) > 1
    assert len({node for _, _, node in grown["workers"]}) > 1


def test_a_running_job_is_counted_on_the_metrics_endpoint(grown: dict) -> None:
    metrics = grown["metrics"]
    ok = sum(value for name, value in metrics.items() if "pictures_total" in name and 'status="ok"' in name)

    assert 0 < ok <= PICTURES
    for name, low, high in (
        ("running_wer", 0, 1),
        ("queue_pictures", 0, PICTURES),
        ("batch_size", 1, 512),
        ("device_busy_share", 0, 1),
        ("chunk_pictures", 1, 512),
    ):
        values = [value for metric, value in metrics.items() if metric.startswith(f"ray_captioner_{name}{{")]
        assert values, name
        assert all(low <= value <= high for value in values), (name, values)
    assert {step for step in STEPS if any(f'step="{step}"' in name for name in metrics)} == set(STEPS)


def test_the_doctor_asks_every_node(head, tmp_path: Path) -> None:
    job = head.submit("--", "doctor", "--model", "starter", "--device", "cpu", "--out", str(tmp_path / "out"))
    log, _ = job.communicate()

    assert job.returncode == 0, log
    assert "everything a run needs is there" in log


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

    found = (sizes.num_workers, sizes.max_workers, sizes.cpus_per_worker, sizes.gpus_per_worker)
    assert (*found, sizes.decode_cpus, sizes.max_decode_cpus) == expected


def test_a_pool_whose_numbers_are_swapped_is_refused() -> None:
    with pytest.raises(ClusterError, match="4:2"):
        share_out(Resources(8, 0, 1, 8), ClusterConfig(num_workers="4:2"))
