"""Evaluation on the eval set: WER of generated captions, and loss, summed over workers.

Each worker takes every n-th window of the eval set and keeps only sums, so memory does not grow with the set.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from captioner.config import TrainConfig
from captioner.console.text import counted
from captioner.models.base import TransformersCaptioner
from captioner.models.chat import ChatCaptioner
from captioner.scoring.coco_metrics import cider_d
from captioner.scoring.normalise import caption_tokens, normalise
from captioner.training.chat_batches import ChatCollate, answer_frame
from captioner.training.collate import Collate, batches_of, pixels_of
from captioner.training.loss import CaptionLoss
from captioner.training.pairs import max_caption_tokens, plain_text_tokenizer

# Captions are shuffled within a window for the baseline, so windows do not depend on the number of workers.
WINDOW = 64
NUM_EXAMPLES = 12  # captions returned with the figures

_SUMS = ("edits", "words", "shuffled_edits", "shuffled_words", "loss", "tokens", "images", "empty", "cut", "cider")
SHARES = ("equal_share", "empty_share", "cut_share")  # of the figures of an evaluation, shown as progress

TableDecoder = Callable[[Iterator[pa.Table]], Iterator[pa.Table]]
"""Decodes tables of pairs: the same tables with a column of pixels, in the same order."""


def eval_batch_size(config: TrainConfig) -> int:
    """Return the number of images in a batch of an evaluation."""
    return config.training.per_device_eval_batch_size or config.training.per_device_train_batch_size


def make_collate(captioner: TransformersCaptioner) -> Collate:
    """Return the Collate for the tokenizer and the special tokens of a captioner."""
    settings, ref, tokenizer = captioner.settings, captioner.ref, plain_text_tokenizer(captioner.tokenizer)
    end_ids = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    padding = settings.pad_token_id if settings.pad_token_id is not None else end_ids[0]
    if isinstance(captioner, ChatCaptioner):
        before, end = answer_frame(captioner, end_ids)
        longest = max_caption_tokens(ref.max_positions, 0)
        return ChatCollate(tokenizer, (), end, padding, ref.spec, longest, captioner.process, before)
    # A token that `generate` always writes first is not learned.
    forced = [] if settings.forced_bos_token_id is None else [settings.forced_bos_token_id]
    start = (*captioner.prefix, *forced)
    longest = max_caption_tokens(ref.max_positions, len(start))
    return Collate(tokenizer, start, end_ids[0], padding, ref.spec, longest)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates `captioner`, whose network `loss` wraps, on a table of pairs.

    `batch_size`: pairs in a batch for the loss. `scores_cider`: whether to compute CIDEr-D, for which each worker keeps
    the text of its captions until the end. `all_reduce`: sums a float64 tensor over the workers. `gather`: the
    context in which each worker has all weights. `show_status`: shows how far an evaluation is.
    """

    captioner: TransformersCaptioner
    loss: CaptionLoss
    collate: Collate
    decode: TableDecoder
    batch_size: int
    rank: int = 0
    world_size: int = 1
    scores_cider: bool = False
    all_reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums
    gather: Callable[[], AbstractContextManager[None]] = nullcontext
    show_status: Callable[[str], None] = lambda text: None

    def __call__(self, pairs: pa.Table, windows: Iterator[pa.Table] | None = None) -> dict[str, Any]:
        """Return `wer`, `shuffled_wer`, `loss` (nats a token), shares, `num_pictures`, `captions` and perhaps `cider`.

        WER is that of generated captions, loss that of the first reference of each image. `equal_share`: of images
        whose caption is the most frequent one; `equal_references_share`: the same of first references; `empty_share`:
        of images with an empty caption; `cut_share`: with one that was cut at --max-new-tokens. `captions`: references
        and caption of the first images, on rank 0. `windows`: the decoded `windows_of` these pairs, where decoding was
        started before.
        """
        was_training = self.loss.training
        self.show_status(f"evaluating {counted(len(pairs), 'image')}")
        self.loss.eval()
        try:
            windows = windows or self.decode(windows_of(pairs, self.rank, self.world_size))
            with self.gather():
                sums, equal, examples = self._evaluate(windows, pairs)
        finally:
            self.loss.train(was_training)
            self.captioner.free_memory()
            self.show_status("")
        values = np.concatenate([[sums[name] for name in _SUMS], *equal.counts])
        totals = self.all_reduce(torch.from_numpy(values)).cpu().numpy()
        total = dict(zip(_SUMS, totals[: len(_SUMS)].tolist(), strict=True))
        counts = totals[len(_SUMS) :].reshape(equal.counts.shape).max(axis=1).tolist()
        cider = {"cider": _ratio(total["cider"], total["images"])} if self.scores_cider else {}
        return {
            **cider,
            "wer": _ratio(total["edits"], total["words"]),
            "shuffled_wer": _ratio(total["shuffled_edits"], total["shuffled_words"]),
            "loss": _ratio(total["loss"], total["tokens"]),
            "equal_share": _ratio(counts[0], total["images"]),
            "equal_references_share": _ratio(counts[1], total["images"]),
            "empty_share": _ratio(total["empty"], total["images"]),
            "cut_share": _ratio(total["cut"], total["images"]),
            "num_pictures": int(total["images"]),
            "captions": examples,
        }

    @torch.no_grad()
    def _evaluate(
        self, windows: Iterator[pa.Table], pairs: pa.Table
    ) -> tuple[dict[str, float], _EqualCaptions, list[dict[str, Any]]]:
        """Return this worker's sums by the names of _SUMS, counts of equal captions, and its first captions."""
        from captioner.scoring.caption_wer import CaptionWer

        metric = CaptionWer(keep_in_memory=True, experiment_id=f"rank-{self.rank}")
        sums: dict[str, float] = dict.fromkeys(_SUMS, 0.0)
        equal, examples = _EqualCaptions(), list[dict[str, Any]]()
        scored: list[tuple[str, list[str]]] = []
        for rows in windows:
            result = self.captioner.caption(pixels_of(rows, self.collate.spec))
            captions = result.texts
            references = rows["reference_captions"].to_pylist()
            scores = metric.compute(predictions=captions, references=references)
            for name in _SUMS[:4]:
                sums[name] += scores[name]
            self._add_loss(sums, rows)
            sums["images"] += len(rows)
            sums["empty"] += sum(not caption for caption in captions)
            sums["cut"] += sum(not finished for finished in result.finished)
            equal.add(captions, references)
            if self.scores_cider:
                scored += zip(captions, references, strict=True)
            self.show_status(f"evaluated {int(sums['images']) * self.world_size:,} of {counted(len(pairs), 'image')}")
            if self.rank == 0 and len(examples) < NUM_EXAMPLES:
                columns = zip(rows["image_id"].to_pylist(), references, captions, strict=True)
                examples += [{"image_id": i, "references": r, "caption": c} for i, r, c in columns]
        sums["cider"] = _summed_cider(scored, pairs)
        return sums, equal, examples[:NUM_EXAMPLES]

    def _add_loss(self, sums: dict[str, float], rows: pa.Table) -> None:
        device = self.captioner.device
        for batch in batches_of([rows], self.batch_size, self.collate):
            on_device = {name: values.to(device) for name, values in batch.items()}
            sums["loss"] += self.loss(**on_device).item()
            sums["tokens"] += len(batch["labels"])


