"""Checks of the nodes of a cluster: what each has, whether all see OUT, whether torch can use their GPUs."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import platform
import resource
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from captioner.errors import ClusterError
from captioner.files import is_uri
from captioner.models.devices import check_build
from captioner.store.directory import Directory
from ray_jobs.cluster import Sizes
from ray_jobs.failures import cause_of

MISSING = "missing"  # in place of a version
PACKAGES = (
    *("ray", "transformers", "torch", "pyarrow", "pillow", "numpy"),
    *("accelerate", "datasets", "evaluate", "jiwer", "py3langid"),  # not in Ray's images
)


def alive_nodes() -> list[dict[str, Any]]:
    """Return the nodes that are alive, as `ray.nodes()` describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def only_on(node: dict[str, Any]) -> Any:
    """Return the scheduling strategy of tasks that must run on this node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def check_shared(out: Directory, file: str) -> None:
    """Raise ClusterError naming a node that does not see `file` in `out`.

    On a cluster of several nodes a local OUT must be the same directory on each of them, such as an NFS mount. A URI
    needs no check.
    """
    import ray

    nodes = alive_nodes()
    if is_uri(out.location) or len(nodes) < 2:
        return

    def sees_file() -> bool:
        return out.exists(file)

    task = ray.remote(num_cpus=0)(sees_file)
    for node in nodes:
        if not ray.get(task.options(scheduling_strategy=only_on(node)).remote()):
            raise ClusterError(
                f"{out.location} is not shared: node {node['NodeManagerAddress']} does not see it; "
                "give an OUT on shared storage (s3://, gs://, NFS)"
            )


def check_gpu_nodes(device: str, sizes: Sizes) -> None:
    """Raise ModelError naming a node with GPUs whose torch was built for CPUs only, before a worker starts.

    `device`: a --device. Nothing is checked where workers reserve no GPU; other faults of a GPU are found by the
    workers when they start.
    """
    if device == "cpu" or not sizes.gpus_per_worker:
        return
    import ray

    nodes = {node["NodeID"]: node for node in alive_nodes() if node["Resources"].get("GPU")}
    own = ray.get_runtime_context().get_node_id()
    if own in nodes:  # checked in this process: a task would have to start another one
        check_build(device, nodes.pop(own)["NodeManagerAddress"])
    check = ray.remote(num_cpus=0)(check_build)
    calls = [
        check.options(scheduling_strategy=only_on(node)).remote(device, node["NodeManagerAddress"])
        for node in nodes.values()
    ]
    for call in calls:
        try:
            ray.get(call)
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from None
        except ray.exceptions.RayError:
            continue  # the node has left the cluster


def node_facts() -> dict[str, Any]:
    """Return what the doctor asks of the node where this runs.

    Its versions as `versions`, sizes in bytes, `time` in seconds since the epoch.
    """
    versions = {"python": ".".join(platform.python_version_tuple()[:2]), "captioner code": code_digest()}
    return {
        "versions": versions | {package: _version(package) for package in PACKAGES},
        "torchvision": torchvision_problem(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shared_memory": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        "free_disk": shutil.disk_usage("/tmp").free,
        "time": time.time(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return MISSING


def code_digest() -> str:
    """Return the first 8 characters of a hash of the sources of `captioner` and `ray_jobs` in this process.

    A job's sources travel as files, so they have no version.
    """
    import captioner
    import ray_jobs

    digest = hashlib.sha256()
    for package in (captioner, ray_jobs):
        root = Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


def torchvision_problem() -> str:
    """Return why an installed torchvision cannot be used; "" where it can be, or is not installed.

    transformers imports torchvision where it is installed, so one built for another torch keeps models from loading.
    """
    if importlib.util.find_spec("torchvision") is None:
        return ""
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        return f"torchvision {_version('torchvision')} does not fit torch {_version('torch')}: {error}"
    return ""
