"""How many steps a run has, when it evaluates and saves, and what its history says is best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from captioner.config import TrainingConfig
from captioner.errors import UsageError


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps are those of the optimiser."""

    max_steps: int
    eval_steps: int
    save_steps: int
    global_batch_size: int
    epoch_size: int

    def is_evaluated(self, step: int) -> bool:
        return step % self.eval_steps == 0 or step == self.max_steps

    def is_saved(self, step: int) -> bool:
        return step % self.save_steps == 0 or step == self.max_steps


def make_schedule(config: TrainingConfig, epoch_size: int, num_workers: int) -> Schedule:
    """The schedule for an epoch of that many pairs. Raises UsageError where --save-steps would save unevaluated."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * num_workers
    steps = config.max_steps or max(1, math.ceil(config.num_train_epochs * epoch_size / batch))
    evaluate = min(config.eval_steps or max(1, round(epoch_size / batch)), steps)
    save = config.save_steps or evaluate
    if save % evaluate and save < steps:
        raise UsageError(f"--save-steps {save}: must be a multiple of --eval-steps ({evaluate}): the best is kept")
    return Schedule(steps, evaluate, save, batch, epoch_size)


def evaluations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations in a history, in order."""
    return [entry for entry in history if "eval_loss" in entry]


def best_of(history: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The first evaluation with the lowest value of "eval_wer" or "eval_loss"."""
    return min(evaluations(history), key=lambda entry: (_value(entry, metric), entry["step"]))


def is_stale(history: list[dict[str, Any]], config: TrainingConfig) -> bool:
    """Whether --early-stopping-patience evaluations have passed since the best one."""
    if config.early_stopping_patience is None:
        return False
    best = best_of(history, f"eval_{config.metric_for_best_model}")
    since = [entry for entry in evaluations(history) if entry["step"] > best["step"]]
    return len(since) >= config.early_stopping_patience


def _value(entry: dict[str, Any], metric: str) -> float:
    value = entry[metric]
    return math.inf if value is None else float(value)
