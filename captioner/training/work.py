"""What every worker needs to know of a run. Light: torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from captioner.config import TrainConfig
from captioner.models import ModelRef
from captioner.training.archives import Archives
from captioner.training.schedule import Schedule


@dataclass(frozen=True)
class Training:
    """A run as its workers see it. Picklable. `train`, `eval`: tables of PAIRS_SCHEMA."""

    config: TrainConfig
    model: ModelRef
    archives: Archives
    schedule: Schedule
    train: pa.Table
    eval: pa.Table
