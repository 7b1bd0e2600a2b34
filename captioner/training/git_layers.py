"""GIT's text layers for training: only what the caption tokens need, in one pass over picture and text.

In GIT image tokens attend to each other and never to text, and text tokens to the whole picture and to the text before
them. So no mask over all pairs of tokens is needed, and in the last layer only text tokens ask: nobody reads what image
tokens would become.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint


def text_hidden(model: Any, features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the output of a GitForCausalLM's last layer at the text positions: float [N, T, hidden].

    `features`: of its image encoder, [N, I, width]; `ids`: int64 [N, T].
    """
    git = model.git
    picture = git.visual_projection(features)
    tokens, length = picture.shape[1], ids.shape[1]
    hidden = torch.cat([picture, git.embeddings(input_ids=ids)], dim=1)
    seen = torch.ones(length, tokens + length, dtype=torch.bool, device=ids.device).tril(tokens)
    saves_memory = model.training and model.is_activation_checkpointing
    for layer in git.encoder.layer[:-1]:
        if saves_memory:
            hidden = checkpoint(_layer, layer, hidden, seen, use_reentrant=False)
        else:
            hidden = _layer(layer, hidden, seen)
    return _layer(git.encoder.layer[-1], hidden, seen, text_only=True)


def _layer(layer: Any, hidden: torch.Tensor, seen: torch.Tensor, text_only: bool = False) -> torch.Tensor:
    """One layer on picture and text [N, I + T, hidden]; `seen` bool [T, I + T]: what each text token attends to."""
    length, tokens = len(seen), seen.shape[1] - len(seen)
    own = layer.attention.self
    heads = own.num_attention_heads, own.attention_head_size
    asking = hidden[:, tokens:] if text_only else hidden
    queries, keys, values = (
        part.unflatten(2, heads).transpose(1, 2) for part in (own.query(asking), own.key(hidden), own.value(hidden))
    )
    dropout = own.dropout.p if own.training else 0.0
    mixed = scaled_dot_product_attention(queries[:, :, -length:], keys, values, attn_mask=seen, dropout_p=dropout)
    if not text_only:
        ask, offer, give = (part[:, :, :tokens] for part in (queries, keys, values))
        mixed = torch.cat([scaled_dot_product_attention(ask, offer, give, dropout_p=dropout), mixed], dim=2)
    result: torch.Tensor = layer.feed_forward_chunk(layer.attention.output(mixed.transpose(1, 2).flatten(2), asking))
    return result
