"""LoRA adapters by peft (the extra `lora`): only the adapters are trained, and merged into the network at the end."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from captioner.config import TrainModelConfig
from captioner.errors import UsageError

_WEIGHTS = "adapters.safetensors"


def check_installed() -> None:
    """Raise UsageError where peft is not installed."""
    if find_spec("peft") is None:
        raise UsageError("--lora-rank: peft is not installed; pip install 'captioner[lora]'")


def add_adapters(network: Any, vision: Any, config: TrainModelConfig, saved: Path | None) -> None:
    """Add an adapter to every linear layer of the network, in place, and freeze all other weights.

    With --freeze-vision the layers of `vision` get none. `saved`: a directory with the adapters' weights.
    """
    import peft
    import torch
    from safetensors.torch import load_file

    frozen = {id(module) for module in vision.modules()} if config.freeze_vision else set()
    head = network.get_output_embeddings()
    linear = [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in frozen and module is not head
    ]
    assert config.lora_rank is not None
    rank = config.lora_rank
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear)
    peft.inject_adapter_in_model(settings, network)
    if saved is not None:
        peft.set_peft_model_state_dict(network, load_file(saved / _WEIGHTS))


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


def merge_adapters(network: Any) -> None:
    """Add each adapter's product to its layer and remove the adapter, in place."""
    from peft.tuners.lora import LoraLayer

    for name, layer in [(n, m) for n, m in network.named_modules() if isinstance(m, LoraLayer)]:
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())
