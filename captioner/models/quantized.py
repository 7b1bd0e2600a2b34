"""Weights of 8 or 4 bits (--quantize), made while they are loaded, through the quantisers of transformers.

Only the weights of linear layers get fewer bits; embeddings, the output layer, convolutions and norms keep --dtype.
int8 is one scale for each row of a weight (torchao), int4 is NF4, one scale for 64 values (bitsandbytes). Products are
computed in --dtype, so that the caption of an image does not depend on the other images of its batch.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from captioner.config import ModelConfig
from captioner.errors import ModelError, UsageError
from captioner.models.families import family_of

if TYPE_CHECKING:
    import torch

PACKAGES = {"int8": "torchao", "int4": "bitsandbytes"}
BYTES_OF_WEIGHT = {"int8": 1.0, "int4": 0.5}
# transformers imports torchao where it is installed; both packages then warn of kernels for other devices.
for _name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def check_quantize(config: ModelConfig, family: str = "", has_adapter: bool = False) -> None:
    """Raise UsageError or ModelError where --quantize cannot be used: with this model, or on this machine.

    `family`: of the model; "" where it is not known yet.
    """
    kind = config.quantize
    if kind is None:
        return
    if family_of(family).search == "fast":
        raise UsageError(
            f"--quantize {kind}: {config.name} is a {family} model, which is small (less than 2 GB) and whose search of"
            " this package does not take quantised weights; leave it out"
        )
    if has_adapter:
        raise UsageError(
            f"--quantize {kind}: {config.name} is a LoRA adapter, which cannot be merged into quantised weights; merge"
            " it with peft (merge_and_unload, save_pretrained) and give that directory, or leave --quantize out"
        )
    if find_spec(PACKAGES[kind]) is None:
        raise ModelError(f"--quantize {kind} needs {PACKAGES[kind]}; pip install 'captioner[quantize]'")


def loading_options(kind: str, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that make weights of fewer bits on a device.

    Raises ModelError where the package that does it cannot be used.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    try:
        if kind == "int8":
            from torchao.quantization import Int8WeightOnlyConfig

            config: Any = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
        else:
            import bitsandbytes  # noqa: F401 # transformers imports it too; here its errors are told apart

            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"--quantize {kind}: {PACKAGES[kind]} cannot be used ({reason}); pip install 'captioner[quantize]'"
        ) from None
    return {"quantization_config": config, "device_map": {"": device}}


def compute_as_loaded(network: Any) -> Any:
    """Return the network without bitsandbytes' own layout of weights for CPUs with AVX-512 BF16.

    It computes in bfloat16 whatever --dtype says, and refuses layers whose sizes are not multiples of 32 and 64, which
    vision encoders have (bitsandbytes 0.50).
    """
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return network


def stored_bytes(network: Any) -> int:
    """Return the bytes of a network's weights as they are stored, with their scales. A shared weight counts once."""
    return sum(map(_bytes_of, (*network.parameters(), *network.buffers())))


def _bytes_of(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao: a tensor that is made of others
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes_of(getattr(tensor, name)) for name in names)
    state = getattr(tensor, "quant_state", None)  # bitsandbytes keeps the scales beside the weights
    return int(tensor.nbytes + (0 if state is None else state.absmax.nbytes))
