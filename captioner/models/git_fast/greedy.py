"""Greedy search: the likeliest token, until it is an end token."""

from __future__ import annotations

import torch

from captioner.models.git_fast.found import Found, Task, half_of, read_prefix
from captioner.models.git_fast.graphs import Stepper
from captioner.models.git_fast.network import State


def greedy_search(stepper: Stepper, task: Task, state: State) -> Found:
    """The captions of the pictures encoded in `state`."""
    count, start, device = len(state.tokens), len(task.prefix), state.tokens.device
    texts = torch.full((count, start + task.limit), task.padding, dtype=torch.long, device=device)
    texts[:, :start] = task.prefix
    logprobs = torch.zeros(count, task.limit, device=device)
    rows = torch.arange(count, device=device)  # which picture each row of the state is
    unfinished = torch.ones(count, dtype=torch.bool, device=device)
    logits = read_prefix(stepper, task, state)
    for place in range(task.limit):
        scores = task.processors(texts[rows, : start + place], logits[:, 0])
        best, tokens = scores.max(-1)
        logprobs[rows, place] = best - scores.logsumexp(-1)
        tokens = tokens.where(unfinished, task.padding)
        texts[rows, start + place] = tokens
        unfinished &= ~torch.isin(tokens, task.ends)
        if place + 1 == task.limit or not unfinished.any():
            break
        state.tokens.copy_(tokens[:, None])
        state.position.fill_(start + place)
        half = half_of(stepper, state, unfinished)
        if half is not None:
            state, kept = half
            rows, unfinished = rows[kept], unfinished[kept]
        logits = stepper.step(state)
    return Found(texts[:, start:], logprobs)
