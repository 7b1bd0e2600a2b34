"""`captioner doctor`: check a cluster before a run.

Every check prints one line, `ok`, `note` or `FAIL` with what to do. Checks of nodes run on every node.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from captioner.config import CaptionConfig, ClusterConfig, ModelConfig, check_endpoint_settings
from captioner.console.phases import phase
from captioner.console.stopping import notify
from captioner.console.text import counted, printable
from captioner.errors import ERROR, OK, CaptionerError, UsageError
from captioner.files import absolute, is_uri
from captioner.models.devices import pick_device
from captioner.models.endpoint.api_key import ApiKey
from captioner.models.placement import check_spread
from ray_jobs.cluster import Resources, Sizes, connect, sizes_of
from ray_jobs.gpus import worker_device
from ray_jobs.nodes import MISSING, alive_nodes, node_facts, only_on

MIN_OPEN_FILES = 8_192
MIN_OBJECT_STORE, MIN_FREE_DISK = 100e6, 5e9
MAX_SKEW_S = 5.0
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. `passed`: None for a note, which is neither a success nor a failure."""

    name: str
    passed: bool | None
    message: str

    def __str__(self) -> str:
        return f"{'note' if self.passed is None else 'ok' if self.passed else 'FAIL':<5}{self.name:<12}{self.message}"


def run(config: CaptionConfig, out: str | None) -> int:
    """Print the findings; return exit code 1 where a check failed. Raises UsageError, or ClusterError without Ray."""
    if config.cluster.local:
        raise UsageError("--local: doctor checks the nodes of a Ray cluster; leave it out")
    check_endpoint_settings(config.model)
    failed = 0
    for finding in findings(config, out):
        print(printable(str(finding)), flush=True)
        failed += finding.passed is False
    print(f"{counted(failed, 'check')} failed" if failed else "all checks passed")
    return ERROR if failed else OK


def findings(config: CaptionConfig, out: str | None) -> Iterator[Finding]:
    """Run the checks one after the other."""
    resources = connect(config.cluster)
    yield Finding(
        "cluster",
        True,
        f"{counted(resources.num_nodes, 'node')}, {counted(resources.num_cpus, 'CPU')}, "
        f"{counted(resources.num_gpus, 'GPU')}",
    )
    yield _token()
    driver = node_facts()
    for node, facts, seconds in _on_every_node(node_facts):
        address, ahead = node["NodeManagerAddress"], facts["time"] - (time.time() - seconds / 2)
        yield _versions(address, driver["versions"], facts["versions"])
        yield from _limits(address, facts)
        yield _memory(address, node["Resources"], facts["shared_memory"])
        yield _clock(address, ahead, seconds)
        if node["Resources"].get("GPU") and config.model.compute_on != "cpu":
            yield _on_a_worker("gpu", _see_gpu, config.model.device, num_gpus=1, node=node)
    sizes = _share_out(resources, config)
    yield _sizes(sizes)
    if config.model.endpoint:
        yield from _servers(config.model)
    elif config.model.name:
        gpus = float(resources.num_gpus > 0) if isinstance(sizes, CaptionerError) else sizes.gpus_per_worker
        yield _on_a_worker("model", _caption_one, config.model, config.cluster, num_gpus=gpus)
    if out:
        yield from _writable(absolute(out), resources.num_nodes)


def _token() -> Finding:
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return Finding("access", True, "token authentication is on")
    return Finding("access", None, "token authentication is off: set RAY_AUTH_MODE=token on every node")


def _versions(address: str, driver: dict[str, str], node: dict[str, str]) -> Finding:
    missing = [name for name in driver if node[name] == MISSING]
    if missing:
        return Finding(
            "versions", False, f"node {address}: {', '.join(missing)} not installed; use one image for every node"
        )
    differing = [f"{name} {node[name]} (driver {driver[name]})" for name in driver if node[name] != driver[name]]
    if differing:
        return Finding("versions", False, f"node {address}: {', '.join(differing)}; use one image for every node")
    return Finding("versions", True, f"node {address}: " + ", ".join(f"{name} {node[name]}" for name in driver))


