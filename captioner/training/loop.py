"""What each worker does: transformers' Trainer steps, evaluation and checkpoints around it. Free of Ray.

Trainer only trains. When to evaluate, what is best and where checkpoints go is decided by `Conductor`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from captioner.config import TrainConfig
from captioner.errors import ModelError
from captioner.models.base import TransformersCaptioner
from captioner.models.pretrained import quiet
from captioner.models.ref import ModelRef
from captioner.run.prefetch import one_ahead
from captioner.training.callback import Conductor, sum_over_workers
from captioner.training.checkpoints import Checkpoints, Snapshot
from captioner.training.collate import Collate, Decode, Upload, batches_of
from captioner.training.evaluate import Evaluator, Feed, windows_of
from captioner.training.loss import CaptionLoss
from captioner.training.order import GlobalOrder, Share
from captioner.training.pairs import max_caption_tokens
from captioner.training.trainable import open_trainable
from captioner.training.worker import Training, Worker

GIVEN_UP: dict[str, Any] = {"step": 0, "history": [], "stopped": "its preparation failed", "checkpoint_seconds": 0.0}


def train_worker(
    config: TrainConfig, model: ModelRef, worker: Worker, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Train up to the last step, from `checkpoint` where there is one.

    Returns `step`, `history`, `stopped`: why the run ended before its last step, or "", and `checkpoint_seconds`: how
    long training waited for checkpoints.
    """
    settings = config.training
    eval_batch = settings.per_device_eval_batch_size or settings.per_device_train_batch_size
    _tell(worker, "loading weights")
    with ThreadPoolExecutor(1, "decoding") as thread:
        started = thread.submit(_start_decoding, worker, is_new=checkpoint is None)
        try:
            captioner = open_trainable(model, config.model, worker.device, eval_batch, checkpoint)
        except ModelError:
            if started.result()[0] is None:  # why the run was given up is known; Ray need not start this worker again
                return GIVEN_UP
            raise
        if settings.gradient_checkpointing:
            captioner.model.activation_checkpointing_enable({"use_reentrant": False})
        loss = CaptionLoss(captioner)
        loss.train()
        _tell(worker, "waiting for pairs" if not started.done() else "preparing the first step")
        work, windows = started.result()
    if work is None:
        return GIVEN_UP
    _tell(worker, "preparing the first step")
    collate = make_collate(captioner)
    decode = Decode(work.archives, work.model.spec)
    evaluator = Evaluator(
        captioner,
        loss,
        collate,
        worker.feed(decode),
        eval_batch,
        worker.rank,
        worker.world_size,
        lambda sums: sum_over_workers(sums, captioner.device),
        partial(_tell, worker),
    )
    with tempfile.TemporaryDirectory(prefix="captioner-train-") as folder, quiet(), Checkpoints(worker) as checkpoints:
        arguments = training_arguments(work, folder, captioner.device.type == "cpu")
        trainer = CaptionTrainer(work, worker, loss, collate, checkpoints, args=arguments)
        conductor = Conductor(work, worker, evaluator, trainer, checkpoints, windows)
        trainer.add_callback(conductor)
        trainer = worker.prepare(trainer)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return {
        "step": trainer.state.global_step,
        "history": trainer.state.log_history,
        "stopped": conductor.stopped,
        "checkpoint_seconds": round(checkpoints.held_seconds, 2),
    }


def _start_decoding(worker: Worker, is_new: bool) -> tuple[Training | None, Iterator[pa.Table] | None]:
    """Wait for what to train on, and for the first window of a new run's eval set.

    Processes that decode start while this one loads weights.
    """
    work = worker.training()
    if work is None or not is_new:
        return work, None
    windows = worker.feed(Decode(work.archives, work.model.spec))(windows_of(work.eval, worker.rank, worker.world_size))
    first = list(islice(windows, 1))
    return work, chain(first, windows)


def _tell(worker: Worker, text: str) -> None:
    if worker.rank == 0:
        worker.doing(text)


