"""What the processes of a training run receive, and what a worker must be able to do. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from captioner.config import TrainConfig
from captioner.models import ModelRef
from captioner.store.directory import Directory
from captioner.training.pair_sources import PairSources
from captioner.training.pixel_cache import PixelCache
from captioner.training.schedule import Schedule

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

    from captioner.training.collate import Decode
    from captioner.training.evaluate import TableDecoder


@dataclass(frozen=True)
class WorkerTask:
    """What a worker trains and on which pairs. Picklable. `train`, `eval`: tables of PAIRS_SCHEMA.

    `pixel_cache`: of decoded images; None where each is decoded every time.
    """

    config: TrainConfig
    model: ModelRef
    sources: PairSources
    schedule: Schedule
    train: pa.Table
    eval: pa.Table
    out: Directory
    pixel_cache: PixelCache | None = None


@dataclass(frozen=True)
class FinishInputs:
    """What is needed, beside a checkpoint, to make OUT/model. Picklable.

    `metrics`: reported with the checkpoint. `history`: Trainer's log entries, evaluations among them.
    """

    config: TrainConfig
    model: ModelRef
    sources: PairSources
    schedule: Schedule
    tables: dict[str, pa.Table]
    record: dict[str, Any]
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    out: Directory


class Worker(Protocol):
    """One of the processes that train together."""

    rank: int
    world_size: int
    device: torch.device

    def table_decoder(self, decode: Decode) -> TableDecoder:
        """Return the function that applies `decode` to tables of pairs for this worker."""
        ...

    def task(self) -> WorkerTask | None:
        """Wait until the pairs are prepared and return the task; None where their preparation failed."""
        ...

    def show_status(self, text: str) -> None:
        """Show what the run waits for, "" for nothing; called by rank 0 only."""
        ...

    def prepare(self, trainer: Trainer) -> Trainer:
        """Return the trainer adapted to the framework that runs the workers."""
        ...

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        """Store a checkpoint with these metrics. Every worker calls it; only rank 0 passes a checkpoint."""
        ...

    def show_progress(self, progress: dict[str, Any]) -> None:
        """Show the latest step and its figures; called by rank 0 only."""
        ...