def _limits(address: str, facts: dict[str, Any]) -> Iterator[Finding]:
    files, free = facts["open_files"], facts["free_disk"]
    if 0 <= files < MIN_OPEN_FILES:
        yield Finding("limits", None, f"node {address}: only {files:,} open files; ulimit -n 65536 before ray start")
    else:
        yield Finding("limits", True, f"node {address}: {'unlimited' if files < 0 else format(files, ',')} open files")
    if free < MIN_FREE_DISK:
        yield Finding("disk", None, f"node {address}: {_gigabytes(free)} free in /tmp, where Ray spills and logs")
    if facts["torchvision"]:
        yield Finding(
            "torchvision", False, f"node {address}: {facts['torchvision']}; uninstall it, or install its pair"
        )


def _memory(address: str, resources: dict[str, float], shared: int | None) -> Finding:
    """Blocks between the stages lie in the object store, which lies in /dev/shm (`shared`): Docker gives 64 MB."""
    store = resources.get("object_store_memory", 0.0)
    memory = f"node {address}: memory {_gigabytes(resources.get('memory', 0.0))}, object store {_gigabytes(store)}"
    if store < MIN_OBJECT_STORE:
        return Finding("memory", None, f"{memory}: little; raise --object-store-memory of ray start")
    if shared is not None and shared < store:
        return Finding(
            "memory",
            None,
            f"{memory}, but /dev/shm {_gigabytes(shared)}: Ray uses the disk; raise --shm-size of docker run",
        )
    return Finding("memory", True, memory if shared is None else f"{memory}, /dev/shm {_gigabytes(shared)}")


