"""Beam search with the scores, the bookkeeping and the ties of transformers' `generate` (5.23, `_beam_search`).

Each picture has B running beams, and its B best finished captions so far. At each step the K best continuations over
all running beams are found, K enough that B of them go on even if the others end. Of the B best, those that end join
the finished captions, scored by log-probability / length ** length_penalty.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from captioner.models.git_fast.found import Found, Task, half_of, read_prefix
from captioner.models.git_fast.graphs import Stepper
from captioner.models.git_fast.network import State

NEVER = -1.0e9  # a score that loses to any real one


@dataclass
class Beams:
    """Captions of N pictures, M for each: texts int64 [N, M, T], logprobs float32 [N, M, T], scores float32 [N, M]."""

    texts: torch.Tensor
    logprobs: torch.Tensor
    scores: torch.Tensor

    def pick(self, chosen: torch.Tensor) -> Beams:
        """Of each picture the captions `chosen`, int64 [N, any]."""
        rows = torch.arange(len(chosen), device=chosen.device)[:, None]
        return Beams(self.texts[rows, chosen], self.logprobs[rows, chosen], self.scores[rows, chosen])

    def of(self, pictures: torch.Tensor) -> Beams:
        return Beams(*(getattr(self, field.name)[pictures] for field in fields(self)))


@dataclass
class Search:
    """A beam search under way. `finished` holds B captions for each picture, `full` bool [N, B] which of them are real.
    `open`: bool [N], whether running beams may still beat the finished captions."""

    running: Beams
    finished: Beams
    full: torch.Tensor
    open: torch.Tensor

    def of(self, pictures: torch.Tensor) -> Search:
        return Search(self.running.of(pictures), self.finished.of(pictures), self.full[pictures], self.open[pictures])

    def unfinished(self, task: Task) -> torch.Tensor:
        """bool [N]: the pictures whose finished captions may still change."""
        return self.open & ~self.full.all(1) if task.early_stopping is True else self.open


def beam_search(stepper: Stepper, task: Task, first: State) -> Found:
    """The best captions of the pictures encoded in `first`, a state of one beam."""
    count, start, device = len(first.tokens), len(task.prefix), first.tokens.device
    search = _begin(task, count, device)
    texts, logprobs = search.finished.texts[:, 0].clone(), search.finished.logprobs[:, 0].clone()
    rows = torch.arange(count, device=device)
    logits = read_prefix(stepper, task, first).expand(-1, task.beams, -1)
    state = first.expand(stepper.state(count, task.beams, start + task.limit))
    for place in range(task.limit):
        parents = _advance(search, task, logits, place)
        texts[rows], logprobs[rows] = search.finished.texts[:, 0], search.finished.logprobs[:, 0]
        unfinished = search.unfinished(task)
        if place + 1 == task.limit or not unfinished.any():
            break
        state.reorder(parents + torch.arange(len(parents), device=device)[:, None] * task.beams)
        state.tokens.copy_(search.running.texts[:, :, start + place])
        state.position.fill_(start + place)
        half = half_of(stepper, state, unfinished)
        if half is not None:
            state, kept = half
            rows, search = rows[kept], search.of(kept)
        logits = stepper.step(state)
    return Found(texts[:, start:], logprobs)


def _begin(task: Task, count: int, device: torch.device) -> Search:
    """One beam can go on; the others would double it."""
    start = len(task.prefix)
    texts = torch.full((count, task.beams, start + task.limit), task.padding, dtype=torch.long, device=device)
    texts[:, :, :start] = task.prefix
    logprobs = torch.zeros(count, task.beams, task.limit, device=device)
    never = torch.full((count, task.beams), NEVER, device=device)
    scores = never.clone()
    scores[:, 0] = 0
    full = torch.zeros(count, task.beams, dtype=torch.bool, device=device)
    finished = Beams(texts.clone(), logprobs.clone(), never)
    return Search(Beams(texts, logprobs, scores), finished, full, full.new_ones(count))


def _advance(search: Search, task: Task, logits: torch.Tensor, place: int) -> torch.Tensor:
    """One more token for each beam, `logits` [N, B, vocabulary]; returns the beams they go on from, int64 [N, B]."""
    candidates, parents = _continuations(search.running, task, logits, place)
    ends = torch.isin(candidates.texts[:, :, len(task.prefix) + place], task.ends)
    if place + 1 == task.limit:
        ends = torch.ones_like(ends)
    _keep_finished(search, task, candidates, ends, place + 1)
    candidates.scores = candidates.scores + ends * NEVER
    chosen = candidates.scores.topk(task.beams)[1]
    search.running = candidates.pick(chosen)
    _close(search, task, place + 1)
    return parents.gather(1, chosen)


def _continuations(running: Beams, task: Task, logits: torch.Tensor, place: int) -> tuple[Beams, torch.Tensor]:
    """The K best continuations [N, K] of the running beams, best first, and the beams they continue."""
    beams, vocabulary = logits.shape[1:]
    length = len(task.prefix) + place
    logprobs = logits.flatten(0, 1).log_softmax(-1)
    logprobs = task.processors(running.texts[:, :, :length].flatten(0, 1), logprobs).view(logits.shape)
    totals = (logprobs + running.scores[:, :, None]).flatten(1)
    scores, places = totals.topk(max(2, 1 + len(task.ends)) * beams)
    parents, tokens = places // vocabulary, places % vocabulary
    candidates = running.pick(parents)
    candidates.texts[:, :, length] = tokens
    candidates.logprobs[:, :, place] = logprobs.flatten(1).gather(1, places)
    candidates.scores = scores
    return candidates, parents


def _keep_finished(search: Search, task: Task, candidates: Beams, ends: torch.Tensor, length: int) -> None:
    """Of the finished captions and the B best candidates that end, keep the B best. `length`: in new tokens."""
    ended = ends.clone()
    ended[:, task.beams :] = False  # the others are there only so that enough beams go on
    scores = candidates.scores / length**task.length_penalty
    if task.early_stopping is True:
        scores = scores + search.full.all(1, keepdim=True) * NEVER
    scores = scores + ~search.open[:, None] * NEVER + ~ended * NEVER
    before = search.finished
    merged = Beams(
        torch.cat([before.texts, candidates.texts], 1),
        torch.cat([before.logprobs, candidates.logprobs], 1),
        torch.cat([before.scores, scores], 1),
    )
    chosen = merged.scores.topk(task.beams)[1]
    search.finished = merged.pick(chosen)
    search.full = torch.cat([search.full, ended], 1).gather(1, chosen)


def _close(search: Search, task: Task, length: int) -> None:
    """Close the pictures whose running beams cannot beat their worst finished caption, as transformers estimates it."""
    if task.early_stopping == "never" and task.length_penalty > 0:
        length = task.limit
    best = search.running.scores[:, :1] / length**task.length_penalty
    worst = search.finished.scores.min(1, keepdim=True)[0].where(search.full, NEVER)
    search.open = search.open & (best > worst).any(1)
