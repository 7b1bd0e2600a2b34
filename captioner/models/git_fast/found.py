"""What a search is to do, and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from transformers import LogitsProcessorList

from captioner.models.git_fast.graphs import Stepper
from captioner.models.git_fast.network import State


@dataclass(frozen=True)
class Task:
    """The settings of a search, by the names and meanings of transformers' GenerationConfig.

    `prefix`: ids every caption starts from, int64 [P]. `limit`: new tokens. `ends`: ids that end a caption, int64 [E].
    """

    prefix: torch.Tensor
    limit: int
    ends: torch.Tensor
    padding: int
    processors: LogitsProcessorList
    beams: int
    early_stopping: bool | Literal["never"]
    length_penalty: float


class Found(NamedTuple):
    """`tokens` int64 [N, limit], padded after a caption's end token; `logprobs` float32 of the same shape."""

    tokens: torch.Tensor
    logprobs: torch.Tensor


def read_prefix(stepper: Stepper, task: Task, state: State) -> torch.Tensor:
    """Step through the prefix, one beam for each picture; logits [N, 1, vocabulary] of what follows it."""
    for place, token in enumerate(task.prefix):
        state.tokens.fill_(token)
        state.position.fill_(place)
        logits = stepper.step(state)
    return logits


def half_of(stepper: Stepper, state: State, unfinished: torch.Tensor) -> tuple[State, torch.Tensor] | None:
    """Where no more than half of the pictures are unfinished: a state of half as many, and which those are.

    `unfinished`: bool [N]. Halves, not exactly the unfinished ones: few sizes, so that graphs are used again, and few
    copies. Finished pictures fill up the half.
    """
    count = len(unfinished)
    if count < 2 or int(unfinished.sum()) > count // 2:
        return None
    kept = torch.argsort(~unfinished, stable=True)[: count // 2]
    beams, length = state.text_keys.shape[2], state.text_keys.shape[4]
    return state.take(kept, stepper.state(count // 2, beams, length)), kept
