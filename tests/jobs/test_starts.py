"""Runs as they start elsewhere: under `uv run`, beside foreign modules, without a home and a network, with workers that
die."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder
from ray_jobs.cluster import MONITOR_STARTS
from ray_jobs.failures import first_error

ROOT = Path(__file__).parents[2]
UNNAMED_USER = "54321"  # without an entry in /etc/passwd
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
# Python reads sitecustomize.py at the start of every process, Ray's workers included.
DYING = """
import os, sys

class Dying:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            exec(open(os.environ["HOW"]).read())

if any("default_worker.py" in word for word in sys.orig_argv):
    sys.meta_path.insert(0, Dying())
"""


# Two runs on one Ray, whose workers die in two ways.
DIE_TWICE = """
import os, sys
from pathlib import Path
from ray_jobs.cli import main

images, *hows = sys.argv[1:]
for out, how in enumerate(hows):
    Path(os.environ["HOW"]).write_text(how)
    try:
        main(["caption", images, str(out), "--model", "fake", "--preprocess", "processor"])
    except SystemExit as ended:
        print(f"ended with {ended.code}", file=sys.stderr, flush=True)
"""


def python(
    *words: object, folder: Path, before: Sequence[str] = (), **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder, with a Ray of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RAY_", "XDG_"))}
    environment |= {"PYTHONPATH": str(ROOT), **settings}
    command = [*before, sys.executable, "-P", *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def uv(tmp_path: Path, here: Path) -> list[str]:
    """`uv run`, as far as Ray looks: it searches the processes above it for one of that name. This one runs the rest of
    its command line and nothing else."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/uv"
    program.symlink_to(Path(sys.executable).resolve())
    (here / "run").write_text("import subprocess, sys\nsys.exit(subprocess.call(sys.argv[1:]))\n")
    return [str(program), "run"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with modules of somebody else."""
    (here := tmp_path / "here").mkdir()
    for module in ("numpy", "torch", "PIL", "pyarrow", "captioner"):
        (here / f"{module}.py").write_text("raise ImportError('a module of somebody else')")
    return here


@pytest.fixture
def nobody(tmp_path: Path) -> list[str]:
    """Words before a command that give it a user without a name, where these tests may be anybody; that user may write
    to `tmp_path/theirs`."""
    (tmp_path / "theirs").mkdir()
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        return []
    os.chown(tmp_path / "theirs", int(UNNAMED_USER), int(UNNAMED_USER))
    # Reading everywhere: Python itself may be installed below the home directory of root.
    reading = ("--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search")
    unnamed = ("env", "-u", "USER", "-u", "LOGNAME", "-u", "USERNAME", "-u", "LNAME")
    return [*unnamed, "setpriv", "--reuid", UNNAMED_USER, "--regid", UNNAMED_USER, "--clear-groups", *reading, "--"]


def test_a_job_under_uv_run_beside_foreign_modules_by_a_user_without_name_and_home_connects_to_nobody(
    here: Path, uv: list[str], nobody: list[str], tmp_path: Path
) -> None:
    """All at once, since each start of a Ray takes seconds. Every outbound connection is refused, and none was tried
    but one: Ray asks the link-local address of the machine's own cloud which cloud it is, even with its usage reports
    off."""
    make_folder(tmp_path / "images", 20)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(REFUSE)
    refused = tmp_path / "theirs/refused"
    settings = {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}", "REFUSED_LOG": str(refused)}

    blocked = python("-c", "import socket; socket.create_connection(('192.0.2.1', 9), 1)", folder=here, **settings)
    assert "refused by the test" in blocked.stderr  # the guard works
    refused.unlink()
    words = ("-m", "ray_jobs.caption", "../images", "../theirs/out", "--model", "starter")
    done = python(*words, folder=here, before=[*uv, *nobody], HOME="/nonexistent", **settings)

    assert done.returncode == 0, done.stderr
    assert verify(open_table(str(tmp_path / "theirs/out"))).proven
    tried = set(refused.read_text().split()) if refused.exists() else set()
    assert tried <= CLOUD_METADATA


def test_workers_that_die_at_their_start_end_the_run_with_the_reason(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", 20, width=32)
    (tmp_path / "sitecustomize.py").write_text(DYING)
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HOW": str(tmp_path / "how"), "AT": "captioner.steps"}

    done = python(
        "-c", DIE_TWICE, images, "os.abort()", "raise ImportError('no libfoo')", folder=tmp_path, **environment
    )

    assert done.stdout == ""
    crashed, unable = re.split(r"^ended with 1\n", done.stderr, flags=re.MULTILINE)[:2]
    for log, reason in ((crashed, "its process crashed or was killed"), (unable, "no libfoo")):
        (error,) = [line for line in log.splitlines() if "error" in line.lower()]
        assert reason in error


def test_workers_that_cannot_start_at_all_end_the_run_with_the_reason(tmp_path: Path) -> None:
    """Ray's own start would wait for them."""
    images = make_folder(tmp_path / "images", 20, width=32)
    (tmp_path / "sitecustomize.py").write_text(DYING)
    (tmp_path / "how").write_text("raise ImportError('no libfoo')")
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HOW": str(tmp_path / "how"), "AT": "ray"}

    done = python("-m", "ray_jobs.cli", "caption", images, "out", "--model", "fake", folder=tmp_path, **environment)

    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert "Ray's worker processes cannot start: ImportError: no libfoo; fix it" in error


# Starts a Ray whose clock runs so fast that its own limit of 30 s is over at once. With an argument, its raylet is
# killed as it starts.
CONNECT = """
import sys, time, types
from captioner.config import ClusterConfig
from ray_jobs import cluster

cluster.import_ray(ClusterConfig())
from ray._private import node
node.time = types.SimpleNamespace(**vars(time) | {"monotonic": lambda: 1e6 * time.monotonic()})
if sys.argv[1:]:
    start_raylet = node.Node.start_raylet
    def start_and_kill(self, *arguments, **named):
        start_raylet(self, *arguments, **named)
        self.all_processes["raylet"][0].process.kill()
    node.Node.start_raylet = start_and_kill
print(cluster.connect(ClusterConfig()).num_nodes)
"""
# Makes the agent of the first Ray start too late; a sitecustomize.py, as above.
LATE_AGENT = """
import os, sys, time

if any(word.endswith("dashboard/agent.py") for word in sys.orig_argv):
    try:
        open(os.environ["LATE"], "x").close()
    except FileExistsError:
        pass
    else:
        time.sleep(20)
"""


def test_a_ray_of_this_machine_may_take_longer_to_start_than_ray_waits(tmp_path: Path) -> None:
    done = python("-c", CONNECT, folder=tmp_path)

    assert done.stdout == "1\n", done.stderr


def test_a_ray_whose_agents_start_too_late_is_started_again(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LATE_AGENT)
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "LATE": str(tmp_path / "late")}

    done = python("-c", CONNECT, folder=tmp_path, **environment)

    assert done.stdout == "1\n", done.stderr
    assert "Ray's agents did not start within 15 s, as on a busy machine; starting Ray again" in done.stderr


