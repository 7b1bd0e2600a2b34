"""Greedy and sampled search, and what every search of this package has: its settings, interface and result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, Self

import torch
from transformers import LogitsProcessorList

from captioner.models.git.network import GitNetwork, State
from captioner.models.logits import Sampling


@dataclass(frozen=True)
class Task:
    """The settings of a search. Their meanings are those of transformers' GenerationConfig.

    `prefix`: the P ids that every caption starts with. `limit`: the number of new tokens. `ends`: the ids that end a
    caption, int64 [E]. `sampling`: how tokens are drawn; None where the most probable are taken.
    """

    prefix: tuple[int, ...]
    limit: int
    ends: torch.Tensor
    padding: int
    processors: LogitsProcessorList
    beams: int
    early_stopping: bool | Literal["never"]
    length_penalty: float
    sampling: Sampling | None = None

    @property
    def length(self) -> int:
        """Return the number of text tokens of a caption, its prefix included."""
        return len(self.prefix) + self.limit


class SearchResult(NamedTuple):
    """`tokens` int64 [N, limit], padded after a caption's end token; `logprobs` float32 of the same shape.

    Of a search for several captions of an image both are [N, captions, limit].
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor


class Search(Protocol):
    """The search for the captions of one batch of N images.

    Its tensors are changed in place, so that a step can be captured in a CUDA graph.
    """

    state: State

    @property
    def unfinished(self) -> torch.Tensor:
        """Return bool [N]: the images whose captions may still change."""
        ...

    def begin(self) -> None:
        """Reset all texts to the prefix."""
        ...

    def step(self, index: int) -> None:
        """Add the token number `index` to each caption."""
        ...

    def result(self) -> SearchResult:
        """Return the captions so far."""
        ...

    def copy_to(self, images: torch.Tensor, out: Self) -> None:
        """Copy the state of the images with these indices, int64 [M], into `out`, a search for M images."""
        ...


class GreedySearch:
    """A Search that takes the most probable token until it is an end token.

    `texts`: int64 [N, T]. `logprobs`: float32 [N, limit]. `unfinished`: bool [N], captions without an end
    token.
    """

    def __init__(self, network: GitNetwork, task: Task, images: int) -> None:
        self.network, self.task = network, task
        self.state = network.new_state(images, 1, task.length)
        device = network.device
        self.texts = torch.zeros((images, task.length), dtype=torch.long, device=device)
        self.logprobs = torch.zeros((images, task.limit), device=device)
        self.unfinished = torch.zeros(images, dtype=torch.bool, device=device)

    def begin(self) -> None:
        """Reset all texts to the prefix."""
        self.texts.fill_(self.task.padding)
        for index, token in enumerate(self.task.prefix):
            self.texts[:, index] = token
        self.logprobs.zero_()
        self.unfinished.fill_(True)

    def step(self, index: int) -> None:
        """Add the token number `index` to each unfinished caption."""
        task, state = self.task, self.state
        logits = self.network.step(state)[:, 0]
        if task.processors:
            logits = task.processors(self.texts[:, : len(task.prefix) + index], logits)
        tokens, logprobs = self.network.best_tokens(logits)
        self.logprobs.index_copy_(1, state.position - (len(task.prefix) - 1), logprobs[:, None])
        tokens = tokens.where(self.unfinished, task.padding)
        state.position += 1
        state.tokens.copy_(tokens[:, None])
        self.texts.index_copy_(1, state.position, tokens[:, None])
        self.unfinished &= ~(tokens[:, None] == task.ends).any(1)

    def result(self) -> SearchResult:
        """Return the captions so far."""
        return SearchResult(self.texts[:, len(self.task.prefix) :], self.logprobs)

    def copy_to(self, images: torch.Tensor, out: GreedySearch) -> None:
        """Copy the state of the images with these indices, int64 [M], into `out`, a search for M images."""
        self.state.copy_to(images, out.state)
        for name in ("texts", "logprobs", "unfinished"):
            getattr(out, name).copy_(getattr(self, name)[images])


class SampledSearch:
    """A Search that draws B captions of each image, which share the keys and values of its image tokens.

    `texts`: int64 [N, B, T]. `logprobs`: float32 [N, B, limit]. `numbers`: float32 or float64 [N, B, limit], the random
    number of each token, to be set before the first step. `is_open`: bool [N, B], captions without an end token.
    """

    def __init__(self, network: GitNetwork, task: Task, images: int) -> None:
        assert task.sampling is not None
        self.network, self.task, self.sampling = network, task, task.sampling
        count, device = task.sampling.num_captions, network.device
        self.state = network.new_state(images, count, task.length)
        self.state.sources.copy_(torch.arange(count, device=device)[None, :, None])  # each reads its own cache
        self.texts = torch.zeros((images, count, task.length), dtype=torch.long, device=device)
        self.logprobs = torch.zeros((images, count, task.limit), device=device)
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.numbers = torch.zeros((images, count, task.limit), dtype=exact, device=device)
        self.is_open = torch.zeros((images, count), dtype=torch.bool, device=device)

    def begin(self) -> None:
        """Reset all texts to the prefix."""
        self.texts.fill_(self.task.padding)
        for index, token in enumerate(self.task.prefix):
            self.texts[:, :, index] = token
        self.logprobs.zero_()
        self.is_open.fill_(True)

    @property
    def unfinished(self) -> torch.Tensor:
        """Return bool [N]: the images with a caption that may still change."""
        return self.is_open.any(1)

    def step(self, index: int) -> None:
        """Add the token number `index` to each caption that has no end token."""
        task, state = self.task, self.state
        logprobs = self.network.logprobs(self.network.step(state)).flatten(0, 1)
        if task.processors:
            texts = self.texts[:, :, : len(task.prefix) + index].flatten(0, 1)
            logprobs = task.processors(texts, logprobs).log_softmax(-1)
        number = state.position - (len(task.prefix) - 1)  # `index`, known on the device
        drawn = self.sampling.draw(logprobs, self.numbers.index_select(2, number).flatten())
        new = logprobs.gather(1, drawn[:, None]).view(*self.is_open.shape, 1)
        self.logprobs.index_copy_(2, number, new)
        tokens = drawn.view(self.is_open.shape).where(self.is_open, task.padding)
        state.position += 1
        state.tokens.copy_(tokens)
        self.texts.index_copy_(2, state.position, tokens[:, :, None])
        self.is_open &= ~(tokens[:, :, None] == task.ends).any(2)

    def result(self) -> SearchResult:
        """Return the captions so far, [N, B, limit]."""
        return SearchResult(self.texts[:, :, len(self.task.prefix) :], self.logprobs)

    def copy_to(self, images: torch.Tensor, out: SampledSearch) -> None:
        """Copy the state of the images with these indices, int64 [M], into `out`, a search for M images."""
        self.state.copy_to(images, out.state)
        for name in ("texts", "logprobs", "numbers", "is_open"):
            getattr(out, name).copy_(getattr(self, name)[images])
