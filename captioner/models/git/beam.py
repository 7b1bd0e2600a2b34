"""Beam search with the scores, the bookkeeping and the ties of transformers' `generate` (5.23, `_beam_search`).

Each image has B running beams and its B best finished captions. Each step takes the K best continuations over all
running beams, with K so large that B of them continue even if the others end. Those of the B best that end become
finished captions, scored by log-probability / length ** length_penalty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from captioner.models.git.network import GitNetwork, best_continuations
from captioner.models.git.searches import SearchResult, Task

LOWEST_SCORE = -1.0e9  # below any real score


@dataclass
class Beams:
    """M captions for each of N images: texts int64 [N, M, T], logprobs float32 [N, M, limit], scores [N, M]."""

    texts: torch.Tensor
    logprobs: torch.Tensor
    scores: torch.Tensor

    @classmethod
    def empty(cls, images: int, task: Task, device: torch.device) -> Beams:
        """Return empty captions, `task.beams` for each image."""
        texts = torch.zeros((images, task.beams, task.length), dtype=torch.long, device=device)
        logprobs = torch.zeros((images, task.beams, task.limit), device=device)
        return cls(texts, logprobs, torch.zeros((images, task.beams), device=device))

    def pick(self, indices: torch.Tensor) -> Beams:
        """Return the captions `indices`, int64 [N, any], of each image."""
        return Beams(_pick(self.texts, indices), _pick(self.logprobs, indices), self.scores.gather(1, indices))

    def copy_(self, other: Beams) -> None:
        """Copy the values of captions of the same shapes."""
        self.texts.copy_(other.texts)
        self.logprobs.copy_(other.logprobs)
        self.scores.copy_(other.scores)


class BeamSearch:
    """A Search with beams. `running`, `finished`: B captions for each image.

    `is_finished`: bool [N, B], which of `finished` hold a caption. `is_open`: bool [N], whether running beams can still
    score higher than the finished captions.
    """

    def __init__(self, network: GitNetwork, task: Task, images: int) -> None:
        self.network, self.task = network, task
        self.state = network.new_state(images, task.beams, task.length)
        device = network.device
        self.running, self.finished = (Beams.empty(images, task, device) for _ in range(2))
        self.is_finished = torch.zeros((images, task.beams), dtype=torch.bool, device=device)
        self.is_open = torch.zeros(images, dtype=torch.bool, device=device)
        lengths = range(1, task.limit + 1)
        self._penalties = torch.tensor([length**task.length_penalty for length in lengths], device=device)
        self._is_last = torch.tensor([length == task.limit for length in lengths], device=device)

    def begin(self) -> None:
        """Reset all texts to the prefix. Only one beam of each image starts, since the others would be equal to it."""
        for beams in (self.running, self.finished):
            beams.texts.fill_(self.task.padding)
            for index, token in enumerate(self.task.prefix):
                beams.texts[:, :, index] = token
            beams.logprobs.zero_()
            beams.scores.fill_(LOWEST_SCORE)
        self.running.scores[:, 0] = 0
        self.is_finished.fill_(False)
        self.is_open.fill_(True)

    @property
    def unfinished(self) -> torch.Tensor:
        """Return bool [N]: the images whose finished captions may still change."""
        return self.is_open & ~self.is_finished.all(1) if self.task.early_stopping is True else self.is_open

    def step(self, index: int) -> None:
        """Add the token number `index` to each beam."""
        task, state = self.task, self.state
        logits = self.network.step(state)
        number = state.position - (len(task.prefix) - 1)  # `index`, known on the device
        candidates, parents = self._continuations(logits, index, number)
        tokens = candidates.texts.index_select(2, state.position + 1).squeeze(2)
        ends = (tokens[:, :, None] == task.ends).any(2) | self._is_last[number]
        penalty = self._penalties[number]
        self._keep_finished(candidates, ends, penalty)
        candidates.scores = candidates.scores + ends * LOWEST_SCORE
        chosen = candidates.scores.topk(task.beams)[1]
        self.running.copy_(candidates.pick(chosen))
        self._update_open(penalty)
        self.network.reorder(state, parents.gather(1, chosen))
        state.tokens.copy_(tokens.gather(1, chosen))
        state.position += 1

    def _continuations(self, logits: torch.Tensor, index: int, number: torch.Tensor) -> tuple[Beams, torch.Tensor]:
        """Return the K best continuations of the running beams, best first, and the beams [N, K] they continue."""
        task, running = self.task, self.running
        count = max(2, 1 + len(task.ends)) * task.beams
        if task.processors:
            texts = running.texts[:, :, : len(task.prefix) + index].flatten(0, 1)
            logprobs = self.network.logprobs(logits)
            logprobs = task.processors(texts, logprobs.flatten(0, 1)).view(logprobs.shape)
            scores, parents, tokens, new = best_continuations(logprobs, running.scores, count)
        else:
            scores, parents, tokens, new = self.network.best_continuations(logits, running.scores, count)
        candidates = running.pick(parents)
        candidates.texts.index_copy_(2, self.state.position + 1, tokens[:, :, None])
        candidates.logprobs.index_copy_(2, number, new[:, :, None])
        candidates.scores = scores
        return candidates, parents

    def _keep_finished(self, candidates: Beams, ends: torch.Tensor, penalty: torch.Tensor) -> None:
        """Keep the B best of the finished captions and of those of the B best candidates that end."""
        task, before = self.task, self.finished
        ended = ends.clone()
        ended[:, task.beams :] = False  # the others are candidates only so that enough beams continue
        scores = candidates.scores / penalty
        if task.early_stopping is True:
            scores = scores + self.is_finished.all(1, keepdim=True) * LOWEST_SCORE
        scores = scores + ~self.is_open[:, None] * LOWEST_SCORE + ~ended * LOWEST_SCORE
        merged = Beams(
            torch.cat([before.texts, candidates.texts], 1),
            torch.cat([before.logprobs, candidates.logprobs], 1),
            torch.cat([before.scores, scores], 1),
        )
        chosen = merged.scores.topk(task.beams)[1]
        self.is_finished.copy_(torch.cat([self.is_finished, ended], 1).gather(1, chosen))
        self.finished.copy_(merged.pick(chosen))

    def _update_open(self, penalty: torch.Tensor) -> None:
        """Close images whose running beams cannot beat their worst finished caption, by transformers' estimate."""
        task = self.task
        if task.early_stopping == "never" and task.length_penalty > 0:
            penalty = self._penalties[-1]
        best = self.running.scores[:, :1] / penalty
        worst = self.finished.scores.min(1, keepdim=True)[0].where(self.is_finished, LOWEST_SCORE)
        self.is_open &= (best > worst).any(1)

    def result(self) -> SearchResult:
        """Return the best captions so far."""
        return SearchResult(self.finished.texts[:, 0, len(self.task.prefix) :], self.finished.logprobs[:, 0])

    def copy_to(self, images: torch.Tensor, out: BeamSearch) -> None:
        """Copy the state of the images with these indices, int64 [M], into `out`, a search for M images."""
        self.state.copy_to(images, out.state)
        for source, target in ((self.running, out.running), (self.finished, out.finished)):
            target.copy_(Beams(source.texts[images], source.logprobs[images], source.scores[images]))
        out.is_finished.copy_(self.is_finished[images])
        out.is_open.copy_(self.is_open[images])


def _pick(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the elements `indices`, int64 [N, any], of each image: [N, M, X] -> [N, any, X]."""
    return values.gather(1, indices[:, :, None].expand(-1, -1, values.shape[2]))
