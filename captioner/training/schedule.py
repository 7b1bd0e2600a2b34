"""How many steps a run has, when it evaluates and saves, and which evaluation of its history is best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from captioner.config import TrainingConfig
from captioner.console.text import counted
from captioner.errors import UsageError


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a run evaluates, saves and ends, in steps of the optimiser.

    `global_batch_size`: pairs of one step, over all workers. `epoch_size`: pairs of one epoch.
    """

    max_steps: int
    eval_steps: int
    save_steps: int
    global_batch_size: int
    epoch_size: int

    def is_evaluated(self, step: int) -> bool:
        return step % self.eval_steps == 0 or step == self.max_steps

    def is_saved(self, step: int) -> bool:
        return step % self.save_steps == 0 or step == self.max_steps


def with_batch_of(config: TrainingConfig, started_with: int, num_workers: int) -> TrainingConfig:
    """Return the settings with which `num_workers` take the pairs of a step of `started_with` workers.

    Batches of a worker get no larger; where they cannot have the same size they get smaller. Raises UsageError where
    the pairs of a step cannot be divided by the workers.
    """
    if num_workers == started_with:
        return config
    total = started_with * config.per_device_train_batch_size * config.gradient_accumulation_steps
    share, rest = divmod(total, num_workers)
    if rest:
        raise UsageError(
            f"--num-workers {num_workers}: a step of this run has {counted(total, 'pair')}, which"
            f" {counted(num_workers, 'worker')} cannot share equally; give a number that divides {total}"
        )
    size = next(size for size in range(min(config.per_device_train_batch_size, share), 0, -1) if share % size == 0)
    return config.model_copy(update={"per_device_train_batch_size": size, "gradient_accumulation_steps": share // size})


def make_schedule(config: TrainingConfig, epoch_size: int, num_workers: int) -> Schedule:
    """Return the schedule for epochs of `epoch_size` pairs.

    Raises UsageError where --save-steps is not a multiple of --eval-steps.
    """
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps * num_workers
    max_steps = config.max_steps or max(1, math.ceil(config.num_train_epochs * epoch_size / batch_size))
    eval_steps = min(config.eval_steps or max(1, round(epoch_size / batch_size)), max_steps)
    save_steps = config.save_steps or eval_steps
    if save_steps % eval_steps and save_steps < max_steps:
        raise UsageError(
            f"--save-steps {save_steps}: must be a multiple of --eval-steps ({eval_steps}), because the best of the"
            " evaluated checkpoints is kept"
        )
    return Schedule(max_steps, eval_steps, save_steps, batch_size, epoch_size)


def evaluations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the evaluations in a history, in order."""
    return [entry for entry in history if "eval_loss" in entry]


def best_of(history: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Return the first evaluation with the best value of "eval_wer", "eval_loss" or "eval_cider"."""
    return min(evaluations(history), key=lambda entry: rank(entry, metric))


def is_stale(history: list[dict[str, Any]], config: TrainingConfig) -> bool:
    """Return whether --early-stopping-patience evaluations have followed the best one."""
    if config.early_stopping_patience is None:
        return False
    best = best_of(history, f"eval_{config.metric_for_best_model}")
    later = [entry for entry in evaluations(history) if entry["step"] > best["step"]]
    return len(later) >= config.early_stopping_patience


def rank(entry: dict[str, Any], metric: str) -> tuple[float, int]:
    """Return a key that sorts evaluations, or metrics of checkpoints: the best first, of equal ones the earliest.

    Without a value, or with NaN, they come last.
    """
    value = entry[metric]
    if value is None or math.isnan(value):
        return math.inf, entry["step"]
    return (-float(value) if is_higher_better(metric) else float(value)), entry["step"]


def is_higher_better(metric: str) -> bool:
    """Return whether a higher value of a metric is better: of CIDEr, but not of WER and loss."""
    return metric == "eval_cider"