def make_collate(captioner: TransformersCaptioner) -> Collate:
    settings, ref = captioner.settings, captioner.ref
    end = settings.eos_token_id
    end_id = end[0] if isinstance(end, list) else end
    padding = settings.pad_token_id if settings.pad_token_id is not None else end_id
    return Collate(captioner.tokenizer, tuple(captioner.prefix), end_id, padding, ref.spec, max_caption_tokens(ref))


def training_arguments(work: Training, folder: str, use_cpu: bool) -> TrainingArguments:
    settings = work.config.training
    same = (
        "learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm per_device_train_batch_size "
        "gradient_accumulation_steps bf16 fp16 logging_steps seed"
    )
    return TrainingArguments(
        output_dir=folder,
        max_steps=work.schedule.max_steps,
        use_cpu=use_cpu,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],  # Conductor reports
        logging_nan_inf_filter=False,
        ignore_data_skip=True,  # the order starts at the restored step by itself
        remove_unused_columns=False,
        disable_tqdm=True,
        **{name: getattr(settings, name) for name in same.split()},
    )


class CaptionTrainer(Trainer):
    """Trainer with our loss and our order of pairs.

    Checkpoints are model directories beside Trainer's files. They hold no state of random number generators, which
    follow from seed, step and rank: a worker may come back under another rank. `snapshot`: of the step that is to be
    saved; None on workers that save nothing.
    """

    def __init__(
        self,
        work: Training,
        worker: Worker,
        loss: CaptionLoss,
        collate: Collate,
        checkpoints: Checkpoints,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=loss, train_dataset=_Nothing(), **kwargs)
        # The loss below is divided by the tokens of all workers and of all accumulated batches already.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self._work, self._worker, self._collate, self._checkpoints = work, worker, collate, checkpoints
        self.snapshot: Snapshot | None = None
        self.step_loss = torch.zeros((), device=self.args.device)

    def get_train_dataloader(self) -> Any:
        settings = self._work.config.training
        share = Share(
            self._worker.rank,
            self._worker.world_size,
            settings.per_device_train_batch_size,
            settings.gradient_accumulation_steps,
        )
        order = GlobalOrder(self._work.train, settings.seed, self._work.config.data.caption_choice)
        feed = self._worker.feed(Decode(self._work.archives, self._work.model.spec))
        return _Batches(self, order, share, feed, self._collate)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """The batches of one step, and the number of their caption tokens over all workers."""
        self.step_loss.zero_()
        batches = list(islice(epoch_iterator, num_batches))
        count = sum(len(batch["labels"]) for batch in batches)
        if self._worker.world_size == 1:
            return batches, count
        # `full` runs on the device; a copy of a tensor of this process would wait for the device.
        return batches, self.accelerator.reduce(torch.full((), count, device=device), "sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum over this worker's tokens, divided by all workers' tokens.

        Times the workers, because DistributedDataParallel takes the mean of their gradients.
        """
        assert num_items_in_batch is not None
        loss = model(**inputs) / num_items_in_batch * self._worker.world_size
        self.step_loss += loss.detach()
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer would write files here, and every step would wait for them."""
        self.store_flos()
        with self._checkpoints.holding():
            if self.args.should_save:
                with_adapters = self._work.config.model.lora_rank is not None
                self.snapshot = Snapshot(self, self.model.network, with_adapters)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The network was opened with the checkpoint's weights."""


class _Nothing(torch.utils.data.IterableDataset):
    """Trainer wants a dataset; what is read when is the order's business."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _Batches:
    """The batches of a worker from the step where the trainer stands to its last. Made anew for each iteration."""

    def __init__(self, trainer: CaptionTrainer, order: GlobalOrder, share: Share, feed: Feed, collate: Collate) -> None:
        self._trainer, self._order, self._share, self._feed, self._collate = trainer, order, share, feed, collate
        self.dataset = trainer.train_dataset

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        state = self._trainer.state
        tables = self._order.tables(self._share, state.global_step, state.max_steps)
        batches = batches_of(self._feed(tables), self._share.batch_size, self._collate)
        upload = Upload(self._trainer.args.device)
        with one_ahead(map(upload, batches)) as ahead:
            yield from map(upload.used, ahead)
