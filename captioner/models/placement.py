"""Whether a model fits the memory of its device or devices, and what would fit.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from captioner.config import ClusterConfig
from captioner.errors import ModelError, UsageError
from captioner.models import weights
from captioner.models.families import family_of
from captioner.models.quantized import BYTES_OF_WEIGHT
from captioner.models.ref import ModelRef

BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a value, by dtype
USABLE = 0.9  # of a GPU's free memory, for weights; the rest is for what a batch needs
TOKENS = 1_000  # of an image, its question and its caption, in estimates of the cache


def check_spread(ref: ModelRef, cluster: ClusterConfig) -> None:
    """Raise UsageError where --gpus-per-worker is 2 or more, and the model is not one that can be spread over GPUs."""
    num_gpus = cluster.gpus_for_weights
    if num_gpus == 1:
        return
    if ref.endpoint:
        why, instead = "an --endpoint holds the model", "leave it out"
    elif ref.adapter is not None:
        why = f"{ref.name} is a LoRA adapter, which is merged on one GPU"
        instead = "merge it with peft (merge_and_unload, save_pretrained) and give that directory, or give 1"
    elif not _can_be_spread(ref):
        why, instead = f"{ref.name} is a {ref.family} model, which fits one GPU", "give 1: more workers caption faster"
    else:
        return
    raise UsageError(f"--gpus-per-worker {num_gpus}: {why}; {instead}")


def _can_be_spread(ref: ModelRef) -> bool:
    """Return whether a model is of a family with large models, whose layers transformers can place."""
    return ref.family == "blip-2" or family_of(ref.family).prompt in ("question", "prefix")


def check_fits(ref: ModelRef, free: Sequence[int], device_name: str, batch_size: int = 1) -> None:
    """Raise ModelError where weights and cache of a model take more than the free memory of its GPUs.

    `free`: bytes of each GPU. `batch_size`: of which the message gives the cache; one image must fit.
    """
    needed, cache, num_free = weights_in_memory(ref), cache_bytes(ref), sum(free)
    if needed + cache <= num_free:
        return
    gpus = f"{device_name} has" if len(free) == 1 else f"{len(free)} x {device_name} have together"
    bits = f" with --quantize {ref.quantize}" if ref.quantize else f" in {ref.dtype}"
    raise ModelError(
        f"model {ref.name}: its weights take {_gigabytes(needed)}{bits}, its cache for --batch-size {batch_size} about"
        f" {_gigabytes(cache * batch_size)} ({TOKENS:,} tokens an image), and {gpus}"
        f" {_gigabytes(num_free)} free; give {_ways_out(ref, num_free, len(free))}"
    )


def no_room(
    ref: ModelRef, image_size: str, device_name: str, weights_bytes: int, num_free: int, num_gpus: int = 1
) -> ModelError:
    """Return the error of a model whose weights fit its device or devices, but with which not one image fits.

    `weights_bytes`: taken by the weights. `num_free`: bytes that are free beside them, on all devices together.
    """
    beams = f"--num-beams 1 instead of {ref.num_beams}, " if ref.num_beams > 1 else ""
    return ModelError(
        f"model {ref.name}: not one image, not even of {image_size}, fits the memory of {device_name}, of which the"
        f" weights take {_gigabytes(weights_bytes)} in {ref.quantize or ref.dtype} and {_gigabytes(num_free)} are free;"
        f" end other programs on it, or give {beams}{_ways_out(ref, weights_bytes + num_free, num_gpus)}"
    )


def _ways_out(ref: ModelRef, num_free: int, num_gpus: int) -> str:
    """Return what would make a model fit, with the size of its weights, or a smaller model or larger GPU."""
    lighter = {"--dtype bfloat16": replace(ref, dtype="bfloat16")} if ref.dtype == "float32" else {}
    if family_of(ref.family).search != "fast" and ref.adapter is None:
        lighter |= {f"--quantize {kind}": replace(ref, quantize=kind) for kind in BYTES_OF_WEIGHT}
    ways = [
        f"{flag} ({_gigabytes(weights_in_memory(other))})"
        for flag, other in lighter.items()
        if weights_in_memory(other) < weights_in_memory(ref)
        and weights_in_memory(other) + cache_bytes(other) <= num_free
    ]
    if _can_be_spread(ref) and ref.adapter is None:
        needed = weights_in_memory(ref) + cache_bytes(ref)
        ways.append(f"--gpus-per-worker {max(num_gpus + 1, math.ceil(needed * num_gpus / (USABLE * num_free)))}")
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
