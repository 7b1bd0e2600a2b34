"""Opening a model so that its weights can learn and it can caption all the while."""

from __future__ import annotations

from pathlib import Path

import torch

from captioner.config import TrainModelConfig
from captioner.errors import ModelError
from captioner.models.base import TransformersCaptioner
from captioner.models.blip import BlipCaptioner
from captioner.models.git import GitCaptioner
from captioner.models.git_fast import FastSearch, GitNetwork, missing_settings
from captioner.models.pretrained import open_model
from captioner.models.ref import ModelRef
from captioner.models.resolving import on_this_machine
from captioner.models.vision_encoder_decoder import VisionEncoderDecoderCaptioner
from captioner.training.lora import add_adapters
from captioner.training.pairs import TRAINABLE

ADAPTERS = "adapters"


class TrainableGitCaptioner(GitCaptioner):
    """GIT that captions with its weights as they are at the moment: they learn, so none are packed or copied."""

    def __init__(self, ref: ModelRef, device: torch.device, batch_size: int) -> None:
        TransformersCaptioner.__init__(self, ref, device, batch_size)
        # transformers offers GIT eager attention only, but its vision tower calls whichever is set here.
        self.model.config.vision_config._attn_implementation = "sdpa"
        self._fast = None
        if not missing_settings(self.settings):
            self._fast = FastSearch(GitNetwork(self.model), self.settings, self.prefix)


_FAMILIES: dict[str, type[TransformersCaptioner]] = {
    "git": TrainableGitCaptioner,
    "blip": BlipCaptioner,
    "vision-encoder-decoder": VisionEncoderDecoderCaptioner,
}


def open_trainable(
    ref: ModelRef, config: TrainModelConfig, device: torch.device, batch_size: int, checkpoint: Path | None
) -> TransformersCaptioner:
    """The model, float32, with the weights of the checkpoint where there is one; adapters where --lora-rank is given.

    `batch_size`: pictures captioned at once.
    """
    if ref.family not in TRAINABLE:
        raise ModelError(f"--model {ref.name}: {ref.family} cannot be trained here; {', '.join(TRAINABLE)} can")
    captioner = _FAMILIES[ref.family](on_this_machine(ref), device, batch_size)
    network = captioner.model
    if config.lora_rank is not None:
        add_adapters(
            network, vision_part(network, ref.family), config, None if checkpoint is None else checkpoint / ADAPTERS
        )
    elif checkpoint is not None:
        saved = open_model(str(checkpoint), captioner.dtype, device, captioner.attention)
        network.load_state_dict(saved.state_dict())
    if config.freeze_vision:
        vision_part(network, ref.family).requires_grad_(False)
    return captioner


def vision_part(network: torch.nn.Module, family: str) -> torch.nn.Module:
    """The vision encoder, which --freeze-vision leaves as it is."""
    parts = {"git": "git.image_encoder", "blip": "vision_model", "vision-encoder-decoder": "encoder"}
    return network.get_submodule(parts[family])