def _clock(address: str, ahead: float, uncertain: float) -> Finding:
    """`ahead`: seconds that the node's clock is ahead of the driver's, known to half of `uncertain`."""
    if abs(ahead) - uncertain / 2 > MAX_SKEW_S:
        words = "ahead of" if ahead > 0 else "behind"
        return Finding("clock", None, f"node {address}: {abs(ahead):.0f} s {words} the driver's; stores may refuse it")
    return Finding(
        "clock", True, f"node {address}: within {max(1.0, abs(ahead) + uncertain / 2):.0f} s of the driver's"
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _share_out(resources: Resources, config: CaptionConfig) -> Sizes | CaptionerError:
    try:
        return sizes_of(config, resources)
    except CaptionerError as error:
        return error


def _sizes(sizes: Sizes | CaptionerError) -> Finding:
    if isinstance(sizes, CaptionerError):
        return Finding("sizes", False, str(sizes))
    workers = counted(sizes.num_workers, "caption worker")
    grows = f" (up to {sizes.max_workers})" if sizes.max_workers else ""
    gpus = counted(sizes.gpus_per_worker, "GPU") + (" that share the weights" if sizes.gpus_per_worker > 1 else "")
    return Finding(
        "sizes",
        True,
        f"{workers}{grows} with {gpus} and {counted(sizes.cpus_per_worker, 'CPU')} "
        f"each, {counted(sizes.decode_cpus, 'decode worker')}",
    )


def _see_gpu(name: str) -> str:
    """Compute on the GPU that Ray reserved for this task. Raises ModelError where torch cannot use it."""
    import torch

    device = pick_device(worker_device(name))
    torch.ones(1, device=device).item()
    card = torch.get_device_module(device).get_device_properties(device).name if device.type != "mps" else "mps"
    return f"{card}, torch {torch.__version__}"


def _caption_one(model: ModelConfig, cluster: ClusterConfig) -> str:
    """Load the model and caption one grey image; return the times."""
    import numpy as np

    from captioner.models import load, resolve, resolve_dtype

    started = time.perf_counter()
    ref = resolve(model)
    check_spread(ref, cluster)
    device = pick_device(worker_device(model.device))
    ref = resolve_dtype(ref, model.dtype, device.type)
    captioner = load(ref, str(device), model.batch_size, num_gpus=cluster.gpus_for_weights)
    loaded = time.perf_counter()
    shape = (512, 512) if ref.spec.variable_size else (ref.spec.height, ref.spec.width)
    captioner.caption(np.full((1, *shape, 3), 128, np.uint8))
    return f"{model.name} loads in {loaded - started:.1f} s, first caption in {time.perf_counter() - loaded:.2f} s"


def _servers(model: ModelConfig) -> Iterator[Finding]:
    """Send one small image to every model server from every node, and list the models of each."""
    key = ApiKey.from_environment()
    for node, answers, _ in _on_every_node(_ask_servers, model, key):
        for url, problem, message in answers:
            yield Finding("endpoint", not problem, f"node {node['NodeManagerAddress']}: {url} {problem or message}")


def _ask_servers(model: ModelConfig, key: ApiKey) -> list[tuple[str, str, str]]:
    """Return (URL, problem or "", what was answered) for each server."""
    from captioner.models.endpoint.probing import describe_server

    answers = []
    for url in model.endpoint:
        try:
            answers.append((url, "", describe_server(url, model, key)))
        except CaptionerError as error:
            answers.append((url, str(error), ""))
    return answers


def _writable(out: str, num_nodes: int) -> Iterator[Finding]:
    """Write a file into OUT from every node, and check that every node sees the file of the driver."""
    mark = f".doctor-{uuid.uuid4().hex[:8]}"
    try:
        _write(out, mark)
    except Exception as error:  # whatever a store raises
        yield Finding("out", False, f"driver: {_last_line(error)}")
        return
    try:
        for node, problem, _ in _on_every_node(_check_out, out, mark):
            yield Finding("out", not problem, f"node {node['NodeManagerAddress']}: {problem or f'writes into {out}'}")
    finally:
        _delete(out, mark)
    if num_nodes > 1 and not is_uri(out):
        yield Finding("out", None, f"{out} is a local path: it must be one shared file system (NFS) on every node")


def _check_out(out: str, mark: str) -> str:
    """Return why this node cannot use OUT; "" where it can. `mark`: the name of the driver's file there."""
    from captioner.store.directory import Directory

    name = f"{mark}-{uuid.uuid4().hex[:8]}"
    try:
        if not Directory(out).exists(mark):
            return f"{out} is not shared: the driver's file is missing; give s3://, gs:// or NFS"
        _write(out, name)
        _delete(out, name)
    except Exception as error:  # whatever a store raises
        return _last_line(error)
    return ""


def _write(out: str, name: str) -> None:
    from captioner.store.directory import Directory

    Directory(out).write_bytes(name, b"captioner doctor\n")


def _delete(out: str, name: str) -> None:
    from captioner.store.directory import Directory

    directory = Directory(out)
    directory.filesystem.delete_file(directory.path(name))


def _on_every_node(function: Callable[..., Any], *arguments: Any) -> Iterator[tuple[dict[str, Any], Any, float]]:
    """Call a function on every node; yield the node as Ray describes it, the result, and the seconds it took."""
    import ray

    for node in alive_nodes():
        task = ray.remote(num_cpus=0, scheduling_strategy=only_on(node))(function)
        with phase(f"checking node {node['NodeManagerAddress']}", notify):
            ray.get(task.remote(*arguments), timeout=TIMEOUT_S)  # the first call starts a process
            started = time.time()
            result = ray.get(task.remote(*arguments), timeout=TIMEOUT_S)
        yield node, result, time.time() - started


def _on_a_worker(
    name: str, function: Callable[..., str], *arguments: Any, num_gpus: float, node: dict[str, Any] | None = None
) -> Finding:
    """Call a function in a task on `node`, by default on any; its result is the message."""
    import ray

    options: dict[str, Any] = {"num_cpus": 0 if num_gpus else 1, "num_gpus": num_gpus, "max_retries": 0}
    if node is not None:
        options["scheduling_strategy"] = only_on(node)
    where = f"node {node['NodeManagerAddress']}: " if node else ""
    try:
        with phase(f"checking {name} on a worker", notify):
            message = ray.get(ray.remote(**options)(function).remote(*arguments), timeout=TIMEOUT_S)
        return Finding(name, True, where + message)
    except ray.exceptions.GetTimeoutError:
        return Finding(name, False, f"{where}no worker was free within {TIMEOUT_S:g} s")
    except ray.exceptions.RayError as error:
        return Finding(name, False, where + _last_line(error))


def _last_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return re.sub(r"^captioner\.errors\.\w+: ", "", line)[:300]
