"""Connect to Ray, and divide the resources of the cluster between decoding and captioning."""

from __future__ import annotations

import atexit
import ctypes
import logging
import math
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from captioner.config import CaptionConfig, ClusterConfig
from captioner.console.phases import phase
from captioner.console.stopping import notify
from captioner.console.text import counted
from captioner.errors import ClusterError
from ray_jobs.address import check_gcs
from ray_jobs.workers import check_own_workers, job_config, keep_messages

MIN_CPU_SHARE = 0.05
JOIN_TIMEOUT_S = 30.0  # for a cluster that answers
# For a local Ray, which took 23 s on two CPUs with a load of 10, and its first worker (`check_own_workers`).
START_TIMEOUT_S = 240.0
# What Ray's raylet writes before it ends because its agents have not started within 15 s, a constant of Ray 2.60.
LATE_AGENTS = "Timed out waiting for file"
EXIT_TIMEOUT_S = 10.0  # for a Ray that is still starting when the program ends


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of a cluster."""

    num_cpus: float
    num_gpus: float
    num_nodes: int
    least_cpus: float = math.inf  # CPUs of the smallest node that has any
    accelerator: str = "cuda"  # what torch calls the GPUs
    node_gpus: tuple[float, ...] = ()  # of each node; (): one node has all

    def workers_on_gpus(self, gpus: float) -> int:
        """Return how many workers of so many GPUs there is space for.

        The GPUs of a worker are on one node, and a share of less than 1 is of one GPU.
        """
        node_gpus = self.node_gpus or (self.num_gpus,)
        return sum(int(on_node) * int(1 / gpus) if gpus < 1 else int(on_node / gpus) for on_node in node_gpus)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers of workers and decoders, and the resources of each.

    The workers leave at least one CPU for decoding: where the caption actors reserve all CPUs, no image is decoded and
    the run never ends.
    """

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    threads_per_worker: int
    decode_cpus: int
    committers: int  # they wait for the store and reserve no CPU
    max_workers: int = 0  # maximum sizes of the pools; 0: they do not grow
    max_decode_cpus: int = 0
    cpus_per_decoder: float = 1.0

    @property
    def most_workers(self) -> int:
        """The workers of a pool that has grown as far as it may."""
        return max(self.num_workers, self.max_workers)


class _LateAgentsError(ClusterError):
    """A local Ray ended because its agents started late; another start may succeed."""


def connect(config: ClusterConfig) -> Resources:
    """Join the cluster at --address (or of the Ray job this runs in), or start a local one.

    Raises ClusterError naming the address and what answers there.
    """
    return Connection(config).resources()


def _join(config: ClusterConfig) -> Resources:
    address = import_ray(config)
    import ray

    if not ray.is_initialized():
        _init(address)
        if address == "local":
            check_own_workers()
    total = ray.cluster_resources()
    alive = [node for node in ray.nodes() if node["Alive"]]
    cpus = [node["Resources"]["CPU"] for node in alive if node["Resources"].get("CPU")]
    return Resources(
        total.get("CPU", 0),
        total.get("GPU", 0),
        len(alive),
        min(cpus, default=math.inf),
        accelerator_of(total),
        tuple(node["Resources"].get("GPU", 0.0) for node in alive),
    )


