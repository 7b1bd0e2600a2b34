"""What happens around the training steps of a worker: evaluation, checkpoints, early stopping, progress."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from captioner.store.directory import Directory
from captioner.training.evaluate import Evaluator
from captioner.training.schedule import best_of, evaluations, is_stale
from captioner.training.tensorboard import write_events
from captioner.training.worker import Training, Worker


class Conductor(TrainerCallback):
    """Evaluates, keeps checkpoints, stops early, watches for a loss that is no number, and tells how far it is.

    `step_loss`: this worker's part of the loss of the step that just ended, times the number of workers.
    """

    def __init__(
        self, work: Training, worker: Worker, evaluator: Evaluator, step_loss: Callable[[], torch.Tensor]
    ) -> None:
        self._work, self._worker, self._evaluate, self._step_loss = work, worker, evaluator, step_loss
        self.stopped = ""
        self._num_told = 0  # entries of the history that --report-to has
        self._started = time.perf_counter()
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seed(state)
        self._first_step, self._num_told = state.global_step, len(state.log_history)
        if not evaluations(state.log_history):
            self._run_evaluation(state)
        self._started = time.perf_counter()
        self._tell(state, None)
        if state.global_step >= self._work.schedule.max_steps:
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        schedule, step = self._work.schedule, state.global_step
        loss = add_up(self._step_loss().detach().double(), args.device).item() / self._worker.world_size
        if not math.isfinite(loss):
            self.stopped = f"the loss of step {step} is {loss}"
            control.should_training_stop = True
            control.should_log = False
            return
        state.epoch = step * schedule.global_batch_size / schedule.epoch_size
        self._tell(state, loss)
        if schedule.is_evaluated(step):
            self._run_evaluation(state)
            self._tell(state, loss)
            if is_stale(state.log_history, self._work.config.training):
                self.stopped = f"no better evaluation since step {best_of(state.log_history, self._metric)['step']}"
                control.should_training_stop = True
        control.should_save = schedule.is_saved(step) or control.should_training_stop

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        latest = evaluations(state.log_history)[-1]
        metrics = {"step": state.global_step, "eval_wer": latest["eval_wer"], "eval_loss": latest["eval_loss"]}
        self._worker.report(metrics, folder if self._worker.rank == 0 else None)
        shutil.rmtree(folder, ignore_errors=True)
        if self._worker.rank == 0 and self._work.config.training.report_to == "tensorboard":
            write_events(Directory(self._work.config.output.path), state.log_history[self._num_told :])
            self._num_told = len(state.log_history)

    @property
    def _metric(self) -> str:
        return f"eval_{self._work.config.training.metric_for_best_model}"

    def _run_evaluation(self, state: Any) -> None:
        found = self._evaluate(self._work.eval)
        state.log_history.append({"step": state.global_step, **{f"eval_{k}": v for k, v in found.items()}})
        self._seed(state)

    def _seed(self, state: Any) -> None:
        """Dropout after a restart at a step is what it would have been after the evaluation at that step."""
        torch.manual_seed(hash((self._work.config.training.seed, state.global_step, self._worker.rank)) % 2**63)

    def _tell(self, state: Any, loss: float | None) -> None:
        if self._worker.rank:
            return
        step, seconds = state.global_step, time.perf_counter() - self._started
        samples = (step - self._first_step) * self._work.schedule.global_batch_size
        known = evaluations(state.log_history)
        self._worker.tell(
            {
                "step": step,
                "total": self._work.schedule.max_steps,
                "loss": loss,
                "wer": known[-1]["eval_wer"] if known else None,
                "samples_per_second": samples / seconds if samples else None,
            }
        )


def add_up(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sum over the workers; float64, on the CPU."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    moved = values.to(device)
    distributed.all_reduce(moved)
    return moved.cpu()
