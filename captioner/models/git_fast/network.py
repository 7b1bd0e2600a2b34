"""A GitForCausalLM's own layers, called so that nothing is computed twice.

GIT's image tokens attend to each other only, so they pass the text layers once for each picture, and what later
tokens need of them is their keys and values. The beams of a picture share those in one product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

# Tokens of pictures that a CPU encodes at once: with more, what lies between two layers leaves its caches.
CPU_TOKENS = 512


@dataclass
class State:
    """What a search remembers of N pictures with B beams each: L layers, H heads of d values, room for T tokens.

    `image_keys`, `image_values`: [L, N, H, I, d], I image tokens. `text_keys`, `text_values`: [L, N, B, H, T, d].
    `tokens`: the newest token of each beam, int64 [N, B]. `position`: its place in the text, int64 [1].
    """

    image_keys: torch.Tensor
    image_values: torch.Tensor
    text_keys: torch.Tensor
    text_values: torch.Tensor
    tokens: torch.Tensor
    position: torch.Tensor

    def take(self, pictures: torch.Tensor, out: State) -> State:
        """Copy some pictures' part, in the order of `pictures`, into `out`."""
        for name in ("image_keys", "image_values", "text_keys", "text_values"):
            torch.index_select(getattr(self, name), 1, pictures, out=getattr(out, name))
        out.tokens.copy_(self.tokens[pictures])
        out.position.copy_(self.position)
        return out

    def expand(self, out: State) -> State:
        """Copy a state of one beam into `out`: each of its beams begins as that one."""
        for field in fields(self):
            getattr(out, field.name).copy_(getattr(self, field.name))  # sizes of 1 are repeated
        return out

    def reorder(self, rows: torch.Tensor) -> None:
        """Let each beam go on from the text of another one: `rows` int64 [N, B], numbers among the N x B beams."""
        filled = int(self.position) + 1
        for cache in (self.text_keys, self.text_values):
            beams = cache.flatten(1, 2)[:, :, :, :filled]
            beams.copy_(beams[:, rows.flatten()])


class GitNetwork:
    """The two calls a search needs, `encode` and `step`, over the layers of a GitForCausalLM in evaluation mode."""

    def __init__(self, model: Any) -> None:
        self.git, self.head = model.git, model.output
        self.layers = list(self.git.encoder.layer)
        attention = self.layers[0].attention.self
        self.heads, self.width = attention.num_attention_heads, attention.attention_head_size
        vision = model.config.vision_config
        self.image_tokens = (vision.image_size // vision.patch_size) ** 2 + 1
        self.dtype, self.device = model.dtype, model.device
        # transformers offers GIT eager attention only, but its vision tower calls whichever is set here.
        vision._attn_implementation = "sdpa"

    def new_state(self, pictures: int, beams: int, length: int) -> State:
        """Room for `length` text tokens. Zeros, because a masked value still is multiplied: by zero, and NaN stays."""
        layers, options = len(self.layers), {"dtype": self.dtype, "device": self.device}
        image = (layers, pictures, self.heads, self.image_tokens, self.width)
        text = (layers, pictures, beams, self.heads, length, self.width)
        return State(
            torch.zeros(image, **options),
            torch.zeros(image, **options),
            torch.zeros(text, **options),
            torch.zeros(text, **options),
            torch.zeros((pictures, beams), dtype=torch.long, device=self.device),
            torch.zeros(1, dtype=torch.long, device=self.device),
        )

    def encode(self, pixel_values: torch.Tensor, state: State) -> None:
        """Fill `state` with the image tokens' keys and values of pixels [N, 3, H, W]."""
        at_once = len(pixel_values) if self.device.type != "cpu" else max(1, CPU_TOKENS // self.image_tokens)
        for first in range(0, len(pixel_values), at_once):
            some = slice(first, first + at_once)
            self._encode(pixel_values[some], state.image_keys[:, some], state.image_values[:, some])

    def _encode(self, pixel_values: torch.Tensor, all_keys: torch.Tensor, all_values: torch.Tensor) -> None:
        hidden = self.git.visual_projection(self.git.image_encoder(pixel_values).last_hidden_state)
        for layer, keys, values in zip(self.layers, all_keys, all_values, strict=True):
            own = layer.attention.self
            keys.copy_(self._by_head(own.key(hidden)))
            values.copy_(self._by_head(own.value(hidden)))
            if layer is self.layers[-1]:
                return  # nobody reads what image tokens become after it
            mixed = scaled_dot_product_attention(self._by_head(own.query(hidden)), keys, values)
            hidden = layer.feed_forward_chunk(layer.attention.output(mixed.transpose(1, 2).flatten(2), hidden))

    def _by_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, I, H x d] -> [N, H, I, d]."""
        return hidden.unflatten(2, (self.heads, self.width)).transpose(1, 2)

    def step(self, state: State) -> torch.Tensor:
        """Logits float32 [N, B, vocabulary] of what follows the newest tokens, which are added to the state."""
        embeddings = self.git.embeddings
        hidden = embeddings.word_embeddings(state.tokens.flatten()) + embeddings.position_embeddings(state.position)
        hidden = embeddings.LayerNorm(hidden)
        length = state.text_keys.shape[4]
        ahead = torch.arange(length, device=self.device) > state.position
        for index, layer in enumerate(self.layers):
            mixed = self._attend(layer.attention.self, hidden, state, index, ahead)
            hidden = layer.feed_forward_chunk(layer.attention.output(mixed, hidden))
        return self.head(hidden).float().view(*state.tokens.shape, -1)

    def _attend(self, own: Any, hidden: torch.Tensor, state: State, index: int, ahead: torch.Tensor) -> torch.Tensor:
        """Attention of the newest tokens [N x B, width of the model] to image and text, of the same shape."""
        (pictures, beams), tokens = state.tokens.shape, state.image_keys.shape[3]
        shape = pictures, beams, self.heads, 1, self.width
        queries = own.query(hidden).view(shape)
        text_keys, text_values = state.text_keys[index], state.text_values[index]
        text_keys.index_copy_(3, state.position, own.key(hidden).view(shape))
        text_values.index_copy_(3, state.position, own.value(hidden).view(shape))
        over_image = queries.squeeze(3).transpose(1, 2) @ state.image_keys[index].transpose(2, 3)
        over_text = (queries @ text_keys.transpose(3, 4)).masked_fill(ahead, -torch.inf)
        scores = torch.cat([over_image, over_text.squeeze(3).transpose(1, 2)], dim=-1)
        shares = (scores / math.sqrt(self.width)).softmax(-1)
        of_image = (shares[..., :tokens] @ state.image_values[index]).transpose(1, 2)
        of_text = shares[..., tokens:].transpose(1, 2).unsqueeze(3) @ text_values
        return (of_image + of_text.squeeze(3)).reshape(pictures * beams, -1)
