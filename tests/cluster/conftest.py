"""Real clusters on this machine: `ray start --head` with its dashboard and token authentication, and several raylets of
which one can die."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from helpers import REPORTS_EVERY_S, STARTED_WITHIN_S, ray_start_lock, started_in_time

from captioner.testing import decoder_faults


@dataclass
class Head:
    """A running head. `environment` is what a process needs to reach it; `url` its dashboard's."""

    url: str
    gcs: str
    client_server: str
    metrics_ports: list[int]
    token: str
    home: Path
    environment: dict[str, str]
    raylets: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def scrape(self) -> str:
        """What every node's Prometheus endpoint shows now."""
        pages = []
        for port in self.metrics_ports:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
                pages.append(page.read().decode())
        return "\n".join(pages)

    def num_nodes(self) -> int:
        nodes = self.get_json("/nodes?view=summary")["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def get_json(self, path: str) -> dict:
        request = urllib.request.Request(self.url + path, headers=self.headers)
        with urllib.request.urlopen(request, timeout=60) as page:
            return json.load(page)

    def client(self):
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.url, headers=self.headers)

    def captioner(self, *words: str, **options) -> subprocess.Popen[str]:
        """The command line in a process of its own, outside the cluster."""
        command = [sys.executable, "-m", "ray_jobs.cli", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}
        return subprocess.Popen(command, **(pipes | {"env": self.environment} | options))

    def submit(self, *words: str) -> subprocess.Popen[str]:
        return self.captioner("submit", "--address", self.url, *words)

    def add_node(self, num_cpus: int) -> None:
        """Start a raylet and wait until it has joined. A busy GCS may be too late for one: then it is tried again."""
        with ray_start_lock():
            before, deadline = self.num_nodes(), time.monotonic() + STARTED_WITHIN_S
            raylet = self._start_raylet(num_cpus)
            while self.num_nodes() == before:
                if raylet.poll() is not None:
                    raylet = self._start_raylet(num_cpus)
                assert time.monotonic() < deadline, (self.home / "start.log").read_text()
                time.sleep(0.1)

    def _start_raylet(self, num_cpus: int) -> subprocess.Popen[bytes]:
        (metrics,) = free_ports(1)
        flags = {"address": self.gcs, "num-cpus": num_cpus}
        flags |= {"dashboard-agent-listen-port": 0, "metrics-export-port": metrics}
        environment = self.environment | {"PYTHONPATH": ""}
        self.raylets.append(_ray_start(environment, self.home, *(f"--{key}={value}" for key, value in flags.items())))
        self.metrics_ports.append(metrics)
        return self.raylets[-1]


def free_ports(count: int) -> list[int]:
    """Free now, and likely so until Ray listens there: they are above those of Ray's workers, and below those that the
    system gives to whoever asks for any port."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.randrange(20_000, 32_768)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.add(port)
    return list(ports)


def _ray_start(environment: dict[str, str], home: Path, *flags: str) -> subprocess.Popen[bytes]:
    ray = str(Path(sys.executable).with_name("ray"))
    common = ["--node-ip-address", "127.0.0.1", "--object-store-memory", str(150 * 2**20), "--disable-usage-stats"]
    common += ["--include-log-monitor", "False"]  # what workers print is in the logs of no test
    with (home / "start.log").open("ab") as log:
        return subprocess.Popen(
            [ray, "start", "--block", *common, *flags],
            env=environment,
            cwd=home,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def end_tree(process: subprocess.Popen) -> None:
    """`ray stop` would end every Ray of this machine; these are the processes of this one."""
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        tree = [*parent.children(recursive=True), parent]
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    process.wait()


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """Its two GPUs are only counted: there is no device behind them."""
    home = Path(tempfile.mkdtemp(prefix="cr", dir="/tmp"))  # sockets live below it: their paths must be short
    try:
        with ray_start_lock():
            head, started = _start_head(home)
            deadline = time.monotonic() + STARTED_WITHIN_S
            while not _is_ready(head):
                assert time.monotonic() < deadline, (home / "start.log").read_text()
                if started.poll() is not None:  # Ray gives a node 30 s to join
                    head, started = _start_head(home)
                time.sleep(0.1)
        yield head
    finally:
        for process in [*head.raylets, started]:
            end_tree(process)
        shutil.rmtree(home, ignore_errors=True)


def _start_head(home: Path) -> tuple[Head, subprocess.Popen[bytes]]:
    gcs, dashboard, client, metrics = free_ports(4)
    token = secrets.token_hex(16)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": f"{1000 * REPORTS_EVERY_S}",
        "RAY_worker_niceness": "0",  # by default 15: on a busy CPU the work gets what Ray's other processes leave
        "RAY_prestart_worker_first_driver": "0",  # no job of these tests can use them
        "RAY_JOB_STOP_WAIT_TIME_S": "600",  # until Ray kills a job that was asked to stop, by default 3
    }
    flags = {"port": gcs, "dashboard-port": dashboard, "dashboard-agent-listen-port": 0}
    flags |= {"ray-client-server-port": client, "metrics-export-port": metrics, "num-cpus": 2, "num-gpus": 2}
    settings = ["--dashboard-host", "127.0.0.1", "--temp-dir", str(home / "r")]
    started = _ray_start(
        environment | {"PYTHONPATH": ""},
        home,
        "--head",
        *settings,
        *(f"--{key}={value}" for key, value in flags.items()),
    )
    url, own, of_clients = f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", f"127.0.0.1:{client}"
    return Head(url, own, of_clients, [metrics], token, home, environment), started


def _is_ready(head: Head) -> bool:
    try:
        # The head starts its Ray Client server as a process of its own, which may listen later than the dashboard.
        socket.create_connection(("127.0.0.1", int(head.client_server.split(":")[1])), timeout=60).close()
        return head.num_nodes() > 0
    except (RuntimeError, OSError):
        return False


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    """A head without CPUs and a node of 3. Decoders obey the markers of `captioner.testing`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", decoder_faults()["PYTHONPATH"])
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # as in _start_head
        patch.setenv("RAY_prestart_worker_first_driver", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # of this cluster: nodes that join later must know no other
        import ray
        from ray.cluster_utils import Cluster

        from ray_jobs.cluster import longer_start_timeout

        if ray.is_initialized():
            ray.shutdown()
        memory = 100 * 2**20
        cluster = Cluster()

        def start() -> None:
            without = {"include_dashboard": False, "include_log_monitor": False}
            cluster.add_node(num_cpus=0, object_store_memory=memory, **without)
            cluster.add_node(num_cpus=3, object_store_memory=memory)

        with longer_start_timeout():
            started_in_time(start, cluster.shutdown)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()
