"""Which tokens a caption has, and how probable the model held them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


class ScoreRecorder(LogitsProcessor):
    """Keeps the log-probabilities that the search can still choose from, rather than [steps, N, vocabulary] scores.

    Beam search takes its `max(2, 1 + ends) * beams` best continuations over all beams of a picture, so each of them
    is among as many best of its own beam; greedy search takes the single best.
    """

    def __init__(self, num_beams: int, num_ends: int) -> None:
        self.beams = num_beams > 1
        self.kept = max(2, 1 + num_ends) * num_beams if self.beams else 1
        self.values: list[torch.Tensor] = []
        self.ids: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Beam search hands over log-probabilities, greedy search logits.
        logprobs = scores if self.beams else scores.float().log_softmax(-1)
        values, ids = logprobs.topk(min(self.kept, scores.shape[-1]))
        self.values.append(values)
        self.ids.append(ids)
        return scores

    def logprobs(self, tokens: torch.Tensor, beam_indices: torch.Tensor | None) -> torch.Tensor:
        """Log-probability of each generated token, float32 [N, T] on the CPU, for tokens [N, T].

        `beam_indices` [N, T]: the row of the search each token came from; negative after the end of a caption.
        """
        steps = tokens.shape[1]
        values, ids = torch.stack(self.values[:steps]).cpu(), torch.stack(self.ids[:steps]).cpu()
        if beam_indices is None:
            return values[:, :, 0].T
        rows = beam_indices[:, :steps].cpu().clamp(min=0).T.long()  # [T, N]
        step = torch.arange(steps)[:, None]
        values, found = values[step, rows], ids[step, rows] == tokens.T[:, :, None]
        # A token that is not among the kept ones ties with the last of them, else it would have lost to it.
        return torch.where(found.any(-1), values.where(found, 0).sum(-1), values[..., -1]).T


def token_counts(tokens: torch.Tensor, end_ids: Sequence[int]) -> tuple[list[int], list[bool]]:
    """For generated tokens [N, T]: how many each caption has, its end token included, and whether it has one."""
    ends = torch.isin(tokens, torch.tensor(list(end_ids), dtype=tokens.dtype))
    finished = ends.any(1)
    first = ends.int().argmax(1) + 1 if tokens.shape[1] else torch.zeros(len(tokens), dtype=torch.long)
    return torch.where(finished, first, tokens.shape[1]).tolist(), finished.tolist()


def mean_logprobs(logprobs: torch.Tensor, counts: Sequence[int]) -> list[float]:
    """Mean of the first `counts[n]` values of each row of `logprobs` float32 [N, T], in float64; NaN of none."""
    number = torch.tensor(counts)
    own = torch.arange(logprobs.shape[1]) < number[:, None]
    means: list[float] = (logprobs.double().where(own, 0.0).sum(1) / number).tolist()
    return means
