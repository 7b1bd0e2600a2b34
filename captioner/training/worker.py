"""What every worker needs to know of a run, and what it must be able to do. Light: torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from captioner.config import TrainConfig
from captioner.models import ModelRef
from captioner.training.archives import Archives
from captioner.training.schedule import Schedule

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

    from captioner.training.collate import Decode
    from captioner.training.evaluate import Feed


@dataclass(frozen=True)
class Training:
    """A run as its workers see it. Picklable. `train`, `eval`: tables of PAIRS_SCHEMA."""

    config: TrainConfig
    model: ModelRef
    archives: Archives
    schedule: Schedule
    train: pa.Table
    eval: pa.Table


class Worker(Protocol):
    """One of the processes that train together."""

    rank: int
    world_size: int
    device: torch.device

    def feed(self, decode: Decode) -> Feed:
        """What decodes tables of pairs for this worker."""
        ...

    def training(self) -> Training | None:
        """What to train on, once the pairs are there; None where the run was given up before."""
        ...

    def doing(self, text: str) -> None:
        """Show what the run waits for; called by rank 0 only. "" ends it."""
        ...

    def prepare(self, trainer: Trainer) -> Trainer:
        """The trainer, made fit for where it runs."""
        ...

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        """Keep a checkpoint (rank 0 has one, the others `None`) under these metrics. Every worker calls it."""
        ...

    def tell(self, progress: dict[str, Any]) -> None:
        """Show how far the run is; called by rank 0 only."""
        ...
