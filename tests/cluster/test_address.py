"""What answers at a cluster's address is named at once: nobody, another server. A real head is in test_submit.py."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray
from helpers import caption_config

from captioner.errors import ClusterError
from captioner.testing import make_folder
from ray_jobs import address
from ray_jobs.address import check_dashboard, check_gcs
from ray_jobs.caption import run
from ray_jobs.submit import Submission, submit

UNUSED = "127.0.0.1:1"  # a port that the system gives to nobody who asks for any


@contextmanager
def listening(first_words: bytes | None) -> Iterator[str]:
    """A server that writes this to each connection and closes it; None: it only accepts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connections.append(connection)
                if first_words is not None:
                    connection.recv(4096)
                    connection.sendall(first_words)
                    connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in connections:
            connection.close()


@pytest.fixture(scope="module")
def web_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


class StartingHead(BaseHTTPRequestHandler):
    """The dashboard of a head that takes no jobs yet: Ray's agent has not started, or its port is taken."""

    refusals = 1
    submitted: list[str]

    def do_GET(self) -> None:
        self._answer(200, [] if self.path == "/api/jobs/" else {"ray_version": ray.__version__})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.submitted.append(request["submission_id"])
        if len(self.submitted) <= self.refusals:
            self._answer(500, "No available agent to submit job, please try again later.")
        else:
            self._answer(200, {"job_id": None, "submission_id": request["submission_id"]})

    def _answer(self, status: int, answer: object) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def head_that_refuses(refusals: int) -> Iterator[tuple[str, list[str]]]:
    """The address of a head that takes the job after so many refusals, and the ids that it was sent."""
    submitted: list[str] = []
    handler = type("Handler", (StartingHead,), {"refusals": refusals, "submitted": submitted})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", submitted
        server.shutdown()
        thread.join()


def check_both(where: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        check_gcs(where)
    with pytest.raises(ClusterError, match=message):
        check_dashboard(f"http://{where}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:8265", "is the URL of a dashboard, .*give --address HOST:PORT .*usually 127.0.0.1:6379"),
        ("https://head", "is the URL of a dashboard, .*`captioner submit --address https://head`.*usually head:6379"),
        ("ray://head:10001", "Ray Client is not supported"),
    ],
)
def test_a_url_that_cannot_be_joined_is_refused_before_the_source_is_listed(
    url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "images", 1)
    config = caption_config(tmp_path / "images", tmp_path / "out", cluster={"address": url})
    with pytest.raises(ClusterError, match=f"^--address {url}: {message}"):
        run(config)

    monkeypatch.setenv("RAY_ADDRESS", url)
    config = caption_config(tmp_path / "images", tmp_path / "out")
    with pytest.raises(ClusterError, match=f"^RAY_ADDRESS={url}: {message}"):
        run(config)

    assert not (tmp_path / "out/table.json").exists()


def test_nobody_listens() -> None:
    check_both(UNUSED, "nothing listens there")


def test_a_host_that_is_not_known() -> None:
    check_both("head.invalid:6379", "no host 'head.invalid' is known")


def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "TIMEOUT_S", 0.2)
    with listening(None) as where:
        check_both(where, "did not answer within 0.2 s")


@pytest.mark.parametrize("first_words", [b"SSH-2.0-OpenSSH_9.2\r\n", b"-ERR unknown command 'GET'\r\n", b""])
def test_a_server_that_is_not_ray(first_words: bytes) -> None:
    with listening(first_words) as where:
        check_both(where, "is not (Ray|a Ray dashboard)")


def test_a_web_server_is_not_ray(web_server: str) -> None:
    with pytest.raises(ClusterError, match="is not Ray"):
        check_gcs(web_server)


@pytest.mark.parametrize("command", [("caption", "archive", "out", "--model", "starter"), ("doctor",)])
def test_a_command_ends_at_once_where_nobody_listens(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "a.png").touch()
    words = [sys.executable, "-m", "ray_jobs.cli", *command, "--address", UNUSED]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 1
    assert f"error: {UNUSED}: nothing listens there" in done.stderr
    assert "Traceback" not in done.stderr


JOB = Submission(["check", "out"], "captioner-check-1")


def test_a_head_that_takes_no_jobs_yet_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    with head_that_refuses(2) as (url, submitted):
        assert submit(JOB, url, follow=False, pending_timeout=600) == 0

    assert submitted == [JOB.submission_id] * 3
    assert capsys.readouterr().err.splitlines() == [
        f"captioner: {url} takes no jobs yet; waiting up to 120 s for its agent",
        f"captioner: submitted: {JOB.submission_id}",
    ]


def test_a_head_that_never_takes_jobs_is_an_error_that_says_where_to_look() -> None:
    with head_that_refuses(1000) as (url, _), pytest.raises(ClusterError) as stopped:
        submit(JOB, url, follow=False, pending_timeout=0)

    assert str(stopped.value).startswith(f"{url} has taken no job for 0 s: the agent of its head node does not answer")
    assert "dashboard_agent.log" in str(stopped.value)
    assert "--dashboard-agent-listen-port=0" in str(stopped.value)
