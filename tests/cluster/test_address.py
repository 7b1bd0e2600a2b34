"""What answers at a cluster's address is named at once: nobody, another server. A real head is in test_submit.py."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from captioner.errors import ClusterError
from ray_jobs import address
from ray_jobs.address import check_dashboard, check_gcs


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


def unused() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def check_both(where: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        check_gcs(where)
    with pytest.raises(ClusterError, match=message):
        check_dashboard(f"http://{where}")


def test_nobody_listens() -> None:
    check_both(unused(), "nothing listens there")


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
    where = unused()
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "a.png").touch()
    words = [sys.executable, "-m", "ray_jobs.cli", *command, "--address", where]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 1
    assert f"error: {where}: nothing listens there" in done.stderr
    assert "Traceback" not in done.stderr
