"""What workers compute on: the GPU that Ray reserved for each, else the CPU; and what stops them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from captioner import errors
from captioner.errors import CaptionerError, ClusterError
from captioner.models.devices import check_build, pick_device
from ray_jobs.cluster import Resources, Sizes

if TYPE_CHECKING:
    import torch


def device_kind(resources: Resources, sizes: Sizes, name: str) -> str:
    """Return the kind of device that workers compute on, as far as the driver can know: `name` is a --device."""
    if name != "auto":
        return name
    return resources.accelerator if sizes.gpus_per_worker else "cpu"


def worker_device(name: str) -> str:
    """Return the device for this worker.

    Ray hides no GPU from workers that reserved none, so such a worker takes the CPU unless told otherwise. Raises
    ModelError naming the node where torch cannot use the GPU that was reserved.
    """
    import ray

    if name != "auto":
        return name
    if not ray.get_gpu_ids():
        return "cpu"
    return str(pick_device(name, has_gpu=True, node=ray.util.get_node_ip_address()))


def training_device(name: str) -> torch.device:
    """Return `worker_device` for a worker of Ray Train.

    Ray Train shows each worker all GPUs of its node; `get_device` of Ray knows which of them is the worker's own.
    """
    import ray.train.torch

    device = pick_device(worker_device(name))
    return ray.train.torch.get_device() if device.type == "cuda" else device


def check_gpu_nodes(name: str, sizes: Sizes) -> None:
    """Raise ModelError naming a node with GPUs whose torch was built for CPUs only, before a worker starts.

    Nothing is checked where workers reserve no GPU. What else may be wrong there, each worker finds when it starts.
    """
    if name == "cpu" or not sizes.gpus_per_worker:
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU")
    }
    own = ray.get_runtime_context().get_node_id()
    if own in nodes:  # this process is of that node: no other one has to start
        check_build(name, nodes.pop(own))
    check = ray.remote(num_cpus=0)(check_build)
    calls = [
        check.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(name, address)
        for node, address in nodes.items()
    ]
    for call in calls:
        try:
            ray.get(call)
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from None
        except ray.exceptions.RayError:
            continue  # the node has gone


def cause_of(error: BaseException, prospect: str = "committed rows stay, the same command goes on") -> CaptionerError:
    """The CaptionerError a worker raised, or a ClusterError with the worker's last words and the `prospect`.

    Ray hands over what a stage raised as the text of its traceback only.
    """
    raised = re.findall(r"^captioner\.errors\.(\w+): (.+)$", str(error), re.MULTILINE)
    if raised:
        name, message = raised[-1]
        kind: type[CaptionerError] = getattr(errors, name, CaptionerError)
        return kind(message)
    words = re.findall(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception|Exit)\b.*)$", str(error), re.MULTILINE)
    said = words[0] if words else str(error).strip().splitlines()[-1]
    return ClusterError(f"a worker failed: {said}; {prospect}")
