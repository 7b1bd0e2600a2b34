"""Find out what answers at a cluster's address, before Ray waits there for minutes without a message."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from captioner.errors import ClusterError

TIMEOUT_S = 10.0  # for each of: the connection, the first bytes, one call

Protocol = Literal["http", "grpc", "other"]


def check_gcs(address: str) -> None:
    """Raise ClusterError where no Ray of this version can be joined at HOST:PORT, with the reason and what to do.

    Addresses that only Ray can resolve ("auto", "local") and connections with TLS are not checked.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true"):
        return
    protocol, greeting = _greeting(host, int(port), address)
    if protocol == "http" and _is_dashboard(greeting):
        raise ClusterError(
            f"{address} is a Ray dashboard; give the port of the GCS, usually {host}:6379, or "
            f"`captioner submit --address http://{address}`"
        )
    if protocol != "grpc":
        raise ClusterError(f"{address} is not Ray; give the HOST:PORT that `ray start --head` printed")
    _check_version(address, _gcs_version(address))


def check_dashboard(url: str) -> None:
    """Raise ClusterError where no Ray dashboard answers at http://HOST:PORT; https is not checked."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        return
    protocol, _ = _greeting(parts.hostname, parts.port or 80, url)
    if protocol == "grpc":
        raise ClusterError(f"{url} is not the dashboard but Ray's own port; the dashboard is usually at port 8265")
    if protocol == "other":
        raise ClusterError(f"{url} is not a Ray dashboard, usually http://HEAD:8265")


def needs_token(address: str) -> ClusterError:
    """Return the error for a cluster that wants a token, or another one than was given."""
    if read_token() is None:
        return ClusterError(f"{address} needs a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN")
    return ClusterError(f"{address} refuses this token; set RAY_AUTH_TOKEN to the cluster's own")


def read_token() -> str | None:
    """Return the token that Ray would send (see Ray's "token authentication"), or None."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _greeting(host: str, port: int, shown: str) -> tuple[Protocol, bytes]:
    """Return the protocol of a server, and its answer to an HTTP/1.1 request."""
    request = f"GET /api/version HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    try:
        with socket.create_connection((host.strip("[]"), port), TIMEOUT_S) as connection:
            connection.sendall(request)
            answer = connection.recv(4096)
            while len(answer) < 4096 and answer.startswith(b"HTTP/") and (more := connection.recv(4096)):
                answer += more
    except ConnectionRefusedError:
        raise ClusterError(f"{shown}: nothing listens there; is the cluster running, and is the port right?") from None
    except socket.gaierror:
        raise ClusterError(f"{shown}: no host {host!r} is known") from None
    except TimeoutError:
        raise ClusterError(f"{shown} did not answer within {TIMEOUT_S:g} s") from None
    except ConnectionResetError:
        return "other", b""
    except OSError as error:
        raise ClusterError(f"{shown} cannot be reached: {error.strerror or error}") from None
    if answer.startswith(b"HTTP/"):
        return "http", answer
    # An HTTP/2 server sends a SETTINGS frame first: 3 bytes of length, then its type, 4 (RFC 9113, section 3.4).
    return ("grpc" if answer[3:4] == b"\x04" else "other"), answer


def _is_dashboard(greeting: bytes) -> bool:
    return b'"ray_version"' in greeting or b"Missing authentication token" in greeting


def _gcs_version(address: str) -> str:
    """Ask a GCS for its version of Ray. Raises ClusterError where it does not answer, or is none."""
    import grpc

    # The messages that Ray's own processes exchange: no public interface tells the version before joining.
    from ray.core.generated.gcs_service_pb2 import CheckAliveReply, CheckAliveRequest

    token = read_token()
    with grpc.insecure_channel(address) as channel:
        check_alive = channel.unary_unary(
            "/ray.rpc.NodeInfoGcsService/CheckAlive",
            request_serializer=CheckAliveRequest.SerializeToString,
            response_deserializer=CheckAliveReply.FromString,
        )
        try:
            metadata = [("authorization", f"Bearer {token}")] if token else []
            return str(check_alive(CheckAliveRequest(), timeout=TIMEOUT_S, metadata=metadata).ray_version)
        except grpc.RpcError as error:
            code = error.code()
            if code == grpc.StatusCode.UNAUTHENTICATED:
                raise needs_token(address) from None
            if code == grpc.StatusCode.UNIMPLEMENTED:
                raise ClusterError(
                    f"{address} is not the port of Ray's GCS, usually 6379 (10001 is Ray Client's)"
                ) from None
            raise ClusterError(f"{address} did not answer as Ray does: {error.details()}") from None


def _check_version(address: str, version: str) -> None:
    import ray

    if version and version != ray.__version__:
        raise ClusterError(
            f"{address} runs Ray {version}, this is Ray {ray.__version__}; install ray=={version} here, or `captioner "
            "submit` a job, which runs with the cluster's Ray"
        )


def is_refused(message: str) -> bool:
    """Return whether an error of Ray's HTTP client says that a token is missing or wrong."""
    return re.search(r"\b40[13]\b|[Uu]nauthenticated|authentication", message) is not None
