"""Evaluation on the eval set: WER of generated captions, and loss, summed over workers.

Each worker takes every n-th window of the eval set and keeps only sums, so memory does not grow with the set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from captioner.console.text import counted
from captioner.models.base import TransformersCaptioner
from captioner.training.collate import Collate, batches_of, pixels_of
from captioner.training.loss import CaptionLoss

# Captions are shuffled within a window for the baseline, so windows do not depend on the number of workers.
WINDOW = 64
NUM_EXAMPLES = 12  # captions returned with the figures

_SUMS = ("edits", "words", "shuffled_edits", "shuffled_words", "loss", "tokens", "images")

TableDecoder = Callable[[Iterator[pa.Table]], Iterator[pa.Table]]
"""Decodes tables of pairs: the same tables with a column of pixels, in the same order."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates `captioner`, whose network `loss` wraps, on a table of pairs.

    `batch_size`: pairs in a batch for the loss. `all_reduce`: sums a float64 tensor over the workers. `show_status`:
    shows how far an evaluation is.
    """

    captioner: TransformersCaptioner
    loss: CaptionLoss
    collate: Collate
    decode: TableDecoder
    batch_size: int
    rank: int = 0
    world_size: int = 1
    all_reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums
    show_status: Callable[[str], None] = lambda text: None

    def __call__(self, pairs: pa.Table, windows: Iterator[pa.Table] | None = None) -> dict[str, Any]:
        """Return `wer`, `shuffled_wer`, `loss` (nats a token), `num_pictures` and `captions`.

        WER is that of generated captions, loss that of the first reference of each image. `captions`: references and
        caption of the first images, on rank 0. `windows`: the decoded `windows_of` these pairs, where decoding was
        started before.
        """
        was_training = self.loss.training
        self.show_status(f"evaluating {counted(len(pairs), 'image')}")
        self.loss.eval()
        try:
            windows = windows or self.decode(windows_of(pairs, self.rank, self.world_size))
            sums, examples = self._evaluate(windows, len(pairs))
        finally:
            self.loss.train(was_training)
            self.captioner.free_memory()
            self.show_status("")
        totals = self.all_reduce(torch.tensor([sums[name] for name in _SUMS], dtype=torch.float64)).tolist()
        total = dict(zip(_SUMS, totals, strict=True))
        return {
            "wer": _ratio(total["edits"], total["words"]),
            "shuffled_wer": _ratio(total["shuffled_edits"], total["shuffled_words"]),
            "loss": _ratio(total["loss"], total["tokens"]),
            "num_pictures": int(total["images"]),
            "captions": examples,
        }

    @torch.no_grad()
    def _evaluate(self, windows: Iterator[pa.Table], total: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return this worker's sums by the names of _SUMS, and its first captions."""
        from captioner.scoring.caption_wer import CaptionWer

        metric = CaptionWer(keep_in_memory=True, experiment_id=f"rank-{self.rank}")
        sums: dict[str, float] = dict.fromkeys(_SUMS, 0.0)
        examples: list[dict[str, Any]] = []
        for rows in windows:
            captions = self.captioner.caption(pixels_of(rows, self.collate.spec)).texts
            references = rows["reference_captions"].to_pylist()
            scores = metric.compute(predictions=captions, references=references)
            for name in _SUMS[:4]:
                sums[name] += scores[name]
            self._add_loss(sums, rows)
            sums["images"] += len(rows)
            self.show_status(f"evaluated {int(sums['images']) * self.world_size:,} of {counted(total, 'image')}")
            if self.rank == 0 and len(examples) < NUM_EXAMPLES:
                columns = zip(rows["image_id"].to_pylist(), references, captions, strict=True)
                examples += [{"image_id": i, "references": r, "caption": c} for i, r, c in columns]
        return sums, examples[:NUM_EXAMPLES]

    def _add_loss(self, sums: dict[str, float], rows: pa.Table) -> None:
        device = self.captioner.device
        for batch in batches_of([rows], self.batch_size, self.collate):
            on_device = {name: values.to(device) for name, values in batch.items()}
            sums["loss"] += self.loss(**on_device).item()
            sums["tokens"] += len(batch["labels"])


def windows_of(pairs: pa.Table, rank: int, world_size: int) -> Iterator[pa.Table]:
    """Yield a worker's part of an eval set, WINDOW rows at a time, each with its first reference as `caption`."""
    for first in range(rank * WINDOW, len(pairs), world_size * WINDOW):
        rows = pairs.slice(first, WINDOW)
        captions = [references[0] for references in rows["reference_captions"].to_pylist()]
        yield rows.append_column("caption", pa.array(captions, pa.string()))


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
