"""LoRA adapters as peft saves them: found with their base model, hashed with it, and merged where it is loaded.

Imports torch, peft and safetensors only in `merge`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from captioner.errors import ModelError
from captioner.models import weights

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
Locate = Callable[[str, str | None], Path]


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds an adapter and no whole model."""
    return (directory / CONFIG_FILE).is_file() and not (directory / weights.SINGLE_FILE).is_file()


def locate_base(adapter: Path, locate: Locate) -> Path:
    """Return the directory of the adapter's base model. `locate`: finds it by name and revision.

    Raises ModelError where the adapter cannot be merged, or its base model is not found.
    """
    config = weights.read_json(adapter / CONFIG_FILE)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if kind != "LORA":
        raise ModelError(f"{adapter}: a peft adapter of type {kind}; only LoRA is supported, merge it with peft")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{adapter}: {CONFIG_FILE} names no base model; set base_model_name_or_path in it")
    if not (adapter / WEIGHTS_FILE).is_file():
        raise ModelError(f"{adapter}: a LoRA adapter without {WEIGHTS_FILE}; save it again with save_pretrained")
    if find_spec("peft") is None:
        raise ModelError(f"{adapter}: a LoRA adapter needs peft; pip install 'captioner[lora]'")
    revision = config.get("revision")
    try:
        return locate(base, revision if isinstance(revision, str) else None)
    except ModelError as error:
        raise ModelError(
            f"{adapter}: a LoRA adapter of {base}, which is not here ({error}); set base_model_name_or_path in"
            f" {CONFIG_FILE} to the directory of the base model"
        ) from None


def hashes(directory: Path, adapter: Path | None) -> tuple[str, str]:
    """Return the sha256 of the weights, and of the settings, of a model and the adapter that is merged into it."""
    files, settings = weights.weight_files(directory), weights.settings_sha256(directory)
    if adapter is None:
        return weights.sha256_of(files), settings
    config = weights.read_json(adapter / CONFIG_FILE)
    merged = {name: value for name, value in config.items() if name not in ("base_model_name_or_path", "revision")}
    both = settings + json.dumps(merged, sort_keys=True)
    return weights.sha256_of([*files, adapter / WEIGHTS_FILE]), hashlib.sha256(both.encode()).hexdigest()


def merge(network: Any, adapter: str) -> Any:
    """Return the network with the adapter's products added to its layers. Raises ModelError where it does not fit."""
    import peft
    from safetensors.torch import load_file

    try:
        with expecting_conv1d():
            wrapped = peft.PeftModel(network, peft.LoraConfig.from_pretrained(adapter))
        result: Any = peft.set_peft_model_state_dict(wrapped, load_file(Path(adapter) / WEIGHTS_FILE))
    except (ValueError, RuntimeError, LookupError, TypeError) as error:
        raise ModelError(f"{adapter}: does not fit its base model: {' '.join(str(error).split())[:300]}") from None
    wrong = [*result.unexpected_keys, *(name for name in result.missing_keys if "lora_" in name)]
    if wrong:
        raise ModelError(f"{adapter}: does not fit its base model: {len(wrong)} tensors, such as {wrong[0]}")
    _untie_adapted(wrapped)
    return wrapped.merge_and_unload(safe_merge=True)


@contextmanager
def expecting_conv1d() -> Iterator[None]:
    """Silence peft's warnings that it takes the weights of Linear and Conv1D, which GPT-2 has, each as they lie."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
        yield


def _untie_adapted(network: Any) -> None:
    """Copy the weights of adapted layers that others share, as an output layer and the embeddings may.

    Merged into shared weights, an adapter would change the other layer as well.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    num_owners = Counter(id(weight) for module in network.modules() for weight in module.parameters(recurse=False))
    adapted: list[Any] = [module for module in network.modules() if isinstance(module, LoraLayer)]
    for layer in [module.get_base_layer() for module in adapted]:
        if num_owners[id(layer.weight)] > 1:
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
