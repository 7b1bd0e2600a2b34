"""GIT's text layers for training: only what the caption tokens need, in one pass over image and text.

In GIT, image tokens attend to each other and never to text; text tokens attend to all image tokens and to the text
before them. So the attention needs no mask over all pairs of tokens, and the last layer needs no queries of image
tokens, because nothing reads their output.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint


def text_hidden(model: Any, features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the output of a GitForCausalLM's last layer at the text positions: float [N, T, hidden].

    `features`: of its image encoder, [N, I, width]; `ids`: int64 [N, T].
    """
    git = model.git
    image = git.visual_projection(features)
    image_tokens, length = image.shape[1], ids.shape[1]
    hidden = torch.cat([image, git.embeddings(input_ids=ids)], dim=1)
    mask = torch.ones(length, image_tokens + length, dtype=torch.bool, device=ids.device).tril(image_tokens)
    use_checkpointing = model.training and model.is_activation_checkpointing
    for layer in git.encoder.layer[:-1]:
        compute = _function_of(layer)
        hidden = checkpoint(compute, hidden, mask, use_reentrant=False) if use_checkpointing else compute(hidden, mask)
    result: torch.Tensor = _function_of(git.encoder.layer[-1])(hidden, mask, text_only=True)
    return result


def _function_of(layer: Any) -> Any:
    """Return `text_layer` of a layer: where weights are sharded, the method that gathers them first."""
    return getattr(layer, "text_layer", None) or partial(text_layer, layer)


def text_layer(layer: Any, hidden: torch.Tensor, mask: torch.Tensor, text_only: bool = False) -> torch.Tensor:
    """Return the output of one layer for image and text, float [N, I + T, hidden]; with `text_only` [N, T, hidden].

    `mask`: bool [T, I + T], which tokens each text token attends to.
    """
    length, image_tokens = len(mask), mask.shape[1] - len(mask)
    attention = layer.attention.self
    heads = attention.num_attention_heads, attention.attention_head_size
    inputs = hidden[:, image_tokens:] if text_only else hidden
    projected = (attention.query(inputs), attention.key(hidden), attention.value(hidden))
    queries, keys, values = (part.unflatten(2, heads).transpose(1, 2) for part in projected)
    dropout = attention.dropout.p if attention.training else 0.0
    outputs = scaled_dot_product_attention(queries[:, :, -length:], keys, values, attn_mask=mask, dropout_p=dropout)
    if not text_only:
        query, key, value = (part[:, :, :image_tokens] for part in (queries, keys, values))
        of_image = scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        outputs = torch.cat([of_image, outputs], dim=2)
    result: torch.Tensor = layer.feed_forward_chunk(layer.attention.output(outputs.transpose(1, 2).flatten(2), inputs))
    return result
