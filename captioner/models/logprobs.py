"""Log-probabilities and numbers of the tokens of captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


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
