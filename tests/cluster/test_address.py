"""What answers at a cluster's address is named at once: nobody, another server, a wrong port, version or token."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import ray

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


def test_ports_given_for_each_other(head) -> None:
    with pytest.raises(ClusterError, match="is a Ray dashboard; give the port of the GCS"):
        check_gcs(head.url.removeprefix("http://"))
    with pytest.raises(ClusterError, match="is not the dashboard but Ray's own port"):
        check_dashboard(f"http://{head.gcs}")


def test_the_port_of_ray_client(head) -> None:
    with pytest.raises(ClusterError, match="is not the port of Ray's GCS"):
        check_gcs(head.client_server)


def test_tokens(head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ClusterError, match="needs a token; set RAY_AUTH_MODE=token"):
        check_gcs(head.gcs)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 32)
    with pytest.raises(ClusterError, match="refuses this token"):
        check_gcs(head.gcs)
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    check_gcs(head.gcs)


def test_another_version_of_ray(head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    there = ray.__version__
    monkeypatch.setattr(ray, "__version__", "2.1.0")

    with pytest.raises(ClusterError, match=f"runs Ray {there}, this is Ray 2.1.0"):
        check_gcs(head.gcs)


@pytest.mark.parametrize("command", [("caption", "archive", "out", "--model", "starter"), ("doctor",)])
def test_a_command_ends_at_once_where_nobody_listens(head, command: tuple[str, ...]) -> None:
    where = unused()
    (head.home / "archive").mkdir(exist_ok=True)
    (head.home / "archive" / "a.png").touch()
    process = head.captioner(*command, "--address", where, cwd=head.home)
    log, _ = process.communicate()

    assert process.returncode == 1
    assert f"error: {where}: nothing listens there" in log
    assert "Traceback" not in log
