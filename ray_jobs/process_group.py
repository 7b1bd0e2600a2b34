"""The torch process group of a training run's workers.

Ray's own `TorchConfig` does the same, but imports torch with its module, also in the process that controls the run, and
delays the start by seconds. And its choice of NCCL is wrong for workers that share a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from ray.train.backend import Backend, BackendConfig

from captioner.console.text import counted
from captioner.errors import ClusterError
from ray_jobs.gpus import training_device
from ray_jobs.workers import reason_of_death

TIMEOUT_S = 1800
MAX_DEATHS = 3  # of workers while they join, one start of all workers after the other


@dataclass
class ProcessGroup(BackendConfig):
    """The configuration with which Ray Train joins the workers in a process group."""

    device: str  # a --device
    kind: str  # the type of that device on the workers
    num_workers: int
    gpus_per_worker: float

    @property
    def backend(self) -> str:
        """The backend of torch.distributed: "nccl" where each worker has a CUDA GPU of its own, else "gloo".

        NCCL refuses two ranks on one GPU. A worker alone never communicates.
        """
        if self.kind == "xpu":
            return "xccl"
        shares_gpu = self.shares_gpu and self.num_workers > 1
        return "nccl" if self.kind == "cuda" and self.gpus_per_worker and not shares_gpu else "gloo"

    @property
    def shares_gpu(self) -> bool:
        return 0 < self.gpus_per_worker < 1

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroupBackend

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        """The context in which Ray Train calls the training function; a part of `BackendConfig`, a developer API."""
        return partial(_on_own_gpu, self.device)


class _ProcessGroupBackend(Backend):
    """Ray Train's controller keeps one for all starts of the workers."""

    share_cuda_visible_devices = True  # NCCL uses direct connections only to GPUs that a worker sees

    def __init__(self) -> None:
        self._deaths = 0  # since the workers last joined

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        import ray.util

        placement_group, address, port = worker_group.execute_single(0, _placement_group_and_free_address)
        try:
            worker_group.execute(_join, backend_config, address, port)
            self._deaths = 0
        except ray.exceptions.RayError as error:
            # Ray Train counts these workers as started, so it does not clean up after this failure, and its controller
            # never gets the group of workers to shut it down. They would keep their CPUs and GPUs, for which the next
            # training of this driver would wait.
            ray.util.remove_placement_group(placement_group)
            self._count_death(error)
            raise

    def _count_death(self, error: Exception) -> None:
        """Raise ClusterError where workers died too often.

        Ray Train starts the workers again for ever where one dies before training begins. Its own limit,
        `controller_failure_limit`, also counts waiting for nodes that are to come, which may take long.
        """
        import ray.exceptions

        if isinstance(error, ray.exceptions.RayActorError):
            self._deaths += 1
            if self._deaths >= MAX_DEATHS:
                raise ClusterError(
                    f"a training worker died {counted(self._deaths, 'time')} while it joined the others: "
                    f"{reason_of_death(error)}; checkpoints are saved; run the same command to continue"
                ) from error


def _placement_group_and_free_address() -> tuple[Any, str, int]:
    """Return Ray's placement group of this worker, and an address and a port at which rank 0 can listen."""
    import socket

    import ray

    with socket.socket() as listener:
        listener.bind(("", 0))
        address, port = ray.util.get_node_ip_address(), listener.getsockname()[1]
    return ray.util.get_current_placement_group(), address, port


def _join(group: ProcessGroup, address: str, port: int) -> None:
    backend, device = group.backend, training_device(group.device)

    import ray.train
    import torch

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    os.environ.update(  # read by accelerate, on which transformers' Trainer stands
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        NODE_RANK=str(context.get_node_rank()),
        ACCELERATE_TORCH_DEVICE=str(device),
    )
    if group.shares_gpu:  # else accelerate would look for a GPU with the number of each worker
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    timeout = timedelta(seconds=TIMEOUT_S)
    torch.distributed.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)


@contextmanager
def _on_own_gpu(device: str) -> Iterator[None]:
    """Make this worker's GPU the current device of the calling thread, which trains. `device`: a --device.

    CUDA keeps a current device for each thread, at first GPU 0, and Ray Train calls the training function in a thread
    of its own. FSDP of torch shards on the current device, whatever the device of the tensors. XPUs need none of this:
    Ray shows each worker only its own.
    """
    own = training_device(device)
    if own.type == "cuda":
        import torch

        torch.cuda.set_device(own)
    yield
