"""LoRA adapters by peft (the extra `lora`): only the adapters are trained, and at the end merged or kept."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from captioner.config import TrainModelConfig
from captioner.errors import ModelError, UsageError
from captioner.models.adapters import WEIGHTS_FILE, expecting_conv1d

_WEIGHTS = "adapters.safetensors"


def check_installed() -> None:
    """Raise UsageError where peft is not installed."""
    if find_spec("peft") is None:
        raise UsageError("--lora-rank: peft is not installed; pip install 'captioner[lora]'")


def add_adapters(network: Any, left_out: Any, config: TrainModelConfig, saved: Path | None) -> None:
    """Add adapters to linear layers of the network, in place, and freeze all other weights.

    `left_out`: a part of the network whose layers get none, or None. `saved`: a directory with the adapters' weights.
    Raises ModelError where --lora-targets names no layer, or no layer is left.
    """
    import peft
    from safetensors.torch import load_file

    assert config.lora_rank is not None
    rank = config.lora_rank
    layers = target_layers(network, left_out, config.lora_targets)
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
    with expecting_conv1d():
        peft.inject_adapter_in_model(settings, network)
    if saved is not None:
        peft.set_peft_model_state_dict(network, load_file(saved / _WEIGHTS))


def target_layers(network: Any, left_out: Any, targets: list[str]) -> list[str]:
    """Return the names of the linear layers that get an adapter, without the output layer.

    Those of GPT-2 are of the class Conv1D, which has the transposed weights of a Linear.
    `targets`: the last parts of their names, such as "q_proj" or "self_attn.q_proj"; empty for every layer.
    Raises ModelError where a target is the name of no layer, or no layer is left.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    skipped = set() if left_out is None else {id(module) for module in left_out.modules()}
    # Of a part too: BLIP's output layer is its decoder's, and shares the word embeddings, which a merge would change.
    parts = [module for module in network.modules() if hasattr(module, "get_output_embeddings")]
    skipped |= {id(part.get_output_embeddings()) for part in parts}
    linear = [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and id(module) not in skipped
    ]
    if not linear:
        raise ModelError(
            "--lora-rank: no linear layer is left for an adapter; leave --freeze-vision out, or train without"
            " --lora-rank"
        )
    unknown = [target for target in targets if not any(_is_named(name, target) for name in linear)]
    if unknown:
        names = sorted({name.rpartition(".")[2] for name in linear})
        raise ModelError(f"--lora-targets: no linear layer is named {', '.join(unknown)}; there are {', '.join(names)}")
    return [name for name in linear if not targets or any(_is_named(name, target) for target in targets)]


def _is_named(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def adapter_weights(network: Any) -> dict[str, Any]:
    """Return the adapters' weights alone, by name."""
    import peft

    weights: dict[str, Any] = peft.get_peft_model_state_dict(network)
    return weights


def save_adapters(weights: dict[str, Any], folder: Path) -> None:
    """Write the result of `adapter_weights` into `folder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / _WEIGHTS)


def save_peft(network: Any, directory: Path, base: str, revision: str | None) -> None:
    """Write the adapters as peft does: adapter_config.json and adapter_model.safetensors.

    `base`: the name of the base model, from which peft and `captioner.models.adapters` load it.
    """
    from safetensors.torch import save_file

    settings = copy.copy(network.peft_config["default"])
    settings.base_model_name_or_path, settings.revision, settings.inference_mode = base, revision, True
    settings.save_pretrained(str(directory))
    weights = adapter_weights(network)
    named = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(named, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def merge_adapters(network: Any) -> None:
    """Add each adapter's product to its layer and remove the adapter, in place."""
    from peft.tuners.lora import LoraLayer

    for name, layer in [(n, m) for n, m in network.named_modules() if isinstance(m, LoraLayer)]:
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())
