"""What becomes of a model's logits: log-probabilities of the tokens of captions, and tokens that are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, TopPLogitsWarper

from captioner.models.ref import ModelRef


class ScoreRecorder(LogitsProcessor):
    """Records the highest log-probabilities of each step, instead of all scores [steps, N, vocabulary].

    Beam search takes the `max(2, 1 + ends) * beams` best continuations over all beams of an image, so each of them is
    among as many best of its own beam; greedy search takes the best.
    """

    def __init__(self, num_beams: int, num_ends: int) -> None:
        self.has_beams = num_beams > 1
        self.num_recorded = max(2, 1 + num_ends) * num_beams if self.has_beams else 1
        self.values: list[torch.Tensor] = []
        self.ids: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Beam search passes log-probabilities, greedy search logits.
        logprobs = scores if self.has_beams else scores.float().log_softmax(-1)
        values, ids = logprobs.topk(min(self.num_recorded, scores.shape[-1]))
        self.values.append(values)
        self.ids.append(ids)
        return scores

    def logprobs(self, tokens: torch.Tensor, beam_indices: torch.Tensor | None) -> torch.Tensor:
        """Return the log-probability of each generated token, float32 [N, T] on the CPU, for tokens [N, T].

        `beam_indices` [N, T]: the row of the search each token is from; negative after the end of a caption.
        """
        steps = tokens.shape[1]
        values, ids = torch.stack(self.values[:steps]).cpu(), torch.stack(self.ids[:steps]).cpu()
        if beam_indices is None:
            return values[:, :, 0].T
        rows = beam_indices[:, :steps].cpu().clamp(min=0).T.long()  # [T, N]
        step = torch.arange(steps)[:, None]
        values, matches = values[step, rows], ids[step, rows] == tokens.T[:, :, None]
        # A generated token that was not recorded has the same value as the last one recorded.
        return torch.where(matches.any(-1), values.where(matches, 0).sum(-1), values[..., -1]).T


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, by random numbers that belong to the caption (see `captioner.models.seeds`).

    transformers draws the tokens of a whole batch from one generator, so a caption would depend on its batch.
    `temperature`, `top_p`: as in its GenerationConfig. `num_captions`: of each image.
    """

    temperature: float
    top_p: float
    num_captions: int

    @classmethod
    def from_model(cls, ref: ModelRef) -> Sampling | None:
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


def token_counts(tokens: torch.Tensor, end_ids: Sequence[int]) -> tuple[list[int], list[bool]]:
    """Return the number of tokens of each caption, end token included, and whether it has one, for tokens [N, T]."""
    ends = torch.isin(tokens, torch.tensor(list(end_ids), dtype=tokens.dtype))
    finished = ends.any(1)
    first = ends.int().argmax(1) + 1 if tokens.shape[1] else torch.zeros(len(tokens), dtype=torch.long)
    return torch.where(finished, first, tokens.shape[1]).tolist(), finished.tolist()


def mean_logprobs(logprobs: torch.Tensor, counts: Sequence[int]) -> list[float]:
    """Return the mean of the first `counts[n]` values of row n of `logprobs` float32 [N, T], in float64; NaN for 0."""
    lengths = torch.tensor(counts)
    is_caption = torch.arange(logprobs.shape[1]) < lengths[:, None]
    means: list[float] = (logprobs.double().where(is_caption, 0.0).sum(1) / lengths).tolist()
    return means
