"""Choose the device of a worker: the GPU that Ray reserved for it, else the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from captioner.models.devices import pick_device
from ray_jobs.cluster import Resources, Sizes

if TYPE_CHECKING:
    import torch


def device_kind(resources: Resources, sizes: Sizes, device: str) -> str:
    """Return the kind of device that workers compute on, as far as the driver can know. `device`: a --device."""
    if device != "auto":
        return device
    return resources.accelerator if sizes.gpus_per_worker else "cpu"


def worker_device(device: str) -> str:
    """Return the device of this worker. `device`: a --device.

    Ray hides no GPU from workers that reserved none, so with "auto" such a worker takes the CPU. Raises ModelError
    naming the node where torch cannot use the GPU that was reserved.
    """
    import ray

    if device != "auto":
        return device
    if not ray.get_gpu_ids():
        return "cpu"
    return str(pick_device(device, has_gpu=True, node=ray.util.get_node_ip_address()))


def training_device(device: str) -> torch.device:
    """Return `worker_device` for a worker of Ray Train.

    Ray Train shows each worker all GPUs of its node; Ray's `get_device` knows which of them is the worker's own.
    """
    import ray.train.torch

    own = pick_device(worker_device(device))
    return ray.train.torch.get_device() if own.type == "cuda" else own
