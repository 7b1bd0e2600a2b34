"""Cross-entropy over caption tokens: position t predicts token t + 1; padding and image positions have no labels.

The loss is computed here and not by the models because transformers' GIT computes logits for every image position, and
its releases of 2025 shift the labels twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from captioner.models.base import TransformersCaptioner
from captioner.training.git_layers import text_hidden
from captioner.training.trainable import vision_part


class CaptionLoss(torch.nn.Module):
    """A captioner's network in a module whose forward pass returns the loss, as DistributedDataParallel requires."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, captioner: TransformersCaptioner) -> None:
        super().__init__()
        family = captioner.ref.family
        self.network = captioner.model
        self._hidden, self._head = _HIDDEN[family], _HEADS[family]
        self._family = family
        self.register_buffer("mean", captioner.mean, persistent=False)
        self.register_buffer("std", captioner.std, persistent=False)

    def forward(
        self, pixels: torch.Tensor, input_ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum of the cross-entropies (nats) of the labels; a float32 scalar.

        `pixels` uint8 [N, H, W, 3], `input_ids` int64 [N, T], `positions` and `labels` int64 [K] as in `Collate`. No
        attention mask is needed: padding follows the caption, has no labels, and decoders are causal.
        """
        images = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        features = vision_part(self.network, self._family)(images).last_hidden_state
        hidden = self._hidden(self.network, features, input_ids).flatten(0, 1)
        logits = self._head(self.network)(hidden.index_select(0, positions)).float()
        return functional.cross_entropy(logits, labels, reduction="sum")


def _blip_hidden(model: Any, features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = model.text_decoder.bert(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        encoder_hidden_states=features,
        is_decoder=True,
        use_cache=False,
    ).last_hidden_state
    return hidden


def _encoder_decoder_logits(model: Any, features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits: what decoders compute between their last layer and the logits differs too much."""
    encoded = BaseModelOutput(last_hidden_state=features)
    logits: torch.Tensor = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits
    return logits


# What each family computes at the text positions, float [N, T, X], and the module that turns it into logits.
_HIDDEN = {"git": text_hidden, "blip": _blip_hidden, "vision-encoder-decoder": _encoder_decoder_logits}
_HEADS: dict[str, Any] = {
    "git": lambda model: model.output,
    "blip": lambda model: model.text_decoder.cls,
    "vision-encoder-decoder": lambda model: torch.nn.Identity(),
}
