"""Write checkpoints in a thread: training waits only for copies of weights and optimizer state."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from captioner.models.pretrained import quiet
from captioner.training.lora import adapter_weights, save_adapters
from captioner.training.trainable import ADAPTERS
from captioner.training.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import Trainer


class Checkpoints:
    """Writes and reports a worker's checkpoints in a thread, one at a time.

    A context manager: leaving it waits for the last checkpoint.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self.waited_seconds = 0.0  # how long training waited for copies and for earlier checkpoints

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if kind is None:
            self._wait()

    def save(self, snapshot: Snapshot | None, metrics: dict[str, Any]) -> None:
        """Start to write a snapshot; None where another worker writes it. Raises an error of the previous one."""
        self._wait()
        self._writing = self._thread.submit(self._write, snapshot, metrics)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Add the time spent in the context to `waited_seconds`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.waited_seconds += time.perf_counter() - started

    def _wait(self) -> None:
        if self._writing is not None:
            with self.waiting():
                self._writing.result()

    def _write(self, snapshot: Snapshot | None, metrics: dict[str, Any]) -> None:
        if snapshot is None:
            self._worker.report(metrics, None)
            return
        with tempfile.TemporaryDirectory(prefix="captioner-checkpoint-") as folder:
            snapshot.write(Path(folder))
            self._worker.report(metrics, Path(folder))


class Snapshot:
    """A copy of a trainer's weights and state, which later steps do not change."""

    def __init__(self, trainer: Trainer, network: Any, with_adapters: bool) -> None:
        weights = adapter_weights(network) if with_adapters else network.state_dict(keep_vars=True)
        from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME  # seconds, which finish.py spares

        states = {OPTIMIZER_NAME: trainer.optimizer.state_dict(), SCHEDULER_NAME: trainer.lr_scheduler.state_dict()}
        if trainer.accelerator.scaler is not None:
            states[SCALER_NAME] = trainer.accelerator.scaler.state_dict()
        self._network, self._with_adapters = network, with_adapters
        # Where weights are sharded, every worker sends its part, and one keeps the whole.
        self._weights, self._states = copies_on_host((weights, states), keep=trainer.args.should_save)
        self._trainer_state = json.dumps(dataclasses.asdict(trainer.state), indent=2, sort_keys=True)
        self._copied = None
        if trainer.args.device.type == "cuda":
            self._copied = torch.cuda.current_stream(trainer.args.device).record_event()

    def write(self, folder: Path) -> None:
        """Write the files of a Trainer checkpoint, and the network as a model directory, or only its adapters."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._with_adapters:
            save_adapters(self._weights, folder / ADAPTERS)
        else:
            save_network(self._network, folder, self._weights)
        for name, state in self._states.items():
            torch.save(state, folder / name)
        from transformers.trainer import TRAINER_STATE_NAME

        (folder / TRAINER_STATE_NAME).write_text(self._trainer_state, encoding="utf-8")


@torch.no_grad()
def copies_on_host(value: Any, copied: dict[Any, torch.Tensor | None] | None = None, keep: bool = True) -> Any:
    """Return nested dicts and lists with copies of their tensors on the CPU; tensors that share memory share a copy.

    Copies from a GPU may still be running when this returns, in the order of the current stream. Sharded tensors are
    gathered: all workers call this together, and those without `keep` get None for each tensor.
    """
    copied = {} if copied is None else copied
    if isinstance(value, dict):
        return type(value)((name, copies_on_host(item, copied, keep)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(copies_on_host(item, copied, keep) for item in value)
    if not isinstance(value, torch.Tensor):
        return copy.copy(value)
    # The memory of a sharded tensor may be empty, so it is known by its object.
    key = id(value) if isinstance(value, DTensor) else (value.device, value.data_ptr(), value.shape, value.stride())
    if key not in copied:
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        copied[key] = _host_copy(whole) if keep else None
    return copied[key]


def _host_copy(value: torch.Tensor) -> torch.Tensor:
    host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
    return host.copy_(value, non_blocking=True)


def save_network(network: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write the network as a model directory, without tokenizer and processor.

    `weights`: written instead of the network's own. The network is not changed, as other threads may use it.
    """
    saved = copy.copy(network)
    settings = network.generation_config.to_dict() | {"return_dict_in_generate": False}
    saved.generation_config = GenerationConfig.from_dict(settings)
    with quiet():
        saved.save_pretrained(folder, state_dict=weights)