def test_a_ray_of_which_a_process_ends_at_the_start_is_an_error_that_names_it(tmp_path: Path) -> None:
    done = python("-c", CONNECT, "killed", folder=tmp_path)

    assert done.returncode == 1
    *_, error = done.stderr.splitlines()
    assert "Ray did not start on this machine: Ray's raylet ended with exit code -9 as it started; --local" in error


def test_the_error_that_is_shown_is_the_first_that_is_not_rays_own() -> None:
    text = (
        "ray.exceptions.RaySystemError: System error: x\nTraceback\n  File\nImportError: no libfoo\nKeyError: 'later'"
    )

    assert first_error(text) == "ImportError: no libfoo"
    assert first_error("ray.exceptions.RaySystemError: System error: x\n") == "RaySystemError: System error: x"
    assert first_error("nothing that is an error") == ""


def test_ray_still_has_the_methods_that_a_start_replaces() -> None:
    """Where Ray renames one, runs start with more processes, or a busy machine has Ray's 30 s again."""
    from ray._private import services
    from ray._private.node import Node

    methods = services.get_node, Node.start_ray_processes, Node.dead_processes, Node.kill_all_processes
    assert all(callable(method) for method in methods)
    assert all(callable(getattr(Node, name)) for name in MONITOR_STARTS)
