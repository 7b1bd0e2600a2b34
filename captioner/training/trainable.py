"""Open a model for training: a captioner whose weights are trained and that can caption at any step."""

from __future__ import annotations

from pathlib import Path

import torch

from captioner.config import TrainModelConfig
from captioner.errors import ModelError
from captioner.models.base import TransformersCaptioner
from captioner.models.blip import BlipCaptioner
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
        self._fast = None
        if not unsupported_settings(self.settings):
            self._fast = FastSearch(GitNetwork(self.model), self.settings, self.prefix)


_FAMILIES: dict[str, type[TransformersCaptioner]] = {
    "git": TrainableGitCaptioner,
    "blip": BlipCaptioner,
    "vision-encoder-decoder": VisionEncoderDecoderCaptioner,
}
_VISION_PARTS = {"git": "git.image_encoder", "blip": "vision_model", "vision-encoder-decoder": "encoder"}


def open_trainable(
    ref: ModelRef, config: TrainModelConfig, device: torch.device, batch_size: int, checkpoint: Path | None
) -> TransformersCaptioner:
    """Return the model in float32, with the checkpoint's weights where one is given, and adapters with --lora-rank.

    `batch_size`: images captioned in one batch. Raises ModelError where the family cannot be trained.
    """
    if ref.family not in TRAINABLE:
        raise ModelError(f"--model {ref.name}: {ref.family} cannot be trained here; {', '.join(TRAINABLE)} can")
    captioner = _FAMILIES[ref.family](ensure_local(ref), device, batch_size)
    network = captioner.model
    vision = vision_part(network, ref.family)
    if config.lora_rank is not None:
        add_adapters(network, vision, config, None if checkpoint is None else checkpoint / ADAPTERS)
    elif checkpoint is not None:
        saved = open_model(str(checkpoint), captioner.dtype, device, captioner.attention)
        network.load_state_dict(saved.state_dict())
    if config.freeze_vision:
        vision.requires_grad_(False)
    return captioner


def vision_part(network: torch.nn.Module, family: str) -> torch.nn.Module:
    """Return the vision encoder, which --freeze-vision excludes from training."""
    return network.get_submodule(_VISION_PARTS[family])
