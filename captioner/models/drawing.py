"""Draw tokens at a temperature, by random numbers that each caption brings along (see `captioner.models.seeds`).

transformers draws the tokens of a whole batch from one generator, so a caption would depend on its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, TopPLogitsWarper

from captioner.models.ref import ModelRef


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `num_captions`: of each image. Meanings as in transformers' GenerationConfig."""

    temperature: float
    top_p: float
    num_captions: int

    @classmethod
    def of(cls, ref: ModelRef) -> Sampling | None:
        """Return the sampling of a model; None where it searches greedily or with beams."""
        return cls(ref.temperature, ref.top_p, ref.num_captions) if ref.temperature else None

    def draw(self, logprobs: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return a token of each row, int64 [N].

        `logprobs`: [N, vocabulary]. `numbers`: [N] in [0, 1); a token is drawn by where its number lies in the sum of
        the probabilities.
        """
        # Less its maximum, so that the lowest temperatures leave one finite score instead of none.
        scores = (logprobs - logprobs.amax(-1, keepdim=True)) / self.temperature
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        # float64 where there is one: in float32 rounding would shift the limits between tokens.
        exact = torch.float32 if scores.device.type == "mps" else torch.float64
        sums = scores.softmax(-1, dtype=exact).cumsum(-1)
        at = numbers.to(exact)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, at, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)


class DrawingProcessor(LogitsProcessor):
    """Draws each token for `generate`, which gets no other choice, and records log-probabilities.

    These are the model's own, at temperature 1, as in greedy search. `numbers`: [rows, steps], on any device.
    """

    def __init__(self, sampling: Sampling, numbers: torch.Tensor) -> None:
        self._sampling, self._numbers = sampling, numbers
        self._values: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprobs = scores.float().log_softmax(-1)
        numbers = self._numbers[:, len(self._values)].to(scores.device)
        tokens = self._sampling.draw(logprobs, numbers)[:, None]
        self._values.append(logprobs.gather(-1, tokens)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens, 0.0)

    def logprobs(self, tokens: torch.Tensor, beam_indices: torch.Tensor | None) -> torch.Tensor:
        """Return the log-probability of each drawn token, float32 [rows, T] on the CPU, for tokens [rows, T]."""
        return torch.stack(self._values[: tokens.shape[1]]).cpu().T