@dataclass
class _EqualCaptions:
    """How often each caption, and each first reference, occurs: float64 [2, buckets], which workers can add up.

    Texts are counted by a hash, so the size does not grow with the set. Two different ones rarely share a bucket.
    """

    counts: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 1 << 14)))

    def add(self, captions: list[str], references: list[list[str]]) -> None:
        for row, texts in enumerate((captions, [first for first, *_ in references])):
            buckets = [zlib.crc32(normalise(text).encode()) % self.counts.shape[1] for text in texts]
            np.add.at(self.counts[row], buckets, 1)


def _summed_cider(scored: list[tuple[str, list[str]]], pairs: pa.Table) -> float:
    """Return the sum of the CIDEr-D of (caption, references), with document frequencies of all pairs."""
    if not scored:
        return 0.0
    captions = [caption_tokens(caption) for caption, _ in scored]
    references = [list(map(caption_tokens, texts)) for _, texts in scored]
    documents = [list(map(caption_tokens, texts)) for texts in pairs["reference_captions"].to_pylist()]
    return sum(cider_d(captions, references, documents))


def windows_of(pairs: pa.Table, rank: int, world_size: int) -> Iterator[pa.Table]:
    """Yield a worker's part of an eval set, WINDOW rows at a time, each with its first reference as `caption`."""
    for first in range(rank * WINDOW, len(pairs), world_size * WINDOW):
        rows = pairs.slice(first, WINDOW)
        captions = [references[0] for references in rows["reference_captions"].to_pylist()]
        yield rows.append_column("caption", pa.array(captions, pa.string()))


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
