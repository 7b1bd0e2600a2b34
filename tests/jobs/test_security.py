"""The Ray that a run starts for itself lets nobody in who has no token."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

START = """
import sys
from captioner.config import ClusterConfig
from ray_jobs.cluster import connect
connect(ClusterConfig())
import ray
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
JOIN = """
import sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("joined with", ray.cluster_resources()["CPU"], "CPUs")
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a Ray started as `captioner caption` starts it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate("")


def join(address: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_gcs_rpc_server_connect_timeout_s": "3", **settings}
    return subprocess.run(
        [sys.executable, "-c", JOIN, address], env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_token_lets_in(address: str) -> None:
    assert "joined with" in join(address, RAY_AUTH_MODE="token").stdout


@pytest.mark.parametrize(
    "settings", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 64}]
)
def test_no_token_and_a_wrong_one_do_not(address: str, settings: dict[str, str]) -> None:
    refused = join(address, **settings)

    assert refused.returncode != 0
    assert "joined" not in refused.stdout
