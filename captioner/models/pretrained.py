"""Open the network and the tokenizer of a model directory: safetensors only, no code of its own, no network access."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, TokenizersBackend
from transformers.utils import logging as transformers_logging

from captioner.console.text import counted
from captioner.errors import ModelError
from captioner.models.adapters import merge
from captioner.models.quantized import compute_as_loaded, loading_options

# What transformers raises for directories that it cannot open a model or a tokenizer from.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError)

# The quantisers fail with messages of their own where a layer is left for the CPU or the disk.
SPREAD_QUANTIZED = (
    "; with --quantize, --gpus-per-worker needs room for every layer on the GPUs: give more of them, or leave"
    " --quantize out to see which layers do not fit"
)
MAX_NAMES = 3  # of tensors or layers, in a message
# Constants that earlier versions of transformers saved with the weights: of GPT-2 until 2023, of CLIP.
_CONSTANTS = (".attn.masked_bias", ".position_ids")


def open_tokenizer(path: str) -> Any:
    """Return the tokenizer of a model directory. Raises ModelError where it has none with a vocabulary."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except LOADING_ERRORS as error:
        raise ModelError(f"{path}: the tokenizer cannot be loaded: {' '.join(str(error).split())}") from None
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # transformers' default where files are missing
        raise ModelError(f"{path}: the tokenizer has no vocabulary; save the model's own with save_pretrained")
    return tokenizer


def decode_all(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    """Return the text of each row of token ids, without special tokens.

    Where transformers would only call the Rust tokenizer for each row, it is called once for all rows: that takes a
    tenth of the time, and releases the interpreter's lock.
    """
    kind, base = type(tokenizer), TokenizersBackend
    is_plain = isinstance(tokenizer, base) and not tokenizer.clean_up_tokenization_spaces
    if is_plain and (kind.decode, kind._decode) == (base.decode, base._decode):
        texts: list[str] = tokenizer.backend_tokenizer.decode_batch(rows, skip_special_tokens=True)
        return texts
    return list(tokenizer.batch_decode(rows, skip_special_tokens=True))


def open_model(
    path: str,
    dtype: torch.dtype,
    device: torch.device | str,
    attention: str | None = None,
    adapter: str | None = None,
    quantize: str | None = None,
    max_memory: dict[int | str, int] | None = None,
) -> Any:
    """Return the network in evaluation mode; on device "meta" without reading the weights.

    `adapter`: the directory of a LoRA adapter to merge into it. `quantize`: see `captioner.models.quantized`.
    `max_memory`: bytes of each GPU, by its index, that the weights are spread over: accelerate's hooks then move inputs
    from layer to layer, and outputs back to the device of the inputs.
    Raises ModelError naming tensors that are missing, unexpected or of a wrong shape.
    """
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    options |= _placement_options(dtype, device, quantize, max_memory)
    try:
        with quiet():
            model, info = AutoModelForImageTextToText.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except LOADING_ERRORS as error:
        advice = "" if quantize is None or max_memory is None else SPREAD_QUANTIZED
        raise ModelError(f"{path}: the model cannot be loaded: {' '.join(str(error).split())}{advice}") from None
    check_loading_info(path, info)
    if adapter is not None:
        model = merge(model, adapter)
    if max_memory is not None:
        check_placed(path, model, max_memory)
    is_placed = quantize is not None or max_memory is not None
    return (compute_as_loaded(model) if is_placed else model.to(device)).eval()


def _placement_options(
    dtype: torch.dtype, device: torch.device | str, quantize: str | None, max_memory: dict[int | str, int] | None
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say where weights go; {} where they are moved there afterwards."""
    options: dict[str, Any] = {"device_map": "meta"} if str(device) == "meta" else {}
    if quantize is not None:
        options |= loading_options(quantize, dtype, device)
    if max_memory is not None:
        options |= {"device_map": "balanced", "max_memory": max_memory}
    return options


def check_placed(path: str, model: Any, max_memory: dict[int | str, int]) -> None:
    """Raise ModelError where some layers of a model are on none of the GPUs that its weights are spread over."""
    elsewhere = [name for name, device in model.hf_device_map.items() if device in ("cpu", "disk")]
    if elsewhere and "cpu" not in max_memory:
        memory = sum(max_memory.values()) / 1e9
        raise ModelError(
            f"{path}: {counted(len(elsewhere), 'layer')} ({_shorten(elsewhere)}) of it fit none of"
            f" {counted(len(max_memory), 'GPU')}, of which {memory:.1f} GB are for weights; give a larger"
            " --gpus-per-worker, or --quantize int8"
        )


def check_loading_info(path: str, info: dict[str, Any]) -> None:
    """Raise ModelError naming the tensors that are missing, unexpected or of a wrong shape."""
    mismatched = [f"{name} is {list(shape)}, not {list(other)}" for name, shape, other in info["mismatched_keys"]]
    unexpected = [name for name in info["unexpected_keys"] if not name.endswith(_CONSTANTS)]
    faults = (("missing", info["missing_keys"]), ("unexpected", unexpected), ("misshapen", mismatched))
    described = [f"{len(names)} {kind}: {_shorten(sorted(names))}" for kind, names in faults if names]
    if described:
        raise ModelError(f"{path}: tensors do not fit config.json: {'; '.join(described)}; save the model again")


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bar and the warnings of transformers."""
    verbosity, has_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bar:
            transformers_logging.enable_progress_bar()
