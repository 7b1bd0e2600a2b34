"""Evaluation, checkpoints, early stopping and progress of a worker, as a callback of transformers' Trainer."""

from __future__ import annotations

import math
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from transformers import TrainerCallback

from captioner.store.directory import Directory
from captioner.training.advice import COLLAPSED, collapse_warning, is_collapsed, warnings_of
from captioner.training.checkpoints import Checkpoints, Snapshot
from captioner.training.evaluate import SHARES, Evaluator
from captioner.training.record import mark_trained
from captioner.training.schedule import best_of, evaluations, is_stale
from captioner.training.worker import Worker, WorkerTask


class TrainerState(Protocol):
    """The attributes of `CaptionTrainer` that the callback reads.

    `step_loss`: this worker's part of the loss of the latest step, times the number of workers. `snapshot`: of the step
    to be saved; None on workers that save nothing.
    """

    step_loss: torch.Tensor
    snapshot: Snapshot | None


class TrainingCallback(TrainerCallback):
    """Evaluates, saves checkpoints, shows progress, and stops early or when the loss is not finite.

    `windows`: the decoded eval set for the first evaluation, where decoding has started already. `stopped`: why the run
    ended before its last step, or "".
    """

    def __init__(
        self,
        task: WorkerTask,
        worker: Worker,
        evaluator: Evaluator,
        trainer: TrainerState,
        checkpoints: Checkpoints,
        windows: Iterator[pa.Table] | None,
    ) -> None:
        self._task, self._worker, self._evaluator = task, worker, evaluator
        self._trainer, self._checkpoints = trainer, checkpoints
        self.stopped = ""
        self._first_windows = windows
        self._num_written = 0  # entries of the history already written for --report-to
        self._started = time.perf_counter()
        self._first_step = 0
        self._losses = StepLosses()
        self._loss: float | None = None  # of the latest step whose loss was read

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seed(state)
        self._first_step, self._num_written = state.global_step, len(state.log_history)
        if not evaluations(state.log_history):
            self._evaluate(state, self._first_windows)
        self._first_windows = None
        self._started = time.perf_counter()
        self._show_progress(state)
        if self._is_evaluation_finite(state):
            if self._worker.rank == 0:
                mark_trained(self._task.out)
            self._stop_if_stale(state)  # a run that was killed after it had stopped early
        if self.stopped or state.global_step >= self._task.schedule.max_steps:
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        schedule, step = self._task.schedule, state.global_step
        self._losses.add(step, sum_over_workers(self._trainer.step_loss.detach().clone(), args.device))
        needs_loss = control.should_log or schedule.is_evaluated(step) or schedule.is_saved(step)
        if not self._read_losses(include_latest=needs_loss):
            control.should_training_stop = True
            control.should_log = False
            return
        state.epoch = step * schedule.global_batch_size / schedule.epoch_size
        self._show_progress(state)
        if schedule.is_evaluated(step):
            self._evaluate(state)
            self._show_progress(state)
            if not self._is_evaluation_finite(state):
                control.should_training_stop = True  # without a checkpoint of this step
                return
            if self._task.config.training.stop_on_collapse and is_collapsed(evaluations(state.log_history)[-1]):
                self.stopped = f"{COLLAPSED} at step {step}"
                control.should_training_stop = True  # without a checkpoint of this step
                return
            self._stop_if_stale(state)
            if self.stopped:
                control.should_training_stop = True
        control.should_save = schedule.is_saved(step) or control.should_training_stop
        # A checkpoint does not hold Trainer's sum of the losses since the last entry, so none may be open there.
        control.should_log = control.should_log or control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        latest = evaluations(state.log_history)[-1]
        names = dict.fromkeys(("eval_wer", "eval_loss", self._metric))
        # Ray sorts checkpoints by their metrics: NaN comes last, and None is an error.
        values = {name: math.nan if latest[name] is None else latest[name] for name in names}
        metrics = {"step": state.global_step, **values}
        snapshot, self._trainer.snapshot = self._trainer.snapshot, None
        self._checkpoints.save(snapshot, metrics)
        if self._worker.rank == 0 and self._task.config.training.report_to == "tensorboard":
            write_tensorboard(self._task.out, state.log_history[self._num_written :])
            self._num_written = len(state.log_history)

    @property
    def _metric(self) -> str:
        return f"eval_{self._task.config.training.metric_for_best_model}"

    def _stop_if_stale(self, state: Any) -> None:
        if is_stale(state.log_history, self._task.config.training):
            self.stopped = f"no better evaluation since step {best_of(state.log_history, self._metric)['step']}"

    def _read_losses(self, include_latest: bool) -> bool:
        """Read the losses that have arrived; return False, and set `stopped`, where one is not finite."""
        for step, total in self._losses.read(include_latest):
            self._loss = total / self._worker.world_size
            if not math.isfinite(self._loss):
                self.stopped = f"the loss of step {step} is {self._loss}"
                return False
        return True

    def _is_evaluation_finite(self, state: Any) -> bool:
        """Return whether the latest evaluation has a finite loss; set `stopped` where it has not."""
        latest = evaluations(state.log_history)[-1]
        if not math.isfinite(latest["eval_loss"]):
            self.stopped = f"the loss of the evaluation at step {latest['step']} is {latest['eval_loss']}"
        return not self.stopped

    def _evaluate(self, state: Any, windows: Iterator[pa.Table] | None = None) -> None:
        result = self._evaluator(self._task.eval, windows)
        state.log_history.append({"step": state.global_step, **{f"eval_{name}": v for name, v in result.items()}})
        if self._worker.rank == 0 and (warning := collapse_warning(state.log_history, self._task.config)):
            state.log_history[-1]["warning"] = warning  # only rank 0 has captions to quote
        self._seed(state)

    def _seed(self, state: Any) -> None:
        """Seed dropout from the step, so that a run restarted here draws what it would have drawn without a restart."""
        torch.manual_seed(hash((self._task.config.training.seed, state.global_step, self._worker.rank)) % 2**63)

    def _show_progress(self, state: Any) -> None:
        if self._worker.rank:
            return
        step, seconds = state.global_step, time.perf_counter() - self._started
        num_samples = (step - self._first_step) * self._task.schedule.global_batch_size
        evaluated = evaluations(state.log_history)
        latest = evaluated[-1] if evaluated else {}
        self._worker.show_progress(
            {
                "step": step,
                "total": self._task.schedule.max_steps,
                "loss": self._loss,
                "wer": latest.get("eval_wer"),
                **{name: latest.get(f"eval_{name}") for name in SHARES},
                "warnings": warnings_of(evaluated),
                "samples_per_second": num_samples / seconds if num_samples else None,
            }
        )


