"""Nothing leaves the machine: the whole job runs with every outbound connection refused, and none was tried but one:
Ray asks the link-local address of the machine's own cloud which cloud it is, even with its usage reports off."""

import os
import subprocess
import sys
from pathlib import Path

from captioner.testing import make_folder

CLOUD_METADATA = {"169.254.169.254", "metadata.google.internal"}
# Python reads sitecustomize.py at the start of every process, Ray's workers and daemons included.
REFUSE = """
import ipaddress, os, socket
import psutil

OWN = {"localhost", socket.gethostname()}
OWN |= {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}

def refuse(host):
    with open(os.environ["REFUSED_LOG"], "a") as log:
        log.write(f"{host}\\n")
    raise ConnectionRefusedError(f"outbound connection to {host} refused by the test")

def outside(host):
    if host in OWN or host in (None, ""):
        return False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return True
    return not (address.is_loopback or address.is_unspecified)

def guarded(connect):
    def wrapper(self, address, *rest):
        if self.family in (socket.AF_INET, socket.AF_INET6) and self.type & socket.SOCK_STREAM:
            if outside(address[0]):
                refuse(address[0])
        return connect(self, address, *rest)
    return wrapper

def guarded_lookup(lookup):
    def wrapper(host, *rest, **named):
        name = host.decode() if isinstance(host, bytes) else host
        if outside(name):
            refuse(name)
        return lookup(host, *rest, **named)
    return wrapper

socket.socket.connect = guarded(socket.socket.connect)
socket.socket.connect_ex = guarded(socket.socket.connect_ex)
socket.getaddrinfo = guarded_lookup(socket.getaddrinfo)
"""


def test_the_whole_job_makes_no_outbound_connection(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(REFUSE)
    archive, refused = make_folder(tmp_path / "archive", 20), tmp_path / "refused"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RAY_"))}
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "REFUSED_LOG": str(refused)}
    probe = "import socket; socket.create_connection(('192.0.2.1', 9), 1)"

    blocked = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    assert "refused by the test" in blocked.stderr  # the guard works
    refused.unlink()
    command = [
        sys.executable,
        "-m",
        "ray_jobs.cli",
        "caption",
        str(archive),
        str(tmp_path / "out"),
        "--model",
        "starter",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    tried = set(refused.read_text().split()) if refused.exists() else set()
    assert tried <= CLOUD_METADATA
