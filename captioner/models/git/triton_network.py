"""GitNetwork on a CUDA GPU: fused matrix products, with the kernels of `triton_kernels` between them.

Keys and values of an image are written where the steps read them. Caches of beams are never copied: for each position
of its text, a beam records which beam's cache holds its token.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.activations import QuickGELUActivation

from captioner.models.git.network import GitNetwork, State
from captioner.models.git.triton_kernels import (
    added_layer_norm,
    attend,
    best_logprobs,
    quick_gelu_,
    shifted_layer_norm,
)

ALIGNMENT = 128  # columns of logits: matrix products with an unaligned last dimension are several times as slow


class _Fused:
    """Linear layers with the same input, computed as one product: [rows, in] -> [rows, sum of out]."""

    def __init__(self, *layers: nn.Linear) -> None:
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        biases = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        self.bias = torch.cat([bias.detach() for bias in biases])

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        return linear(values, self.weight, self.bias)

    def write(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Write the product into `out`, contiguous [rows, sum of out]."""
        torch.addmm(self.bias, values, self.weight.t(), out=out)


class TritonGitNetwork(GitNetwork):
    """The network on a GPU.

    Caches hold keys and values in one tensor: `image` [L, N, I, 2 x H x d], `text` [L, N, B, T, 2 x H x d].
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.vision = getattr(self.git.image_encoder, "vision_model", self.git.image_encoder)
        attentions = [layer.self_attn for layer in self.vision.encoder.layers]
        self._vision_qkv = [_Fused(layer.q_proj, layer.k_proj, layer.v_proj) for layer in attentions]
        biases = [(layer.self_attn.out_proj.bias, layer.mlp.fc2.bias) for layer in self.vision.encoder.layers]
        sums = torch.cat([torch.stack(pair) for pair in biases]).detach().float().cumsum(0)
        self._vision_shifts = list(sums.view(len(biases), 2, -1))
        texts = [layer.attention.self for layer in self.layers]
        self._text_qkv = [_Fused(layer.query, layer.key, layer.value) for layer in texts]
        self._text_kv = [_Fused(layer.key, layer.value) for layer in texts]
        self.vocabulary = self.head.out_features
        padding = -self.vocabulary % ALIGNMENT
        self._head_weight = nn.functional.pad(self.head.weight.detach(), (0, 0, 0, padding))
        bias = self.head.bias
        self._head_bias = None if bias is None else nn.functional.pad(bias.detach(), (0, padding))

    def new_caches(self, images: int, beams: int, length: int) -> dict[str, torch.Tensor]:
        width = 2 * self.heads * self.width
        shapes = {
            "image": (len(self.layers), images, self.image_tokens, width),
            "text": (len(self.layers), images, beams, length, width),
        }
        return {name: torch.zeros(shape, dtype=self.dtype, device=self.device) for name, shape in shapes.items()}

    def encode(self, pixel_values: torch.Tensor, state: State) -> None:
        """Fill `state` with the image tokens' keys and values of normalised pixels [N, 3, H, W]."""
        images = len(pixel_values)
        projection, norm = self.git.visual_projection.visual_projection
        hidden = norm(projection(self._encode_vision(pixel_values)))
        for index, layer in enumerate(self.layers):
            cache = state.caches["image"][index]
            self._text_kv[index].write(hidden, cache.view(len(hidden), -1))
            if layer is self.layers[-1]:
                return  # nothing reads the output of image tokens after the last layer
            queries = layer.attention.self.query(hidden).view(images, -1, self.heads, self.width)
            keys_values = cache.view(images, -1, 2, self.heads, self.width).unbind(2)
            hidden = self._text_layer(layer, hidden, _attention(queries, *keys_values))

    def _encode_vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states of the vision tower, [N x I, width], of normalised pixels [N, 3, H, W].

        Products add to `hidden` in place, without their biases: layer norms add the sum of all biases so far.
        """
        vision, images = self.vision, len(pixel_values)
        layers = list(vision.encoder.layers)
        heads = layers[0].self_attn.num_heads
        hidden = vision.pre_layrnorm(self._embed_patches(pixel_values).flatten(0, 1))
        normed: torch.Tensor = layers[0].layer_norm1(hidden)
        following = [layer.layer_norm1 for layer in layers[1:]] + [vision.post_layernorm]
        for layer, fused, shifts, next_norm in zip(
            layers, self._vision_qkv, self._vision_shifts, following, strict=True
        ):
            queries, keys, values = fused(normed).view(images, -1, 3, heads, normed.shape[1] // heads).unbind(2)
            hidden.addmm_(_attention(queries, keys, values), layer.self_attn.out_proj.weight.t())
            normed = shifted_layer_norm(hidden, shifts[0], layer.layer_norm2)
            inner = _activated(layer.mlp.activation_fn, layer.mlp.fc1(normed))
            hidden.addmm_(inner, layer.mlp.fc2.weight.t())
            normed = shifted_layer_norm(hidden, shifts[1], next_norm)
        return normed

    def _embed_patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of class and patches, [N, I, width].

        The convolution is computed as a matrix product, since its patches do not overlap.
        """
        embeddings = self.vision.embeddings
        size, weight = embeddings.patch_size, embeddings.patch_embedding.weight
        images, channels, height, width = pixel_values.shape
        patches = pixel_values.view(images, channels, height // size, size, width // size, size)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * size * size)
        positions = embeddings.position_embedding.weight
        result = pixel_values.new_empty(images, self.image_tokens, len(weight))
        result[:, 0] = embeddings.class_embedding + positions[0]
        torch.add(linear(patches, weight.flatten(1)).view(images, -1, len(weight)), positions[1:], out=result[:, 1:])
        return result

    def _text_layer(self, layer: Any, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Return the output of a text layer for `hidden` [rows, width] and the output of its attention."""
        output = layer.attention.output
        hidden = added_layer_norm(hidden, output.dense(attended), output.LayerNorm)
        inner = _activated(layer.intermediate.intermediate_act_fn, layer.intermediate.dense(hidden))
        return added_layer_norm(hidden, layer.output.dense(inner), layer.output.LayerNorm)

    def step(self, state: State) -> torch.Tensor:
        """Return logits of the model's dtype, [N, B, vocabulary and padding]."""
        hidden = self.embed(state)
        image, text = state.caches["image"], state.caches["text"]
        for index, layer in enumerate(self.layers):
            new = self._text_qkv[index](hidden)
            attended = attend(new, image[index], text[index], state.sources, state.position, self.heads)
            hidden = self._text_layer(layer, hidden, attended)
        return linear(hidden, self._head_weight, self._head_bias).view(*state.tokens.shape, -1)

    def reorder(self, state: State, parents: torch.Tensor) -> None:
        """Let each beam continue the text of another beam of its image: `parents` int64 [N, B]."""
        sources = state.sources.gather(1, parents[:, :, None].expand_as(state.sources))
        state.sources.copy_(sources.index_copy_(2, state.position, parents[:, :, None].to(sources.dtype)))

    def logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[..., : self.vocabulary].float().log_softmax(-1)

    def best_tokens(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, tokens = best_logprobs(logits, self.vocabulary, 1)
        return tokens[:, 0], logprobs[:, 0]

    def best_continuations(
        self, logits: torch.Tensor, scores: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        # The best continuations of an image are among the best of each of its beams.
        images = len(logits)
        best = best_logprobs(logits.flatten(0, 1), self.vocabulary, count)
        logprobs, tokens = (values.view(images, -1) for values in best)
        totals, indices = (logprobs + scores.repeat_interleave(count, 1)).topk(count)
        return totals, indices // count, tokens.gather(1, indices), logprobs.gather(1, indices)


def can_run(network: TritonGitNetwork) -> bool:
    """Return whether the kernels can be compiled for a network and its device, with a token for a blank image.

    Triton needs a C compiler at that moment, a GPU that it knows, and text heads whose width is a power of two from 16.
    """
    side = network.vision.embeddings.image_size
    try:
        with torch.inference_mode():
            state = network.new_state(1, 1, 2)
            network.encode(torch.zeros((1, 3, side, side), dtype=network.dtype, device=network.device), state)
            network.best_tokens(network.step(state)[:, 0])[0].cpu()
    except Exception:  # Triton, the compiler and the driver each raise their own
        logging.getLogger(__name__).warning(
            "Triton kernels cannot run on %s with this model, searching without them", network.device, exc_info=True
        )
        return False
    return True


def _attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the attention of all tokens to all, [N x I, H x d], of tensors [N, I, H, d]."""
    queries, keys, values = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
    return scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2).flatten(0, 1)


def _activated(function: nn.Module, values: torch.Tensor) -> torch.Tensor:
    return quick_gelu_(values) if isinstance(function, QuickGELUActivation) else function(values)
