"""Greedy search: take the most probable token until it is an end token."""

from __future__ import annotations

import torch

from captioner.models.git.network import GitNetwork
from captioner.models.git.task import SearchResult, Task


class GreedySearch:
    """A Search that is greedy. `texts`: int64 [N, T]. `logprobs`: float32 [N, limit].

    `unfinished`: bool [N], captions without an end token.
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
