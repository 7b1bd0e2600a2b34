"""The settings, the interface and the result of a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, Self

import torch
from transformers import LogitsProcessorList

from captioner.models.drawing import Sampling
from captioner.models.git.network import State


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
