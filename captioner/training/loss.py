"""Cross-entropy over caption tokens: position t predicts token t + 1; padding, prompts and images have no labels.

The loss is computed here and not by the models because they compute logits for every position, of which most belong to
an image or a question; and because transformers' releases of GIT of 2025 shift the labels twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from captioner.models.base import TransformersCaptioner
from captioner.models.blip2 import Blip2Captioner
from captioner.models.florence2 import Florence2Captioner
from captioner.models.processors import ProcessedBatch
from captioner.training.git_layers import text_hidden
from captioner.training.trainable import vision_part

Inputs = dict[str, torch.Tensor]
"""What `Collate` or `ChatCollate` makes, on the device, without positions and labels."""


class CaptionLoss(torch.nn.Module):
    """A captioner's network in a module whose forward pass returns the loss, as DistributedDataParallel requires."""

    def __init__(self, captioner: TransformersCaptioner) -> None:
        super().__init__()
        family = captioner.ref.family
        self.network = captioner.model
        self._captioner = captioner
        self._hidden, self._head = _HIDDEN.get(family, _chat_hidden), _HEADS.get(family, _output_layer)

    def forward(self, positions: torch.Tensor, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Return the sum of the cross-entropies (nats) of the labels; a float32 scalar.

        `positions` and `labels` int64 [K]: which positions of all N x T predict a caption token, and which.
        """
        hidden = self._hidden(self._captioner, inputs).flatten(0, 1)
        logits = self._head(self.network)(hidden.index_select(0, positions)).float()
        return functional.cross_entropy(logits, labels, reduction="sum")

    def start(self) -> None:
        """Do nothing. Where weights are sharded, FSDP takes the first module that is called for the outermost one."""


# What each family computes at the text positions, float [N, T, X]. `pixels` are uint8 [N, H, W, 3], `input_ids` int64
# [N, T]. Except for chat models no attention mask is needed: padding follows the caption, has no labels, and decoders
# are causal.


def _features(captioner: TransformersCaptioner, inputs: Inputs) -> torch.Tensor:
    """Return the output of the vision encoder, float [N, I, width]."""
    vision = vision_part(captioner.model, captioner.ref.family)
    features: torch.Tensor = vision(captioner.normalise(inputs["pixels"])).last_hidden_state
    return features


def _git_hidden(captioner: TransformersCaptioner, inputs: Inputs) -> torch.Tensor:
    return text_hidden(captioner.model, _features(captioner, inputs), inputs["input_ids"])


def _blip_hidden(captioner: TransformersCaptioner, inputs: Inputs) -> torch.Tensor:
    hidden: torch.Tensor = captioner.model.text_decoder.bert(
        input_ids=inputs["input_ids"],
        attention_mask=torch.ones_like(inputs["input_ids"]),
        encoder_hidden_states=_features(captioner, inputs),
        is_decoder=True,
        use_cache=False,
    ).last_hidden_state
    return hidden


def _encoder_decoder_logits(captioner: TransformersCaptioner, inputs: Inputs) -> torch.Tensor:
    """Return the logits: what decoders compute between their last layer and the logits differs too much."""
    encoded = BaseModelOutput(last_hidden_state=_features(captioner, inputs))
    logits: torch.Tensor = captioner.model(
        encoder_outputs=encoded, decoder_input_ids=inputs["input_ids"], use_cache=False
    ).logits
    return logits


def _blip2_logits(captioner: TransformersCaptioner, inputs: Inputs) -> torch.Tensor:
    """Return the logits, for the same reason; with OPT also those at the image queries and the prompt."""
    assert isinstance(captioner, Blip2Captioner)
    images, ids = captioner.normalise(inputs["pixels"]), inputs["input_ids"]
    texts = {"input_ids": ids}
    if captioner.text_model().config.is_encoder_decoder:
        prompts = torch.tensor([captioner.input_ids()], device=ids.device).repeat(len(ids), 1)
        texts = {"input_ids": prompts, "decoder_input_ids": ids}
    logits: torch.Tensor = captioner.model(pixel_values=images, use_cache=False, **texts).logits
    return logits


def _florence_hidden(captioner: TransformersCaptioner, inputs: Inputs) -> torch.Tensor:
    assert isinstance(captioner, Florence2Captioner)
    ids = inputs["input_ids"]
    hidden: torch.Tensor = captioner.model.model(
        pixel_values=captioner.normalise(inputs["pixels"]),
        input_ids=torch.tensor([captioner.question_ids], device=ids.device).repeat(len(ids), 1),
        decoder_input_ids=ids,
        use_cache=False,
    ).last_hidden_state
    return hidden


def _chat_hidden(captioner: TransformersCaptioner, inputs: Inputs) -> torch.Tensor:
    """Return the output of the last layer at all positions, those of question and image included."""
    prepared = captioner.prepare(ProcessedBatch([], captioner.process, inputs))
    hidden: torch.Tensor = captioner.model.model(**prepared, use_cache=False).last_hidden_state
    return hidden


def _output_layer(network: Any) -> Any:
    return network.get_output_embeddings()


_HIDDEN: dict[str, Any] = {
    "git": _git_hidden,
    "blip": _blip_hidden,
    "blip-2": _blip2_logits,
    "vision-encoder-decoder": _encoder_decoder_logits,
    "florence2": _florence_hidden,
}
# The module that turns them into logits, where it is not the network's output layer.
_HEADS: dict[str, Any] = {
    "git": lambda network: network.output,
    "blip": lambda network: network.text_decoder.cls,
    "blip-2": lambda network: torch.nn.Identity(),
    "vision-encoder-decoder": lambda network: torch.nn.Identity(),
}
