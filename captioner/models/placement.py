"""Whether a model fits the memory of its device, and what would fit. Imports neither torch nor transformers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from captioner.errors import ModelError
from captioner.models import weights
from captioner.models.families import family_of
from captioner.models.quantized import BYTES_OF_WEIGHT
from captioner.models.ref import ModelRef

BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a value, by dtype
TOKENS = 1_000  # of an image, its question and its caption, in estimates of the cache


def check_fits(ref: ModelRef, num_free: int, device_name: str, batch_size: int = 1) -> None:
    """Raise ModelError where weights and cache of a model take more than the free bytes of a device's memory.

    `batch_size`: of which the message gives the cache; one image must fit.
    """
    needed, cache = weights_in_memory(ref), cache_bytes(ref)
    if needed + cache <= num_free:
        return
    bits = f" with --quantize {ref.quantize}" if ref.quantize else f" in {ref.dtype}"
    raise ModelError(
        f"model {ref.name}: its weights take {_gigabytes(needed)}{bits}, its cache for --batch-size {batch_size} about"
        f" {_gigabytes(cache * batch_size)} ({TOKENS:,} tokens an image), and {device_name} has"
        f" {_gigabytes(num_free)} free; give {_ways_out(ref, num_free)}"
    )


def _ways_out(ref: ModelRef, num_free: int) -> str:
    """Return what would make a model fit, with the size of its weights, or a smaller model or larger GPU."""
    lighter = {"--dtype bfloat16": replace(ref, dtype="bfloat16")} if ref.dtype == "float32" else {}
    if family_of(ref.family).search != "fast" and ref.adapter is None:
        lighter |= {f"--quantize {kind}": replace(ref, quantize=kind) for kind in BYTES_OF_WEIGHT}
    ways = [
        f"{flag} ({_gigabytes(weights_in_memory(other))})"
        for flag, other in lighter.items()
        if weights_in_memory(other) + cache_bytes(other) <= num_free
    ]
    return ", ".join([*ways, "a smaller model (captioner models lists their memory), or a GPU with more memory"])


def weights_in_memory(ref: ModelRef) -> int:
    """Return the bytes of a model's weights on a device. Matrices but embeddings and output layer count as linear."""
    value = BYTES_OF[ref.dtype]
    in_linear = BYTES_OF_WEIGHT[ref.quantize] if ref.quantize else value
    shapes = weights.tensor_shapes(Path(ref.path))
    sizes = (math.prod(shape) * (in_linear if _is_linear(name, shape) else value) for name, shape in shapes)
    return math.ceil(sum(sizes))


def _is_linear(name: str, shape: list[int]) -> bool:
    return len(shape) == 2 and name.endswith(".weight") and "embed" not in name and "head.weight" not in name


def cache_bytes(ref: ModelRef) -> int:
    """Return the bytes of the keys and values of TOKENS tokens of one image; 0 where config.json does not tell.

    A text decoder of transformers names its sizes num_hidden_layers, num_key_value_heads, num_attention_heads,
    hidden_size and head_dim.
    """
    config = weights.read_json(Path(ref.path) / "config.json")
    text = config.get("text_config", config)
    try:
        heads = text["num_attention_heads"]
        width = text.get("head_dim") or text["hidden_size"] // heads
        values = 2 * text["num_hidden_layers"] * (text.get("num_key_value_heads") or heads) * width
        return int(values * TOKENS * BYTES_OF[ref.dtype])
    except (LookupError, TypeError, AttributeError, ZeroDivisionError):
        return 0


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
