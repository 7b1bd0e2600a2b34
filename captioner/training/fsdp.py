"""Weights, gradients and optimizer states sharded over the workers of a run, by FSDP2 (`fully_shard`) of torch.

Each worker holds a part of every tensor. A layer is whole only while it is computed; during an evaluation all layers
are. Where gradients are accumulated, they are whole until the last batch of a step.
Checkpoints hold whole tensors, so they do not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.git.modeling_git import GitLayer

from captioner.training.git_layers import text_layer


def shard(loss: Any, device: torch.device, world_size: int, bf16: bool) -> None:
    """Shard the network of a CaptionLoss over all workers, in place, and move this worker's part to `device`.

    `bf16`: gather weights in bfloat16; those that are trained and their gradients stay float32.
    """
    dtype = torch.bfloat16 if bf16 else None
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world_size,)),
        # autocast, not FSDP, casts inputs: as in a run that is not sharded
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    # transformers' base class of layers that may be computed again in the backward pass: the right size to gather.
    layers = [layer for layer in loss.network.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        fully_shard(layer, **options)
        if isinstance(layer, GitLayer):
            layer.text_layer = MethodType(text_layer, layer)
            register_fsdp_forward_method(layer, "text_layer")
    fully_shard(loss, **options)
    register_fsdp_forward_method(loss, "start")
    loss.start()
    loss.reshard()
    # With this attribute Trainer leaves placement and gradients to the model.
    loss.is_distributed_loading_by_transformers = True


def is_sharded(module: Any) -> bool:
    return isinstance(module, FSDPModule)


@contextmanager
def gathered(loss: Any, device: torch.device, bf16: bool) -> Iterator[None]:
    """Give each worker all weights of a CaptionLoss within the context, in which workers need not do the same.

    Weights must not change in it.
    """
    if not is_sharded(loss):
        yield
        return
    units = [module for module in loss.modules() if is_sharded(module)]
    loss.set_reshard_after_forward(False)
    for unit in units:
        unit.unshard()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not loss, recurse=False)


def load_sharded(optimizer: Any, file: Path) -> None:
    """Load the state of an optimizer of sharded parameters from a file with whole tensors."""
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in saved["state"].items():
        parameter = parameters[index]
        for name, value in state.items():
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                state[name] = _part_of(value, parameter)
    optimizer.load_state_dict(saved)


def _part_of(value: torch.Tensor, parameter: DTensor) -> torch.Tensor:
    """Return `value`, which every worker has, sharded like `parameter`."""
    # Without a source rank nothing is sent: each worker copies its part.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).clone()