class StepLosses:
    """The losses of the latest steps while they are copied from the device.

    Reading a loss at the end of its step would wait for the device, which then waits for the next step to be queued. So
    each is copied when its step ends and read when the next one has been queued.
    """

    def __init__(self) -> None:
        self._copies: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Start to copy the loss of a step, a scalar that nothing else writes to."""
        if loss.device.type != "cuda":
            self._copies.append((step, loss, None))
            return
        copy = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(loss, non_blocking=True)
        self._copies.append((step, copy, torch.cuda.current_stream(loss.device).record_event()))

    def read(self, include_latest: bool) -> Iterator[tuple[int, float]]:
        """Yield (step, loss) of the steps that were not read yet; of the latest one only with `include_latest`."""
        while len(self._copies) > (0 if include_latest else 1):
            step, copy, copied = self._copies.popleft()
            if copied is not None:
                copied.synchronize()
            yield step, copy.item()


def sum_over_workers(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the sum of a tensor over all workers, on `device` where there is more than one worker."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    total = values.to(device)
    distributed.all_reduce(total)
    return total


def write_tensorboard(out: Directory, entries: list[dict[str, Any]]) -> None:
    """Write entries of a history as TensorBoard events into OUT/tensorboard.

    Each has its `step`; names are Trainer's: "train/loss", "eval/wer" and so on. Called at each checkpoint. The file is
    named after its last step, so a resumed run replaces the events of steps that it repeats.
    """
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory(prefix="captioner-events-") as folder:
        with SummaryWriter(folder) as writer:
            for entry in entries:
                for name, value in entry.items():
                    if isinstance(value, int | float) and name not in ("step", "epoch"):
                        writer.add_scalar(_tensorboard_name(name), value, entry["step"])
        (file,) = Path(folder).iterdir()
        out.write_bytes(f"tensorboard/events.out.tfevents.{entries[-1]['step']:08d}", file.read_bytes())


def _tensorboard_name(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
