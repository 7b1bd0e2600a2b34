"""The training loop of each worker: transformers' Trainer with our loss, data order and checkpoints. Free of Ray.

Trainer only trains. `TrainingCallback` decides when to evaluate, what is best and where checkpoints go.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from captioner.config import TrainConfig
from captioner.errors import ModelError
from captioner.models.base import TransformersCaptioner
from captioner.models.pretrained import quiet
from captioner.models.ref import ModelRef
from captioner.run.prefetch import one_ahead
from captioner.training.callback import TrainingCallback, sum_over_workers
from captioner.training.checkpoints import Checkpoints, Snapshot
from captioner.training.collate import Collate, Decode, Upload, batches_of
from captioner.training.evaluate import Evaluator, TableDecoder, eval_batch_size, make_collate, windows_of
from captioner.training.fsdp import gathered, is_sharded, load_sharded, shard
from captioner.training.loss import CaptionLoss
from captioner.training.order import GlobalOrder, Share
from captioner.training.trainable import enable_gradient_checkpointing, open_trainable
from captioner.training.worker import Worker, WorkerTask

PREPARATION_FAILED: dict[str, Any] = {
    "step": 0,
    "history": [],
    "stopped": "its preparation failed",
    "checkpoint_seconds": 0.0,
    "data_seconds": 0.0,
    "train_seconds": 0.0,
}

# Settings with the same name and meaning in TrainingArguments.
_TRAINER_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "logging_steps",
    "seed",
)


def train_worker(
    config: TrainConfig, model: ModelRef, worker: Worker, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Train up to the last step, from `checkpoint` where there is one.

    Returns `step`, `history`, `stopped`: why the run ended before its last step, or "", `checkpoint_seconds` and
    `data_seconds`: how long training waited for checkpoints and for decoded images, and `train_seconds`: how long it
    took, evaluations included.
    """
    _show_status(worker, "loading weights")
    with ThreadPoolExecutor(1, "decoding") as thread:
        started = thread.submit(_start_decoding, worker, is_new=checkpoint is None)
        try:
            captioner, loss = _open_model(config, model, worker, checkpoint)
        except ModelError:
            if started.result()[0] is None:  # the driver reports why, and Ray need not restart this worker
                return PREPARATION_FAILED
            raise
        _show_status(worker, "waiting for pairs" if not started.done() else "preparing the first step")
        task, windows = started.result()
    if task is None:
        return PREPARATION_FAILED
    _show_status(worker, "preparing the first step")
    return _train(task, worker, captioner, loss, windows, checkpoint)


def _start_decoding(worker: Worker, is_new: bool) -> tuple[WorkerTask | None, Iterator[pa.Table] | None]:
    """Wait for the task and, in a new run, for the first decoded window of its eval set.

    So the processes that decode start while this one loads weights.
    """
    task = worker.task()
    if task is None or not is_new:
        return task, None
    decode = worker.table_decoder(Decode(task.sources, task.model.spec, task.pixel_cache))
    windows = decode(windows_of(task.eval, worker.rank, worker.world_size))
    first = list(islice(windows, 1))
    return task, chain(first, windows)


def _open_model(
    config: TrainConfig, model: ModelRef, worker: Worker, checkpoint: Path | None
) -> tuple[TransformersCaptioner, CaptionLoss]:
    shards = config.training.fsdp and worker.world_size > 1
    torch.manual_seed(config.training.seed)  # new adapters are the same on all workers
    # Sharding moves one layer after the other to the device, which need not hold the whole network.
    device = torch.device("cpu") if shards else worker.device
    captioner = open_trainable(model, config.model, device, eval_batch_size(config), checkpoint)
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(captioner.model)
    if model.quantize and config.training.bf16:
        for module in captioner.model.modules():
            if hasattr(module, "compute_dtype"):  # of layers of bitsandbytes, which autocast does not change
                module.compute_dtype = torch.bfloat16
    loss = CaptionLoss(captioner)
    loss.train()
    if shards:
        shard(loss, worker.device, worker.world_size, config.training.bf16)
        captioner.use_device(worker.device)
    return captioner, loss


def _train(
    task: WorkerTask,
    worker: Worker,
    captioner: TransformersCaptioner,
    loss: CaptionLoss,
    windows: Iterator[pa.Table] | None,
    checkpoint: Path | None,
) -> dict[str, Any]:
    collate = make_collate(captioner)
    evaluator = Evaluator(
        captioner,
        loss,
        collate,
        worker.table_decoder(Decode(task.sources, task.model.spec, task.pixel_cache)),
        eval_batch_size(task.config),
        worker.rank,
        worker.world_size,
        scores_cider=task.config.training.metric_for_best_model == "cider",
        all_reduce=lambda sums: sum_over_workers(sums, captioner.device),
        gather=partial(gathered, loss, captioner.device, task.config.training.bf16),
        show_status=partial(_show_status, worker),
    )
    with (
        tempfile.TemporaryDirectory(prefix="captioner-train-") as folder,
        quiet(),
        Checkpoints(worker) as checkpoints,
        ExitStack() as prefetching,
    ):
        arguments = training_arguments(task, folder, captioner.device.type == "cpu")
        trainer = CaptionTrainer(task, worker, loss, collate, checkpoints, prefetching, args=arguments)
        callback = TrainingCallback(task, worker, evaluator, trainer, checkpoints, windows)
        trainer.add_callback(callback)
        trainer = worker.prepare(trainer)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if task.pixel_cache is not None:
        task.pixel_cache.remove()
    return {
        "step": trainer.state.global_step,
        "history": trainer.state.log_history,
        "stopped": callback.stopped,
        "checkpoint_seconds": round(checkpoints.waited_seconds, 2),
        "data_seconds": round(trainer.data_seconds, 2),
        "train_seconds": round(time.perf_counter() - started, 2),
    }


