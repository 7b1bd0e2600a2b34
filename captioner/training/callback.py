"""What happens around the training steps of a worker: evaluation, checkpoints, early stopping, progress."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import pyarrow as pa
import torch
from transformers import TrainerCallback

from captioner.store.directory import Directory
from captioner.training.checkpoints import Checkpoints, Snapshot
from captioner.training.evaluate import Evaluator
from captioner.training.schedule import best_of, evaluations, is_stale
from captioner.training.tensorboard import write_events
from captioner.training.worker import Training, Worker


class Stepping(Protocol):
    """What the callback needs of the trainer.

    `step_loss`: this worker's part of the loss of the step that just ended, times the number of workers. `snapshot`: of
    the step that is to be saved; None on workers that save nothing.
    """

    step_loss: torch.Tensor
    snapshot: Snapshot | None


class Conductor(TrainerCallback):
    """Evaluates, keeps checkpoints, stops early, watches for a loss that is no number, and tells how far it is.

    `windows`: the decoded eval set of the first evaluation, where there is one.
    """

    def __init__(
        self,
        work: Training,
        worker: Worker,
        evaluator: Evaluator,
        trainer: Stepping,
        checkpoints: Checkpoints,
        windows: Iterator[pa.Table] | None,
    ) -> None:
        self._work, self._worker, self._evaluate = work, worker, evaluator
        self._trainer, self._checkpoints = trainer, checkpoints
        self.stopped = ""
        self._first_windows = windows
        self._num_told = 0  # entries of the history that --report-to has
        self._started = time.perf_counter()
        self._first_step = 0
        self._losses = StepLosses()
        self._loss: float | None = None  # of the latest step whose loss is here

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seed(state)
        self._first_step, self._num_told = state.global_step, len(state.log_history)
        if not evaluations(state.log_history):
            self._run_evaluation(state, self._first_windows)
        self._first_windows = None
        self._started = time.perf_counter()
        self._tell(state)
        if state.global_step >= self._work.schedule.max_steps:
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        schedule, step = self._work.schedule, state.global_step
        self._losses.add(step, sum_over_workers(self._trainer.step_loss.detach().clone(), args.device))
        is_kept = control.should_log or schedule.is_evaluated(step) or schedule.is_saved(step)
        for of_step, total in self._losses.read(all_of_them=is_kept):
            self._loss = total / self._worker.world_size
            if not math.isfinite(self._loss):
                self.stopped = f"the loss of step {of_step} is {self._loss}"
                control.should_training_stop = True
                control.should_log = False
                return
        state.epoch = step * schedule.global_batch_size / schedule.epoch_size
        self._tell(state)
        if schedule.is_evaluated(step):
            self._run_evaluation(state)
            self._tell(state)
            if is_stale(state.log_history, self._work.config.training):
                self.stopped = f"no better evaluation since step {best_of(state.log_history, self._metric)['step']}"
                control.should_training_stop = True
        control.should_save = schedule.is_saved(step) or control.should_training_stop

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        latest = evaluations(state.log_history)[-1]
        metrics = {"step": state.global_step, "eval_wer": latest["eval_wer"], "eval_loss": latest["eval_loss"]}
        snapshot, self._trainer.snapshot = self._trainer.snapshot, None
        self._checkpoints.keep(snapshot, metrics)
        if self._worker.rank == 0 and self._work.config.training.report_to == "tensorboard":
            write_events(Directory(self._work.config.output.path), state.log_history[self._num_told :])
            self._num_told = len(state.log_history)

    @property
    def _metric(self) -> str:
        return f"eval_{self._work.config.training.metric_for_best_model}"

    def _run_evaluation(self, state: Any, windows: Iterator[pa.Table] | None = None) -> None:
        found = self._evaluate(self._work.eval, windows)
        state.log_history.append({"step": state.global_step, **{f"eval_{k}": v for k, v in found.items()}})
        self._seed(state)

    def _seed(self, state: Any) -> None:
        """Dropout after a restart at a step is what it would have been after the evaluation at that step."""
        torch.manual_seed(hash((self._work.config.training.seed, state.global_step, self._worker.rank)) % 2**63)

    def _tell(self, state: Any) -> None:
        if self._worker.rank:
            return
        step, seconds = state.global_step, time.perf_counter() - self._started
        samples = (step - self._first_step) * self._work.schedule.global_batch_size
        known = evaluations(state.log_history)
        self._worker.tell(
            {
                "step": step,
                "total": self._work.schedule.max_steps,
                "loss": self._loss,
                "wer": known[-1]["eval_wer"] if known else None,
                "samples_per_second": samples / seconds if samples else None,
            }
        )


class StepLosses:
    """The losses of the latest steps on their way from the device.

    Reading a loss at the end of its step would wait for the device, which then waits for the next step to be queued. So
    each is copied when its step ends and read when the next one has been queued.
    """

    def __init__(self) -> None:
        self._copies: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Start the copy of a step's loss, a scalar that nothing else writes to."""
        if loss.device.type != "cuda":
            self._copies.append((step, loss, None))
            return
        copy = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(loss, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._copies.append((step, copy, arrived))

    def read(self, all_of_them: bool) -> Iterator[tuple[int, float]]:
        """(step, loss) of all steps that were not read yet; of the latest one only with `all_of_them`."""
        while len(self._copies) > (0 if all_of_them else 1):
            step, copy, arrived = self._copies.popleft()
            if arrived is not None:
                arrived.synchronize()
            yield step, copy.item()


def sum_over_workers(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the sum over the workers, on `device` where there are several."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    summed = values.to(device)
    distributed.all_reduce(summed)
    return summed
