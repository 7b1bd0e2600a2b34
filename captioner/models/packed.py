"""Layers that are faster on a CPU, for captioning alone: they cannot be trained.

Linear layers have weights in oneDNN's own layout: in float32 1.3 to 3 times as fast as torch's with few rows. torch
computes float32 products by a BLAS that reorders the weight at every call. Here it is reordered once; results differ
only by rounding. The operators are those that torch's own compiler uses when it freezes a model; where a build of torch
lacks them, layers are not replaced.

QuickGELU, the activation of CLIP's vision tower, takes memory once instead of three times; results are equal.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import QuickGELUActivation

ROWS_HINT = 64  # rows of the input; oneDNN's layout hardly depends on it
MIN_WEIGHTS = 1 << 18  # below about 512 x 512 a call to oneDNN costs more than its layout saves


class PackedLinear(nn.Module):
    """A linear layer for inference: [..., in_features] -> [..., out_features], float32 on the CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_HINT)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(values, self.weight, self.bias, "none", [], "")
        return result


class QuickGELU(nn.Module):
    """The activation x * sigmoid(1.702 x), as transformers' QuickGELUActivation, without gradients.

    Computed in place, because the C library returns freed tensors of a few megabytes to the kernel, and the next ones
    cost a page fault for every page.
    """

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return (values * 1.702).sigmoid_().mul_(values)


def replace_quick_gelus(model: nn.Module) -> None:
    """Replace the QuickGELU activations inside `model` by those that take less memory, in place."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is QuickGELUActivation:
                setattr(parent, name, QuickGELU())


def pack_linears(model: nn.Module) -> int:
    """Replace the float32 linear layers inside `model` by packed ones, in place, and return how many were replaced.

    Small layers, subclasses of Linear, quantised weights, and layers on other devices are not replaced.
    """
    linears = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and type(child.weight) is nn.Parameter and _can_be_packed(child.weight)
    ]
    if not linears or not _is_supported():
        return 0
    for parent, name, child in linears:
        setattr(parent, name, PackedLinear(child))
    return len(linears)


def _can_be_packed(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= MIN_WEIGHTS


def _is_supported() -> bool:
    """Return whether this build of torch has the operators, with the results of Linear."""
    if not torch.backends.mkldnn.is_available():
        return False
    linear, values = nn.Linear(16, 8), torch.randn(3, 2, 16)
    try:
        with torch.inference_mode():
            return torch.allclose(PackedLinear(linear)(values), linear(values), atol=1e-5)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
