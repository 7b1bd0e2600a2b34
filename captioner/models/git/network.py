"""The layers of a GitForCausalLM, called so that nothing is computed twice.

GIT's image tokens attend only to each other, so they pass through the text layers once for each image, and later tokens
need only their keys and values, which the beams of an image share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

# Image tokens that a CPU encodes in one batch: with more, the activations between layers exceed its caches.
CPU_TOKENS = 512


@dataclass
class State:
    """Keys and values of N images with B beams each, and the newest token of each beam.

    `caches`: named tensors [L, N, ...] in the layout of the network that made them. `tokens`: int64 [N, B].
    `position`: of the newest tokens in the text, int64 [1]. `sources`: int32 [N, B, T], the beam that holds the keys
    and values of a beam's token at each position; used only by networks that do not copy caches.
    """

    caches: dict[str, torch.Tensor]
    tokens: torch.Tensor
    position: torch.Tensor
    sources: torch.Tensor

    def copy_to(self, images: torch.Tensor, out: State) -> None:
        """Copy the state of the images with these indices, int64 [M], into `out`, a state of M images."""
        for name, cache in self.caches.items():
            torch.index_select(cache, 1, images, out=out.caches[name])
        out.tokens.copy_(self.tokens[images])
        out.position.copy_(self.position)
        out.sources.copy_(self.sources[images])


class GitNetwork:
    """The layers of a GitForCausalLM in evaluation mode as a search calls them, on any device."""

    def __init__(self, model: Any) -> None:
        self.git, self._model = model.git, model
        self.layers = list(self.git.encoder.layer)
        attention = self.layers[0].attention.self
        self.heads, self.width = attention.num_attention_heads, attention.attention_head_size
        vision = model.config.vision_config
        self.image_tokens = (vision.image_size // vision.patch_size) ** 2 + 1
        # transformers accepts only eager attention for GIT, but its vision tower follows this setting.
        vision._attn_implementation = "sdpa"

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights, which sharded ones have while they are gathered."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    @property
    def head(self) -> Any:
        """Return the output layer, which may be replaced by a packed one at any time."""
        return self._model.output

    def new_state(self, images: int, beams: int, length: int) -> State:
        """Return an empty state for up to `length` text tokens.

        Caches are zeros, because masked values are still multiplied by 0, which would not remove NaN.
        """
        caches = self.new_caches(images, beams, length)
        tokens = torch.zeros((images, beams), dtype=torch.long, device=self.device)
        position = torch.zeros(1, dtype=torch.long, device=self.device)
        sources = torch.zeros((images, beams, length), dtype=torch.int32, device=self.device)
        return State(caches, tokens, position, sources)

    def new_caches(self, images: int, beams: int, length: int) -> dict[str, torch.Tensor]:
        """Return `image_keys`, `image_values` [L, N, H, I, d] and `text_keys`, `text_values` [L, N, B, H, T, d]."""
        image = (len(self.layers), images, self.heads, self.image_tokens, self.width)
        text = (len(self.layers), images, beams, self.heads, length, self.width)
        shapes = {"image_keys": image, "image_values": image, "text_keys": text, "text_values": text}
        return {name: torch.zeros(shape, dtype=self.dtype, device=self.device) for name, shape in shapes.items()}

    def encode(self, pixel_values: torch.Tensor, state: State) -> None:
        """Fill `state` with the image tokens' keys and values of normalised pixels [N, 3, H, W]."""
        size = len(pixel_values) if self.device.type != "cpu" else max(1, CPU_TOKENS // self.image_tokens)
        keys, values = state.caches["image_keys"], state.caches["image_values"]
        for first in range(0, len(pixel_values), size):
            images = slice(first, first + size)
            self._encode(pixel_values[images], keys[:, images], values[:, images])

    def _encode(self, pixel_values: torch.Tensor, all_keys: torch.Tensor, all_values: torch.Tensor) -> None:
        hidden = self.git.visual_projection(self.git.image_encoder(pixel_values).last_hidden_state)
        for layer, keys, values in zip(self.layers, all_keys, all_values, strict=True):
            attention = layer.attention.self
            keys.copy_(self._by_head(attention.key(hidden)))
            values.copy_(self._by_head(attention.value(hidden)))
            if layer is self.layers[-1]:
                return  # nothing reads the output of image tokens after the last layer
            attended = scaled_dot_product_attention(self._by_head(attention.query(hidden)), keys, values)
            hidden = layer.feed_forward_chunk(layer.attention.output(attended.transpose(1, 2).flatten(2), hidden))

    def _by_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Split the last dimension by attention head: [N, I, H x d] -> [N, H, I, d]."""
        return hidden.view(*hidden.shape[:2], self.heads, self.width).transpose(1, 2)

    def step(self, state: State) -> torch.Tensor:
        """Add the newest tokens to the caches and return the logits of the next ones, float32 [N, B, vocabulary]."""
        hidden = self.embed(state)
        length = state.caches["text_keys"].shape[4]
        later = torch.arange(length, device=self.device) > state.position
        for index, layer in enumerate(self.layers):
            attended = self._attend(layer.attention.self, hidden, state, index, later)
            hidden = layer.feed_forward_chunk(layer.attention.output(attended, hidden))
        logits: torch.Tensor = self.head(hidden).float()
        return logits.view(*state.tokens.shape, -1)

    def embed(self, state: State) -> torch.Tensor:
        """Return the embeddings of the newest tokens, [N x B, width of the model]."""
        embeddings = self.git.embeddings
        words = embeddings.word_embeddings(state.tokens.flatten())
        hidden: torch.Tensor = embeddings.LayerNorm(words + embeddings.position_embeddings(state.position))
        return hidden

    def _attend(
        self, attention: Any, hidden: torch.Tensor, state: State, index: int, later: torch.Tensor
    ) -> torch.Tensor:
        """Return the attention of the newest tokens to image and text, both [N x B, width of the model]."""
        images, beams = state.tokens.shape
        shape = images, beams, self.heads, 1, self.width
        queries = attention.query(hidden).view(shape)
        image_keys, image_values, text_keys, text_values = (cache[index] for cache in state.caches.values())
        text_keys.index_copy_(3, state.position, attention.key(hidden).view(shape))
        text_values.index_copy_(3, state.position, attention.value(hidden).view(shape))
        over_image = queries.squeeze(3).transpose(1, 2) @ image_keys.transpose(2, 3)
        over_text = (queries @ text_keys.transpose(3, 4)).masked_fill(later, -torch.inf)
        scores = torch.cat([over_image, over_text.squeeze(3).transpose(1, 2)], dim=-1)
        weights = (scores / math.sqrt(self.width)).softmax(-1)
        of_image = (weights[..., : self.image_tokens] @ image_values).transpose(1, 2)
        of_text = weights[..., self.image_tokens :].transpose(1, 2).unsqueeze(3) @ text_values
        return (of_image + of_text.squeeze(3)).reshape(images * beams, -1)

    def reorder(self, state: State, parents: torch.Tensor) -> None:
        """Let each beam continue the text of another beam of its image: `parents` int64 [N, B]."""
        images, beams = parents.shape
        # On a CPU only the filled part is copied; elsewhere reading the position would wait for the device.
        filled = int(state.position) + 1 if self.device.type == "cpu" else state.caches["text_keys"].shape[4]
        rows = (parents + torch.arange(images, device=self.device)[:, None] * beams).flatten()
        for name in ("text_keys", "text_values"):
            texts = state.caches[name].flatten(1, 2)[:, :, :, :filled]
            texts.copy_(texts[:, rows])

    def logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """Return float32 log-probabilities [N, B, vocabulary] of what `step` returned."""
        return logits.log_softmax(-1)

    def best_tokens(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the most probable token of each row of logits [N, vocabulary], int64 [N], and its log-probability."""
        best, tokens = logits.max(-1)
        return tokens, best - logits.logsumexp(-1)

    def best_continuations(
        self, logits: torch.Tensor, scores: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the `count` continuations of each image with the highest total log-probability, best first.

        `logits` [N, B, vocabulary]; `scores` [N, B], the beams' totals so far. Returns totals, beams, tokens and the
        tokens' own log-probabilities, each [N, count].
        """
        return best_continuations(self.logprobs(logits), scores, count)


def best_continuations(
    logprobs: torch.Tensor, scores: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `GitNetwork.best_continuations` of log-probabilities [N, B, vocabulary] instead of logits."""
    vocabulary = logprobs.shape[2]
    totals, indices = (logprobs + scores[:, :, None]).flatten(1).topk(count)
    return totals, indices // vocabulary, indices % vocabulary, logprobs.flatten(1).gather(1, indices)