def accelerator_of(resources: Iterable[str]) -> str:
    """Return what torch calls the GPUs of a cluster with these resources.

    Ray names each kind of GPU as a resource: "accelerator_type:H100", "accelerator_type:Intel-GPU-Max-1550",
    "accelerator_type:M2-Pro".
    """
    kinds = [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
    if kinds and all(kind.startswith("Intel-GPU") for kind in kinds):
        return "xpu"
    return "mps" if kinds and all(re.match(r"M\d+(-|$)", kind) for kind in kinds) else "cuda"


class Connection:
    """Connects in a thread, since Ray's core waits in C++: other work continues, and signals are handled."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._resources: Future[Resources] | None = None

    def start(self) -> None:
        """Start to connect, unless that was done. Raises ClusterError as `cluster_address` does."""
        cluster_address(self._config)
        if self._resources is None:
            self._resources = Future()
            threading.Thread(target=self._connect, args=(self._resources,), name="connect", daemon=True).start()

    def resources(self) -> Resources:
        """Return the resources of the cluster; wait for the connection. Raises ClusterError as `connect` does."""
        self.start()
        assert self._resources is not None
        address = cluster_address(self._config)
        is_own = address == "local"
        try:
            with phase("starting Ray" if is_own else f"connecting to Ray at {address}", notify):
                return self._resources.result(START_TIMEOUT_S if is_own else JOIN_TIMEOUT_S)
        except TimeoutError:
            if is_own:
                raise ClusterError(
                    f"Ray did not start on this machine within {START_TIMEOUT_S:g} s; its logs are in "
                    "/tmp/ray/session_latest/logs; --local needs no Ray"
                ) from None
            raise ClusterError(
                f"{address}: Ray answers but could not be joined within {JOIN_TIMEOUT_S:g} s; is this machine one of "
                "the cluster's nodes, and are its ports open? `captioner submit` needs only the dashboard"
            ) from None

    def _connect(self, resources: Future[Resources]) -> None:
        started = time.perf_counter()
        try:
            import_ray(self._config)
            # Runs before Ray's own exit handler, which fails on a Ray that is still starting.
            atexit.register(lambda: wait([resources], timeout=EXIT_TIMEOUT_S))
            total = _join(self._config)
            gpus = f" and {counted(total.num_gpus, 'GPU')}" if total.num_gpus else ""
            notify(
                f"Ray has {counted(total.num_cpus, 'CPU')}{gpus}; connected in {time.perf_counter() - started:.1f} s"
            )
            resources.set_result(total)
        except BaseException as error:
            resources.set_exception(error)
        # A local Ray's processes are killed when the thread that started them ends (PR_SET_PDEATHSIG).
        threading.Event().wait()


def cluster_address(config: ClusterConfig) -> str:
    """Return HOST:PORT, "auto", or "local" where a new Ray is to be started.

    Raises ClusterError for the URL of a dashboard or of Ray Client, neither of which can be joined.
    """
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    given = f"--address {address}" if config.address else f"RAY_ADDRESS={address}"
    if address.startswith("ray://"):
        raise ClusterError(f"{given}: Ray Client is not supported; submit a job to the cluster or give HOST:PORT")
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{given}: is the URL of a dashboard, which takes jobs (`captioner submit --address {address}`); give "
            f"--address HOST:PORT of Ray itself, usually {urlsplit(address).hostname}:6379"
            + ("" if config.address else ", or unset RAY_ADDRESS to start a local Ray")
        )
    return address


def import_ray(config: ClusterConfig) -> str:
    """Import ray with the environment variables that it reads at import; return the address to connect to."""
    address = cluster_address(config)
    if "ray" not in sys.modules:  # it reads these variables when it is imported
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # hides a warning about actor arguments at every start
        # Else ray.init waits, holding Python's lock, for the first worker processes, for ever where they cannot start.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        if address == "local" and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
            _keep_token_private()
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
            # Under `uv run` Ray would upload the current folder and run workers in the copy; a job has its own folder.
            os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray  # noqa: F401

    return address


def _keep_token_private() -> None:
    """Create the token of this user's Rays where Ray does, but readable by this user only.

    The file that Ray creates is readable by everyone with access to the home directory. Where there is no home
    directory to write to, as in many containers, the token is only in the environment of this Ray's processes.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    try:
        file = Path.home() / ".ray" / "auth_token"
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(file, "x", opener=partial(os.open, mode=0o600)) as stream:
            stream.write(secrets.token_hex(32))
        with suppress(PermissionError):  # another user's file
            file.chmod(0o600)
        file.read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: neither HOME nor an entry in /etc/passwd
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _init(address: str) -> None:
    settings: dict[str, Any] = {"address": address, "logging_level": logging.ERROR, "log_to_driver": False}
    is_own = address == "local"
    if is_own:
        settings |= {"num_cpus": max(2, available_cpus()), "include_dashboard": False}
    elif "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        import captioner
        import ray_jobs

        settings["runtime_env"] = {"py_modules": [captioner, ray_jobs]}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # a job has its own
        settings["job_config"] = job_config()
    check_gcs(address)
    keep_messages()
    try:
        with _quiet_stderr(), _own_sigterm(), without_monitors(), longer_start_timeout():
            _start_or_join(settings)
    except Exception as error:  # Ray also raises exceptions of no particular class
        why = " ".join(str(error).split())[:300]
        if is_own:
            raise ClusterError(f"Ray did not start on this machine: {why}; --local needs no Ray") from error
        raise ClusterError(f"Ray at {address!r} cannot be reached: {why}") from error


def _start_or_join(settings: dict[str, Any]) -> None:
    """Call `ray.init`, and once more where a local Ray ended because its agents started late."""
    import ray

    try:
        ray.init(**settings)
    except _LateAgentsError as error:
        notify(f"{error}; starting Ray again")
        ray.shutdown()
        ray.init(**settings)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hide what Ray's C++ core writes to file descriptor 2 when it starts.

    Its errors are raised as exceptions too. What Python code prints meanwhile, in other threads too, is shown.
    """
    descriptor, python_stderr, original = os.dup(2), sys.stderr, sys.__stderr__
    devnull = os.open(os.devnull, os.O_WRONLY)
    if original is not None and python_stderr is original:
        # Not closed here: another thread may still use it.
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=original.encoding, errors=original.errors)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(descriptor, 2)
        sys.stderr = python_stderr
        os.close(devnull)
        os.close(descriptor)


MONITOR_STARTS = "start_monitor", "start_api_server", "start_log_monitor"


@contextmanager
def without_monitors() -> Iterator[None]:
    """Let a Ray that is started here do without its autoscaler, its dashboard's server and its reader of logs.

    It has no nodes to add, no dashboard and no logs to show, but each of the three is a process that takes about a
    second of CPU, and `ray.init` waits for the server. Ray has no setting for that; a Ray without these private methods
    starts with all of its processes.
    """
    from ray._private.node import Node

    with _replaced(Node, dict.fromkeys(MONITOR_STARTS, lambda *_, **__: None)):
        yield


@contextmanager
def longer_start_timeout() -> Iterator[None]:
    """Let a node that is started here take START_TIMEOUT_S to join its Ray, unless one of its processes has ended.

    Ray gives up after 30 s, a constant in `Node.__init__` (Ray 2.60), which a busy machine exceeds. It has no setting
    for that; a Ray without these private names keeps its limit. Raises ClusterError naming the process that has ended.
    """
    from ray._private import services
    from ray._private.node import Node

    get_node: Any = getattr(services, "get_node", None)
    start_processes: Any = getattr(Node, "start_ray_processes", None)
    started: list[tuple[Node, float]] = []  # each node with the time at which it is given up

    def start_and_note(node: Node) -> None:
        started.append((node, time.monotonic() + START_TIMEOUT_S))
        start_processes(node)

    def wait_for_node(*arguments: Any) -> Any:
        while True:
            try:
                return get_node(*arguments)
            except RuntimeError:  # not registered yet
                if not started:  # a node of somebody else
                    raise
                node, deadline = started[-1]
                if time.monotonic() > deadline:
                    raise
                for process_type, process in node.dead_processes():
                    node.kill_all_processes(check_alive=False)  # the others would slow down the next start
                    raise _ended_at_start(node, process_type, process.returncode) from None
                time.sleep(0.1)

    with (
        _replaced(Node, {"start_ray_processes": start_and_note}),
        _replaced(services, {"get_node": wait_for_node}),
    ):
        yield


def _ended_at_start(node: Any, process_type: str, exit_code: int) -> ClusterError:
    log = Path(node.get_logs_dir_path()) / "raylet.out"
    with suppress(OSError):
        if LATE_AGENTS in log.read_text(errors="replace"):
            return _LateAgentsError("Ray's agents did not start within 15 s, as on a busy machine")
    return ClusterError(f"Ray's {process_type} ended with exit code {exit_code} as it started")


@contextmanager
def _replaced(owner: Any, replacements: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace functions of a module or a class for a while, those that it has."""
    originals = {name: getattr(owner, name) for name in replacements if hasattr(owner, name)}
    for name in originals:
        setattr(owner, name, replacements[name])
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the run's handler of SIGTERM, which Ray replaces by one that ends the process without a message.

    Ray's Python part replaces it in the main thread, its C++ part in the thread that connects.
    """
    get_handler, set_handler = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get_handler.restype = set_handler.restype = ctypes.c_void_p
    set_handler.argtypes = [ctypes.c_int, ctypes.c_void_p]
    handler, c_handler = signal.getsignal(signal.SIGTERM), get_handler(signal.SIGTERM)
    yield
    set_handler(signal.SIGTERM, c_handler)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def available_cpus() -> int:
    """Return the number of CPUs that this process may use, which a container or taskset may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_out(
    resources: Resources,
    config: ClusterConfig,
    one_thread: bool = False,
    *,
    device: str = "auto",
    concurrency: int = 0,
) -> Sizes:
    """Return the workers and decoders for a cluster. Raises ClusterError where the settings do not fit it.

    `device`: a --device; workers on the CPU reserve no GPU unless --gpus-per-worker says so. `one_thread`: without a
    GPU the model captions on one thread, about as fast as one CPU decodes. `concurrency`: the model is on servers
    (--endpoint), each of which gets so many requests at once, so that one worker on each node, of one CPU, is enough.
    """
    one_thread = one_thread and not concurrency
    _check_concurrency(config, concurrency)
    if config.gpus_per_worker is None:
        gpus = 1.0 if resources.num_gpus and device != "cpu" else 0.0
        config = config.model_copy(update={"gpus_per_worker": gpus})
    if isinstance(config.num_workers, str) and config.num_workers != "auto":
        return _share_out_growing(resources, config)
    gpus = _gpus_per_worker(resources, config)
    workers = _num_workers(resources, config, gpus, one_thread)
    if concurrency:
        workers = min(workers, concurrency)
    spare = resources.num_cpus - workers if gpus or one_thread or concurrency else resources.num_cpus / 4
    decode = max(1, int(spare)) if config.decode_cpus == "auto" else config.decode_cpus
    per_decoder = min(1.0, resources.least_cpus / 2)
    cpus = int((resources.num_cpus - decode * per_decoder) / workers * 1000) / 1000  # the precision of Ray
    if resources.num_nodes > 1:
        cpus = _fitting_a_node(min(cpus, resources.least_cpus - per_decoder))
    if decode < 1 or cpus < MIN_CPU_SHARE:
        raise ClusterError(
            f"{counted(workers, 'worker')} and {counted(decode, 'decode CPU')} do not fit "
            f"{counted(resources.num_cpus, 'CPU')}; lower --num-workers or --decode-cpus"
        )
    # A large model needs far more CPU time than decoding: it gets a thread on each CPU, also on those of the decoders,
    # which are idle most of the time.
    threads = max(1, round(cpus if gpus or one_thread else cpus + decode * per_decoder / workers))
    cpus = min(cpus, 1.0) if gpus or concurrency else cpus
    return Sizes(workers, cpus, gpus, threads, decode, 1 + workers // 4, cpus_per_decoder=per_decoder)


def sizes_of(config: CaptionConfig, resources: Resources, one_thread: bool = False) -> Sizes:
    """Return `share_out` for a captioning run. Raises ClusterError as it does."""
    model = config.model
    concurrency = model.concurrency if model.endpoint else 0
    return share_out(resources, config.cluster, one_thread, device=model.compute_on, concurrency=concurrency)


def _check_concurrency(config: ClusterConfig, concurrency: int) -> None:
    """Raise ClusterError for a --num-workers of which each has less than one request under way at a model server."""
    numbers = [] if config.num_workers == "auto" else [int(number) for number in str(config.num_workers).split(":")]
    if concurrency and max(numbers, default=0) > concurrency:
        raise ClusterError(
            f"--num-workers {config.num_workers} with --concurrency {concurrency}: each worker has at least one request"
            " under way at each server; lower --num-workers or raise --concurrency"
        )


def _share_out_growing(resources: Resources, config: ClusterConfig) -> Sizes:
    """Return the pools for --num-workers MIN:MAX.

    Nodes may join while the job runs (or only when it requests them), so that missing resources are not an error. A
    worker fits the smallest node and leaves CPUs there for decoding.
    """
    min_workers, max_workers = (int(part) for part in str(config.num_workers).split(":"))
    gpus = config.gpus_per_worker or 0.0
    node = min(resources.least_cpus, resources.num_cpus)
    per_decoder = min(1.0, node / 2) or 1.0
    decoders = max(1, int(node / 4))
    cpus = 1.0 if gpus else max(MIN_CPU_SHARE, node - decoders * per_decoder)
    decode, max_decode = decoders, decoders * max_workers
    if gpus:
        max_decode = max(int(resources.num_cpus), 4 * max_workers)
    if config.decode_cpus != "auto":
        decode = max_decode = config.decode_cpus
    threads = max(1, round(cpus))
    return Sizes(min_workers, cpus, gpus, threads, decode, 1 + max_workers // 4, max_workers, max_decode, per_decoder)


def _fitting_a_node(cpus: float) -> float:
    """Round down to a share that fills a node: whole CPUs, or a whole number of workers per CPU."""
    return float(int(cpus)) if cpus >= 1 or cpus < MIN_CPU_SHARE else int(1000 / math.ceil(1 / cpus)) / 1000


def _num_workers(resources: Resources, config: ClusterConfig, gpus: float, one_thread: bool) -> int:
    max_on_gpus = resources.workers_on_gpus(gpus) if gpus else None
    on_cpus = max(resources.num_nodes, int(resources.num_cpus / 2)) if one_thread else resources.num_nodes
    workers = max_on_gpus or on_cpus if config.num_workers == "auto" else int(config.num_workers)
    if max_on_gpus is not None and workers > max_on_gpus:
        raise ClusterError(
            f"{counted(workers, 'worker')} with {counted(gpus, 'GPU')} each do not fit; the cluster has "
            f"{counted(resources.num_gpus, 'GPU')}{_on_nodes(resources)}"
        )
    return workers


def _gpus_per_worker(resources: Resources, config: ClusterConfig) -> float:
    gpus = config.gpus_per_worker or 0.0
    if gpus > resources.num_gpus:
        raise ClusterError(
            f"--gpus-per-worker {gpus:g}: the cluster has {counted(resources.num_gpus, 'GPU')}; 0 captions on CPUs"
        )
    if gpus and not resources.workers_on_gpus(gpus):
        raise ClusterError(
            f"--gpus-per-worker {gpus:g}: no node has as many GPUs; the cluster has"
            f" {counted(resources.num_gpus, 'GPU')}{_on_nodes(resources)}"
        )
    return gpus


def _on_nodes(resources: Resources) -> str:
    """Return the GPUs of each node, where several nodes have any: ", 2 and 1 on 2 nodes"."""
    numbers = [f"{number:g}" for number in resources.node_gpus if number]
    return f", {' and '.join(numbers)} on {counted(len(numbers), 'node')}" if len(numbers) > 1 else ""
