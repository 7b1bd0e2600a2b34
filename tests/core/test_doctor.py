"""The doctor's findings from the facts of a node."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ray_jobs import doctor
from ray_jobs.nodes import code_digest, node_facts, torchvision_problem

STORE = {"object_store_memory": 6e9, "memory": 14e9}
FINE = {"open_files": 65_536, "free_disk": 50e9, "torchvision": ""}


def test_the_facts_of_a_node_are_complete() -> None:
    facts = node_facts()

    assert facts["versions"]["python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert facts["versions"]["captioner code"] == code_digest()
    assert "missing" not in facts["versions"].values()
    assert facts["free_disk"] > 0
    assert doctor._versions("n", facts["versions"], facts["versions"]).passed


def test_another_version_on_a_node_is_a_failure_that_names_both() -> None:
    here = {"python": "3.11", "ray": "2.60.0"}

    finding = doctor._versions("10.0.0.2", here, here | {"ray": "2.55.0"})

    assert finding.passed is False
    assert "node 10.0.0.2: ray 2.55.0 (driver 2.60.0)" in finding.message


def test_a_package_that_no_node_has_is_a_failure() -> None:
    lacking = {"python": "3.11", "py3langid": "missing"}

    finding = doctor._versions("10.0.0.2", lacking, lacking)

    assert finding.passed is False
    assert "node 10.0.0.2: py3langid not installed" in finding.message


@pytest.mark.parametrize(
    ("resources", "shared", "passed", "message"),
    [
        (STORE, 25_000_000_000, True, "object store 6.0 GB, /dev/shm 25.0 GB"),
        (STORE, None, True, "object store 6.0 GB"),
        (STORE, 64_000_000, None, "/dev/shm 0.1 GB: Ray uses the disk; raise --shm-size"),
        ({}, 25_000_000_000, None, "--object-store-memory"),
    ],
)
def test_little_shared_memory_is_a_remark(
    resources: dict[str, float], shared: int | None, passed: bool | None, message: str
) -> None:
    finding = doctor._memory("n", resources, shared)

    assert finding.passed is passed
    assert message in finding.message


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [("limits", True)]),
        ({"open_files": -1}, [("limits", True)]),
        ({"open_files": 1_024}, [("limits", None)]),
        ({"free_disk": 1e9}, [("limits", True), ("disk", None)]),
        ({"torchvision": "torchvision 0.1 does not fit"}, [("limits", True), ("torchvision", False)]),
    ],
)
def test_limits_of_a_node(changed: dict, expected: list[tuple[str, bool | None]]) -> None:
    assert [(finding.name, finding.passed) for finding in doctor._limits("n", FINE | changed)] == expected


@pytest.mark.parametrize(
    ("ahead", "uncertain", "passed"), [(0.1, 0.2, True), (-60, 1, None), (60, 1, None), (8, 9, True)]
)
def test_a_clock_that_is_surely_off_is_a_remark(ahead: float, uncertain: float, passed: bool | None) -> None:
    finding = doctor._clock("n", ahead, uncertain)

    assert finding.passed is passed
    assert ("behind" in finding.message) == (ahead < -10)


def test_a_torchvision_that_does_not_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text('raise RuntimeError("operator nms does not exist")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)

    assert torchvision_problem().endswith("operator nms does not exist")
