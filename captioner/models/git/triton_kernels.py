"""GPU kernels for the operations between GIT's matrix products, in Triton, which CUDA builds of torch install.

Each reads and writes its operands once, in their own dtype, and computes in float32. Rows are contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS = 2048  # in a program of an element-wise kernel
VOCABULARY_BLOCK = 4096
IMAGE_BLOCK = 64
TEXT_BLOCK = 4
MIN_ROWS = 16  # of a matrix product on tensor cores


def shifted_layer_norm(hidden: torch.Tensor, shift: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    """Return the layer norm of `hidden + shift`: [rows, width], and float32 [width] added to every row."""
    return _layer_norm(hidden, shift, norm, 0)


def added_layer_norm(hidden: torch.Tensor, delta: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    """Return the layer norm of `hidden + delta`, both [rows, width]."""
    return _layer_norm(hidden, delta, norm, hidden.shape[1])


def _layer_norm(hidden: torch.Tensor, delta: torch.Tensor, norm: torch.nn.LayerNorm, stride: int) -> torch.Tensor:
    normed = torch.empty_like(hidden)
    rows, width = hidden.shape
    block = triton.next_power_of_2(width)
    _add_and_norm[(rows,)](hidden, delta, normed, norm.weight, norm.bias, norm.eps, width, stride, block, num_warps=4)
    return normed


@triton.jit
def _add_and_norm(hidden, delta, normed, weight, bias, eps, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.load(hidden + row * width + columns, mask=inside, other=0).to(tl.float32)
    total += tl.load(delta + row * stride + columns, mask=inside, other=0).to(tl.float32)
    centred = tl.where(inside, total - tl.sum(total, 0) / width, 0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    factor = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    offset = tl.load(bias + columns, mask=inside, other=0).to(tl.float32)
    result = (centred * scale * factor + offset).to(normed.dtype.element_ty)
    tl.store(normed + row * width + columns, result, mask=inside)


def quick_gelu_(values: torch.Tensor) -> torch.Tensor:
    """Replace contiguous `values` by `values * sigmoid(1.702 * values)`."""
    count = values.numel()
    _quick_gelu[(triton.cdiv(count, ELEMENTS),)](values, count, ELEMENTS, num_warps=4)
    return values


@triton.jit
def _quick_gelu(values, count, BLOCK: tl.constexpr):
    indices = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = indices < count
    x = tl.load(values + indices, mask=inside, other=0).to(tl.float32)
    tl.store(values + indices, (x * tl.sigmoid(1.702 * x)).to(values.dtype.element_ty), mask=inside)


def attend(
    new: torch.Tensor,
    image: torch.Tensor,
    text: torch.Tensor,
    sources: torch.Tensor,
    position: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """Add the newest tokens to the text cache and return their attention to image and text, [N x B, H x d].

    `new` [N x B, 3 x H x d]: queries, keys and values of the newest tokens. `image` [N, I, 2 x H x d], `text`
    [N, B, T, 2 x H x d]: keys and values. `sources` int32 [N, B, T]: the beam that holds the token at each position.
    """
    images, beams, length, _ = text.shape
    width = new.shape[1] // (3 * heads)
    output = new.new_empty(len(new), heads * width)
    _attend[(images, heads)](
        new,
        image,
        text,
        sources,
        position,
        output,
        image.shape[1],
        beams,
        length,
        width**-0.5,
        heads * width,
        width,
        max(MIN_ROWS, triton.next_power_of_2(beams)),
        beams > 1,
        IMAGE_BLOCK,
        TEXT_BLOCK,
        num_warps=4,
    )
    return output


@triton.jit
def _attend(
    new,
    image,
    text,
    sources,
    position,
    output,
    image_tokens,
    beams,
    length,
    scale,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BEAMS: tl.constexpr,
    MANY: tl.constexpr,
    IMAGE_BLOCK: tl.constexpr,
    TEXT_BLOCK: tl.constexpr,
):
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    beam, column = tl.arange(0, BEAMS), tl.arange(0, WIDTH)
    is_beam = beam < beams
    rows = (index * beams + beam)[:, None] * (3 * DIM) + head * WIDTH + column[None, :]
    query = tl.load(new + rows, mask=is_beam[:, None], other=0)
    key = tl.load(new + rows + DIM, mask=is_beam[:, None], other=0)
    value = tl.load(new + rows + 2 * DIM, mask=is_beam[:, None], other=0)
    now = tl.load(position)
    slots = ((index * beams + beam) * length + now)[:, None] * (2 * DIM) + head * WIDTH + column[None, :]
    tl.store(text + slots, key, mask=is_beam[:, None])
    tl.store(text + slots + DIM, value, mask=is_beam[:, None])
    scaled = query.to(tl.float32) * scale
    # The newest token attends to itself. The softmax starts with it and is corrected when a higher score occurs.
    highest = tl.sum(scaled * key.to(tl.float32), 1)
    weights = tl.full([BEAMS], 1.0, tl.float32)
    result = value.to(tl.float32)

    for first in range(0, image_tokens, IMAGE_BLOCK):
        token = first + tl.arange(0, IMAGE_BLOCK)
        is_token = token < image_tokens
        cells = (index * image_tokens + token)[:, None] * (2 * DIM) + head * WIDTH + column[None, :]
        keys = tl.load(image + cells, mask=is_token[:, None], other=0)
        values = tl.load(image + cells + DIM, mask=is_token[:, None], other=0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(is_token[None, :], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        correction = tl.exp(highest - higher)
        shares = tl.exp(scores - higher[:, None])
        weights = weights * correction + tl.sum(shares, 1)
        result = result * correction[:, None] + tl.dot(shares.to(values.dtype), values, input_precision="ieee")
        highest = higher

    for first in range(0, now, TEXT_BLOCK):
        token = first + tl.arange(0, TEXT_BLOCK)
        is_token = (token < now)[None, :] & is_beam[:, None]
        cell = ((index * beams + beam) * length)[:, None] + token[None, :]
        if MANY:
            source = tl.load(sources + cell, mask=is_token, other=0)
            cell = (index * beams + source) * length + token[None, :]
        cell = cell * (2 * DIM) + head * WIDTH
        cells = cell[:, :, None] + column[None, None, :]
        keys = tl.load(text + cells, mask=is_token[:, :, None], other=0).to(tl.float32)
        values = tl.load(text + cells + DIM, mask=is_token[:, :, None], other=0).to(tl.float32)
        scores = tl.where(is_token, tl.sum(scaled[:, None, :] * keys, 2), -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        correction = tl.exp(highest - higher)
        shares = tl.exp(scores - higher[:, None])
        weights = weights * correction + tl.sum(shares, 1)
        result = result * correction[:, None] + tl.sum(shares[:, :, None] * values, 1)
        highest = higher

    out = (index * beams + beam)[:, None] * DIM + head * WIDTH + column[None, :]
    tl.store(output + out, (result / weights[:, None]).to(output.dtype.element_ty), mask=is_beam[:, None])


def best_logprobs(logits: torch.Tensor, vocabulary: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` highest log-probabilities of each row, float32 [rows, count], best first, and their ids.

    `logits` [rows, columns]: columns from `vocabulary` on are padding. Of equal values the lowest id comes first.
    """
    rows, columns = logits.shape
    values = torch.empty((rows, count), dtype=torch.float32, device=logits.device)
    ids = torch.empty((rows, count), dtype=torch.long, device=logits.device)
    _best_logprobs[(rows,)](logits, values, ids, columns, vocabulary, count, VOCABULARY_BLOCK, num_warps=8)
    return values, ids


@triton.jit
def _best_logprobs(logits, values, ids, columns, vocabulary, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + row * columns + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        is_finite = higher > -float("inf")
        total = tl.where(is_finite, total * tl.exp(highest - higher) + tl.exp(x - higher), total)
        highest = higher
    top = tl.max(highest, 0)
    logsumexp = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))

    last_value = float("inf")
    last_id = -1
    for rank in tl.static_range(COUNT):
        best, best_id = -float("inf"), 0
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            x = tl.load(logits + row * columns + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
            is_left = (x < last_value) | ((x == last_value) & (column > last_id))
            x = tl.where(is_left & (column < vocabulary), x, -float("inf"))
            value, offset = tl.max(x, 0, return_indices=True)
            best_id = tl.where(value > best, first + offset, best_id)
            best = tl.maximum(best, value)
        tl.store(values + row * COUNT + rank, best - logsumexp)
        tl.store(ids + row * COUNT + rank, best_id.to(tl.int64))
        last_value, last_id = best, best_id
