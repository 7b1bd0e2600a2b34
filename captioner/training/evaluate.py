"""How good the model is on the eval set: WER of the captions it generates, and loss, summed over workers.

Each worker takes every n-th window of the eval set and keeps sums only, so memory does not grow with the set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from captioner.models.base import TransformersCaptioner
from captioner.training.collate import Collate, batches_of, pixels_of
from captioner.training.loss import CaptionLoss

# Captions are shuffled within a window for the baseline, so windows do not depend on the number of workers.
WINDOW = 64
SHOWN = 12

_SUMS = ("edits", "words", "shuffled_edits", "shuffled_words", "loss", "tokens", "pictures")

Feed = Callable[[Iterator[pa.Table]], Iterator[pa.Table]]
"""Tables of pairs in, the same tables decoded out, in order."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates `captioner`, whose network `loss` wraps, on a table of pairs.

    `add_up` sums a float64 tensor over the workers; `doing` shows how far an evaluation is.
    """

    captioner: TransformersCaptioner
    loss: CaptionLoss
    collate: Collate
    feed: Feed
    batch_size: int
    rank: int = 0
    world_size: int = 1
    add_up: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums
    doing: Callable[[str], None] = lambda text: None

    def __call__(self, pairs: pa.Table, windows: Iterator[pa.Table] | None = None) -> dict[str, Any]:
        """Return the scores of the pairs: `wer`, `shuffled_wer`, `loss` (nats a token), `num_pictures` and `captions`.

        `captions` holds reference and caption of the first images (on rank 0). WER is over generated captions, loss
        over the first reference of each image.

        `windows`: `feed` of `windows_of` these pairs, where decoding was started before.
        """
        was_training = self.loss.training
        self.doing(f"evaluating {len(pairs):,} images")
        self.loss.eval()
        try:
            sums, shown = self._sums(windows or self.feed(windows_of(pairs, self.rank, self.world_size)), len(pairs))
        finally:
            self.loss.train(was_training)
            self.captioner.free_memory()
            self.doing("")
        whole = self.add_up(torch.tensor([sums[name] for name in _SUMS], dtype=torch.float64)).tolist()
        total = dict(zip(_SUMS, whole, strict=True))
        return {
            "wer": _ratio(total["edits"], total["words"]),
            "shuffled_wer": _ratio(total["shuffled_edits"], total["shuffled_words"]),
            "loss": _ratio(total["loss"], total["tokens"]),
            "num_pictures": int(total["pictures"]),
            "captions": shown,
        }

    @torch.no_grad()
    def _sums(self, windows: Iterator[pa.Table], total: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        from captioner.scoring.caption_wer import CaptionWer

        metric = CaptionWer(keep_in_memory=True, experiment_id=f"rank-{self.rank}")
        sums: dict[str, float] = dict.fromkeys(_SUMS, 0.0)
        shown: list[dict[str, Any]] = []
        for rows in windows:
            captions = self.captioner.caption(pixels_of(rows, self.collate.spec)).texts
            references = rows["reference_captions"].to_pylist()
            found = metric.compute(predictions=captions, references=references)
            for name in _SUMS[:4]:
                sums[name] += found[name]
            self._add_loss(sums, rows)
            sums["pictures"] += len(rows)
            self.doing(f"evaluated {int(sums['pictures']) * self.world_size:,} of {total:,} images")
            if self.rank == 0 and len(shown) < SHOWN:
                columns = zip(rows["image_id"].to_pylist(), references, captions, strict=True)
                shown += [{"image_id": i, "references": r, "caption": c} for i, r, c in columns][: SHOWN - len(shown)]
        return sums, shown

    def _add_loss(self, sums: dict[str, float], rows: pa.Table) -> None:
        device = self.captioner.device
        for batch in batches_of([rows], self.batch_size, self.collate):
            moved = {name: values.to(device) for name, values in batch.items()}
            sums["loss"] += self.loss(**moved).item()
            sums["tokens"] += len(batch["labels"])


def windows_of(pairs: pa.Table, rank: int, world_size: int) -> Iterator[pa.Table]:
    """A worker's part of an eval set, WINDOW rows at a time, each with its first reference as `caption`."""
    for first in range(rank * WINDOW, len(pairs), world_size * WINDOW):
        rows = pairs.slice(first, WINDOW)
        captions = [references[0] for references in rows["reference_captions"].to_pylist()]
        yield rows.append_column("caption", pa.array(captions, pa.string()))


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None
