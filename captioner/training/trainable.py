"""Open a model for training: a captioner whose weights are trained and that can caption at any step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from captioner.config import TrainModelConfig
from captioner.errors import ModelError
from captioner.models.base import TransformersCaptioner
from captioner.models.blip import BlipCaptioner
from captioner.models.blip2 import Blip2Captioner
from captioner.models.chat import ChatCaptioner
from captioner.models.florence2 import Florence2Captioner
from captioner.models.git import FastSearch, GitCaptioner, GitNetwork, unsupported_settings
from captioner.models.pretrained import open_model
from captioner.models.ref import ModelRef
from captioner.models.resolving import ensure_local
from captioner.models.vision_encoder_decoder import VisionEncoderDecoderCaptioner
from captioner.training.lora import add_adapters
from captioner.training.pairs import TRAINABLE

ADAPTERS = "adapters"


class TrainableGitCaptioner(GitCaptioner):
    """GIT that captions with its current weights: because they change, none are packed or copied."""

    def __init__(self, ref: ModelRef, device: torch.device, batch_size: int) -> None:
        TransformersCaptioner.__init__(self, ref, device, batch_size)
        # transformers accepts only eager attention for GIT, but its vision tower follows this setting.
        self.model.config.vision_config._attn_implementation = "sdpa"
        self._fast = self._search()

    def use_device(self, device: torch.device) -> None:
        super().use_device(device)
        self._fast = self._search()  # has tensors of its own on the network's device

    def _search(self) -> FastSearch | None:
        if unsupported_settings(self.settings):
            return None
        return FastSearch(GitNetwork(self.model), self.settings, self.prefix)


@dataclass(frozen=True)
class TrainableFamily:
    """How a family is opened for training.

    `vision`: the name of its vision encoder in the network. `adapts_vision`: whether LoRA adapts the vision encoder as
    well. That of large models is usually left as it is, because it was trained on far more images.
    """

    kind: type[TransformersCaptioner]
    vision: str
    adapts_vision: bool = False


_FAMILIES = {
    "git": TrainableFamily(TrainableGitCaptioner, "git.image_encoder", adapts_vision=True),
    "blip": TrainableFamily(BlipCaptioner, "vision_model", adapts_vision=True),
    "blip-2": TrainableFamily(Blip2Captioner, "vision_model"),
    "vision-encoder-decoder": TrainableFamily(VisionEncoderDecoderCaptioner, "encoder", adapts_vision=True),
    "florence2": TrainableFamily(Florence2Captioner, "model.vision_tower"),
    "idefics3": TrainableFamily(ChatCaptioner, "model.vision_model"),
    "smolvlm": TrainableFamily(ChatCaptioner, "model.vision_model"),
    "qwen2_vl": TrainableFamily(ChatCaptioner, "model.visual"),
    "qwen2_5_vl": TrainableFamily(ChatCaptioner, "model.visual"),
}


def open_trainable(
    ref: ModelRef, config: TrainModelConfig, device: torch.device, batch_size: int, checkpoint: Path | None
) -> TransformersCaptioner:
    """Return the model in float32, with the checkpoint's weights where one is given, and adapters with --lora-rank.

    `batch_size`: images captioned in one batch. Raises ModelError where the family cannot be trained.
    """
    if ref.family not in TRAINABLE:
        raise ModelError(f"--model {ref.name}: {ref.family} cannot be trained here; {', '.join(TRAINABLE)} can")
    family = _FAMILIES[ref.family]
    captioner = family.kind(ensure_local(ref), device, batch_size)
    network = captioner.model
    if ref.adapter is not None:  # peft has frozen the weights that it merged the adapter into
        network.requires_grad_(True)
    vision = vision_part(network, ref.family)
    if config.lora_rank is not None:
        left_out = vision if config.freeze_vision or not family.adapts_vision else None
        add_adapters(network, left_out, config, None if checkpoint is None else checkpoint / ADAPTERS)
    elif checkpoint is not None:
        # On the CPU: the device may have no room for the weights twice.
        saved = open_model(str(checkpoint), captioner.dtype, "cpu", captioner.attention)
        network.load_state_dict(saved.state_dict())
    if config.freeze_vision:
        vision.requires_grad_(False)
    return captioner


def enable_gradient_checkpointing(network: Any) -> None:
    """Keep only the inputs of each layer for the backward pass, which computes the rest again."""
    network.activation_checkpointing_enable({"use_reentrant": False})
    # transformers lets the output of embeddings require gradients, for the reentrant form alone. GIT and BLIP add to
    # that output in place, which autograd refuses where the embeddings are frozen, as they are beside adapters.
    network.disable_input_require_grads()


def vision_part(network: torch.nn.Module, family: str) -> torch.nn.Module:
    """Return the vision encoder, which --freeze-vision excludes from training."""
    return network.get_submodule(_FAMILIES[family].vision)