def _show_status(worker: Worker, text: str) -> None:
    if worker.rank == 0:
        worker.show_status(text)


def training_arguments(task: WorkerTask, folder: str, use_cpu: bool) -> TrainingArguments:
    """Return the arguments of Trainer, which is left to do nothing but train."""
    settings = task.config.training
    return TrainingArguments(
        output_dir=folder,
        max_steps=task.schedule.max_steps,
        use_cpu=use_cpu,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],  # TrainingCallback reports
        logging_nan_inf_filter=False,
        ignore_data_skip=True,  # the data order itself starts at the restored step
        remove_unused_columns=False,
        disable_tqdm=True,
        **{name: getattr(settings, name) for name in _TRAINER_SETTINGS},
    )


class CaptionTrainer(Trainer):
    """Trainer with our loss and our data order.

    Its checkpoints are model directories with Trainer's state. They hold no state of random number generators, which
    are seeded from seed, step and rank, because a worker may restart under another rank. `snapshot`: of the step to be
    saved; None on workers that save nothing. `data_seconds`: how long it waited for batches. `prefetching`: ends the
    threads that prepare batches.
    """

    def __init__(
        self,
        task: WorkerTask,
        worker: Worker,
        loss: CaptionLoss,
        collate: Collate,
        checkpoints: Checkpoints,
        prefetching: ExitStack,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=loss, train_dataset=_EmptyDataset(), **kwargs)
        # `compute_loss` already divides by the tokens of all workers and of all accumulated batches.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self._task, self._worker, self._collate, self._checkpoints = task, worker, collate, checkpoints
        self._prefetching = prefetching
        self.snapshot: Snapshot | None = None
        self.step_loss = torch.zeros((), device=self.args.device)
        self.data_seconds = 0.0

    def get_train_dataloader(self) -> Any:
        """Return the batches of this worker."""
        settings = self._task.config.training
        share = Share(
            self._worker.rank,
            self._worker.world_size,
            settings.per_device_train_batch_size,
            settings.gradient_accumulation_steps,
        )
        order = GlobalOrder(self._task.train, settings.seed, self._task.config.data.caption_choice)
        decode = self._worker.table_decoder(Decode(self._task.sources, self._task.model.spec, self._task.pixel_cache))
        return _TrainBatches(self, order, share, decode, self._collate, self._prefetching)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Return the batches of one step, and the number of their caption tokens over all workers."""
        self.step_loss.zero_()
        started = time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))
        self.data_seconds += time.perf_counter() - started
        count = sum(len(batch["labels"]) for batch in batches)
        if self._worker.world_size == 1:
            return batches, count
        # `full` runs on the device; copying a tensor from the CPU would wait for the device.
        return batches, self.accelerator.reduce(torch.full((), count, device=device), "sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the sum over this worker's tokens, divided by all workers' tokens, times the number of workers.

        The last factor is there because DistributedDataParallel takes the mean of the workers' gradients.
        """
        assert num_items_in_batch is not None
        loss = model(**inputs) / num_items_in_batch * self._worker.world_size
        self.step_loss += loss.detach()
        return loss

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Let workers add up gradients of whole layers, which they exchange with the last batch of a step.

        Trainer's own asks the model for `config.distributed_config`, which CaptionLoss does not have.
        """
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Copy what a checkpoint holds; `Checkpoints` writes it in its thread, where Trainer would write it here."""
        self.store_flos()
        with self._checkpoints.waiting():
            if self.args.should_save or self._is_sharded:
                with_adapters = self._task.config.model.lora_rank is not None
                snapshot = Snapshot(self, self.model.network, with_adapters)
                self.snapshot = snapshot if self.args.should_save else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: the network was opened with the checkpoint's weights."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_sharded(self.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    @property
    def _is_sharded(self) -> bool:
        return is_sharded(self.model)


class _EmptyDataset(torch.utils.data.IterableDataset[Any]):
    """A dataset without items: Trainer requires one, but `_TrainBatches` yields the batches."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _TrainBatches:
    """A worker's batches from the trainer's current step to its last, on the device; none where training has ended.

    The thread that prepares the next batch ends with `prefetching`, not with the iterator: Trainer drops it before its
    end, and where an error keeps its frame, the garbage collector would end it at any later time. Once that was while
    `threading` held a lock, and the process waited for the thread for ever.
    """

    def __init__(
        self,
        trainer: CaptionTrainer,
        order: GlobalOrder,
        share: Share,
        decode: TableDecoder,
        collate: Collate,
        prefetching: ExitStack,
    ) -> None:
        self._trainer, self._order, self._share, self._decode, self._collate = trainer, order, share, decode, collate
        self._prefetching = prefetching
        self.dataset = trainer.train_dataset

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if self._trainer.control.should_training_stop:  # Trainer takes a step before it looks
            return
        state = self._trainer.state
        tables = self._order.tables(self._share, state.global_step, state.max_steps)
        batches = batches_of(self._decode(tables), self._share.batch_size, self._collate)
        upload = Upload(self._trainer.args.device)
        uploaded = self._prefetching.enter_context(one_ahead(map(upload, batches)))
        yield from map(upload.mark_used, uploaded)
