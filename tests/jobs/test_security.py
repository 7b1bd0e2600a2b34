"""The Ray that a run starts for itself lets nobody in who has no token."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_jobs.cluster import _keep_token_private

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
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a user who has never started a Ray."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    """Of a Ray started as `captioner caption` starts it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = str(home)
    with subprocess.Popen(
        [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate("")


def join(address: str, **settings: str) -> subprocess.Popen[str]:
    """A process that tries; what it says ends with how it went."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= settings
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", JOIN, address], env=environment, **pipes)


def test_the_token_lets_in(address: str, home: Path) -> None:
    assert "joined with" in join(address, RAY_AUTH_MODE="token", HOME=str(home)).communicate()[0]


@pytest.mark.usefixtures("address")
def test_the_token_is_for_its_user_alone(home: Path) -> None:
    file = home / ".ray" / "auth_token"

    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(file.read_text()) == 64


def test_a_token_that_others_could_read_is_closed_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("made by Ray")
    _keep_token_private()

    assert (tmp_path / ".ray/auth_token").read_text() == "made by Ray"
    assert stat.S_IMODE((tmp_path / ".ray/auth_token").stat().st_mode) == 0o600


def test_no_token_and_a_wrong_one_do_not(address: str, home: Path) -> None:
    soon = {"HOME": str(home), "RAY_gcs_rpc_server_connect_timeout_s": "3", "RAY_NUM_REDIS_GET_RETRIES": "2"}
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 64}
    without = {"RAY_AUTH_MODE": "disabled"}
    tries = [join(address, **soon, **settings) for settings in (without, wrong)]

    for attempt in tries:
        shown, log = attempt.communicate()
        assert "joined" not in shown
        assert attempt.returncode != 0
        assert "uthenticat" in log
