"""What a search is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, Self

import torch
from transformers import LogitsProcessorList

from captioner.models.git_fast.network import State


@dataclass(frozen=True)
class Task:
    """The settings of a search, by the names and meanings of transformers' GenerationConfig.

    `prefix`: ids every caption starts from, P of them. `limit`: new tokens. `ends`: ids that end a caption, int64 [E].
    """

    prefix: tuple[int, ...]
    limit: int
    ends: torch.Tensor
    padding: int
    processors: LogitsProcessorList
    beams: int
    early_stopping: bool | Literal["never"]
    length_penalty: float

    @property
    def length(self) -> int:
        """Return the number of text tokens of a caption, its prefix included."""
        return len(self.prefix) + self.limit


class SearchResult(NamedTuple):
    """`tokens` int64 [N, limit], padded after a caption's end token; `logprobs` float32 of the same shape."""

    tokens: torch.Tensor
    logprobs: torch.Tensor


class Search(Protocol):
    """The search for the captions of one batch of N images.

    Every tensor of it is changed in place, so that a step can be captured in a graph.
    """

    state: State

    @property
    def unfinished(self) -> torch.Tensor:
        """Return bool [N]: the images whose captions may still change."""
        ...

    def begin(self) -> None:
        """Empty the texts but for the prefix."""
        ...

    def step(self, index: int) -> None:
        """Add the token number `index` to each caption."""
        ...

    def result(self) -> SearchResult:
        """Return the captions so far."""
        ...

    def copy_to(self, images: torch.Tensor, out: Self) -> None:
        """Copy the part of some images, int64 [M], into `out`, a search for M images."""
        ...
