"""Linear layers in oneDNN's own weight layout: on a CPU, in float32, 1.3 to 3 times as fast as torch's.

torch hands float32 products to a BLAS that reads the weight as it is stored and reorders it at every call. Packed once,
the same product starts at once; results differ by rounding only. The operators are those that torch's own compiler
uses when it freezes a model; where this build of torch lacks them, layers stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn

ROWS_HINT = 64  # the layout oneDNN chooses hardly depends on it
SMALLEST = 1 << 18  # weights; below about 512 x 512 a call to oneDNN costs more than its layout saves


class PackedLinear(nn.Module):
    """`linear` for inference: [..., in_features] -> [..., out_features], float32 on the CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_HINT)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(values, self.weight, self.bias, "none", [], "")
        return result


def pack_linears(model: nn.Module) -> int:
    """Replace the float32 linear layers inside `model` by packed ones, in place; returns how many.

    Small ones, those of subclasses of Linear, and those on other devices are left alone.
    """
    linears = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and _suits(child.weight)
    ]
    if not linears or not _works():
        return 0
    for parent, name, child in linears:
        setattr(parent, name, PackedLinear(child))
    return len(linears)


def _suits(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= SMALLEST


def _works() -> bool:
    """Whether this build of torch has the operators and they give what Linear gives."""
    if not torch.backends.mkldnn.is_available():
        return False
    linear, values = nn.Linear(16, 8), torch.randn(3, 2, 16)
    try:
        with torch.inference_mode():
            return torch.allclose(PackedLinear(linear)(values), linear(values), atol=1e-5)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
