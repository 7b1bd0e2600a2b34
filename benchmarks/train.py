"""A training step of ours beside the transformers guide's, and the whole job beside the bare step.

    python -m benchmarks.train --model DIR --data DIR [--batch-size 4] [--steps 4] [--precision float32,bf16,fp16]
    python -m benchmarks.train --model DIR --data DIR --pipeline [--precision bf16] [--workers 1,2]

The guide pads every caption to the model's length, counts padding in the loss and computes logits for every position.
Both sides take real optimizer steps with clipping, under autocast where the precision is not float32, and with a
GradScaler for fp16 (which is for GPUs only). Each side runs in a process of its own. Two rates are taken of each, the
median of ROUNDS rounds of `--steps` steps, the device synchronised at both ends of a round:

    step_samples_per_second    batches are ready in memory: copy to the device, forward, backward, clip, optimizer
    samples_per_second         images are read and decoded as each side does it: the guide in turn with its steps, as a
                               DataLoader without workers does; ours ahead of them in threads

`--pipeline` runs the whole job (Ray Train fed by Ray) instead, and says which share of the bare step's rate it reaches:
of the mean of what the bare step did right before and right after. `share_in_step` is the share of a worker's time that
goes into forward and backward pass, clipping and optimizer, which hardly depends on what else the machine does.
`first_step_seconds`: from the start of the job until its first step. DATA: images with captions; the last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import Any

ROUNDS = 3
WARM_UP_STEPS = 2  # the first steps allocate
PRECISIONS = ("float32", "bf16", "fp16")


def ours(args: argparse.Namespace) -> dict:
    """What a worker does for a step, decoding included."""
    from captioner.config import ModelConfig, TrainDataConfig, TrainModelConfig
    from captioner.models import resolve
    from captioner.run.prefetch import one_ahead
    from captioner.training.collate import Decode, Upload
    from captioner.training.evaluate import make_collate
    from captioner.training.loss import CaptionLoss
    from captioner.training.order import GlobalOrder, Share
    from captioner.training.pair_sources import list_pairs, open_pair_sources
    from captioner.training.pairs import Examine, make_pairs
    from captioner.training.trainable import open_trainable

    ref, config = resolve(ModelConfig(name=args.model)), TrainDataConfig(path=args.data, max_failed=1.0)
    sources = open_pair_sources(config)
    listed = list_pairs(sources, 200)
    train = make_pairs(config, map(Examine(sources, ref), listed), 0).tables["train"]
    captioner = open_trainable(ref, TrainModelConfig(), device(), args.batch_size, None)
    loss, collate, decode = CaptionLoss(captioner).train(), make_collate(captioner), Decode(sources, ref.spec)
    order, share = GlobalOrder(train, 0, "first"), Share(0, 1, args.batch_size)
    upload = Upload(device())

    def tables() -> Iterator[Any]:
        step = 0
        while True:
            yield order.take(share.positions(step))
            step += 1

    ready = [collate(decode(table)) for table in islice(tables(), 4)]
    forward = loss
    if args.compile:
        import torch

        forward = torch.compile(loss, dynamic=True)

    def run(batch: dict) -> Any:
        return forward(**batch) / len(batch["labels"])

    def from_images(count: int) -> Iterator[dict]:
        with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) - 1))) as threads:
            decoded = _ahead(threads, decode, tables(), count)
            with one_ahead(map(upload, map(collate, decoded))) as batches:
                yield from map(upload.mark_used, batches)

    def from_memory(count: int) -> Iterator[dict]:
        with one_ahead(map(upload, islice(cycle(ready), count))) as batches:
            yield from map(upload.mark_used, batches)

    return measure(args, loss, run, {"step": from_memory, "": from_images})


def _ahead(threads: ThreadPoolExecutor, function: Callable, items: Iterator, count: int) -> Iterator:
    """`function` of `count` items, in order, in threads."""
    yield from threads.map(function, islice(items, count))


def guide(args: argparse.Namespace) -> dict:
    """The recipe of transformers' image captioning guide."""
    from PIL import Image
    from transformers import AutoModelForCausalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device()).train()
    rows = [json.loads(line) for line in (Path(args.data) / "metadata.jsonl").read_text().splitlines()]
    stream = cycle(rows)

    def prepare() -> Any:
        chunk = list(islice(stream, args.batch_size))
        images = [Image.open(Path(args.data) / row["file_name"]).convert("RGB") for row in chunk]
        texts = [row["text"] if "text" in row else row["captions"][0] for row in chunk]
        inputs = processor(images=images, text=texts, padding="max_length", truncation=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        return inputs

    ready = [prepare() for _ in range(4)]

    def run(inputs: Any) -> Any:
        return model(**inputs, labels=inputs["input_ids"]).loss

    def from_images(count: int) -> Iterator[Any]:
        return (prepare().to(device()) for _ in range(count))

    def from_memory(count: int) -> Iterator[Any]:
        from transformers import BatchFeature

        return (BatchFeature(dict(inputs)).to(device()) for inputs in islice(cycle(ready), count))

    return measure(args, model, run, {"step": from_memory, "": from_images})


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(args: argparse.Namespace, model: Any, run: Callable, feeds: dict[str, Callable]) -> dict:
    """Rates and peak memory in each precision. `run`: a batch -> its loss. `feeds`: name -> number of batches ->
    batches on the device."""
    figures = {}
    for precision in args.precision.split(","):
        steps = Steps(model, run, precision)
        reset_peak_memory()
        figures[precision] = {}
        for name, feed in feeds.items():
            steps.take(feed(WARM_UP_STEPS))
            seconds = statistics.median(steps.take(feed(args.steps)) for _ in range(ROUNDS)) / args.steps
            prefix = f"{name}_" if name else ""
            figures[precision][f"{prefix}samples_per_second"] = round(args.batch_size / seconds, 3)
            figures[precision][f"{prefix}seconds"] = round(seconds, 4)
            if name == "step":
                figures[precision]["peak_memory_gb"] = round(peak_memory(), 3)
        if args.profile:
            profile(steps, feeds["step"], args.steps, precision)
    return figures


class Steps:
    """Optimizer steps as transformers' Trainer takes them."""

    def __init__(self, model: Any, run: Callable, precision: str) -> None:
        import torch

        self._model, self._run, self._torch = model, run, torch
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)  # Trainer's default
        self._scaler = torch.amp.GradScaler() if precision == "fp16" else None
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def take(self, batches: Iterator) -> float:
        """A step with each batch; returns seconds."""
        synchronise()
        start = time.perf_counter()
        for batch in batches:
            self._take(batch)
        synchronise()
        return time.perf_counter() - start

    def _take(self, batch: Any) -> None:
        torch = self._torch
        with torch.autocast(device().type, self._dtype) if self._dtype else nullcontext():
            loss = self._run(batch)
        if self._scaler is None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
        else:
            self._scaler.scale(loss).backward()
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self._optimizer.zero_grad()


def profile(steps: Steps, feed: Callable, count: int, precision: str) -> None:
    """The operations that take longest, to standard error."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    on_gpu = device().type == "cuda"
    with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        steps.take(feed(count))
    key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = recorded.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60)
    print(f"{precision}, {count} steps", table, sep="\n", file=sys.stderr, flush=True)


def reset_peak_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """GB: of the GPU, or of this process (on Linux since `reset_peak_memory`)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "linux":
        line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM"))
        return int(line.split()[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def job(args: argparse.Namespace, workers: int) -> dict:
    """The whole job on Ray; the rate of its steps after the first ones."""
    from captioner.config import TrainConfig
    from captioner.training import job
    from ray_jobs.train import RayTrainEngine

    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times"
        batch = max(1, args.batch_size // workers)
        steps = ROUNDS * args.steps + 5
        precision = {} if args.precision == "float32" else {args.precision: True}
        gpus = {"gpus_per_worker": args.gpus_per_worker} if args.gpus_per_worker is not None else {}
        config = TrainConfig.model_validate(
            {
                "data": {"path": args.data, "max_eval_samples": 4, "max_failed": 1.0, "limit": 200},
                "model": {"name": args.model, "max_new_tokens": 4},
                "cluster": {"num_workers": workers} | gpus,
                "training": {"per_device_train_batch_size": batch, "max_steps": steps} | precision,
                "output": {"path": f"{folder}/out"},
            }
        )
        started = time.perf_counter()
        job.run(config, RayTrainEngine(config, timed_loop(str(times))))
        ticks = [tuple(map(float, line.split())) for line in times.read_text().splitlines()]
    # The start, two steps that fill the pipeline, and the last step with its evaluation are left out.
    (first, spent_before), (last, spent) = ticks[3], ticks[-3]
    return {
        "samples_per_second": round(batch * workers * (len(ticks) - 6) / (last - first), 3),
        "share_in_step": round((spent - spent_before) / (last - first), 3),
        "first_step_seconds": round(ticks[1][0] - started, 1),
    }


def timed_loop(file: str):
    """The loop of a worker that notes, after each step, the time and the seconds spent so far in what is the bare step
    too: forward and backward pass, clipping, optimiser."""

    def loop(config: dict) -> dict:
        import time

        from accelerate.optimizer import AcceleratedOptimizer

        from captioner.training.loop import CaptionTrainer
        from ray_jobs.train_workers import RayWorker, train_loop

        spent = 0.0

        def timed(kind: type, name: str) -> None:
            original = getattr(kind, name)

            def wrapper(*args, **kwargs):
                nonlocal spent
                start = time.perf_counter()
                try:
                    return original(*args, **kwargs)
                finally:
                    spent += time.perf_counter() - start

            setattr(kind, name, wrapper)

        timed(CaptionTrainer, "training_step")
        timed(CaptionTrainer, "_clip_grad_norm")
        timed(AcceleratedOptimizer, "step")

        class Timed(RayWorker):
            def show_progress(self, progress: dict) -> None:
                super().show_progress(progress)
                with open(file, "a") as stream:
                    stream.write(f"{time.perf_counter()} {spent}\n")

        return train_loop(config, Timed)

    return loop


def in_process(args: argparse.Namespace, what: str, precision: str) -> dict:
    """What `--only` prints, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.train", "--only", what.split()[0], "--precision", precision]
    command += ["--model", args.model, "--data", args.data]
    command += ["--steps", str(args.steps), "--batch-size", str(args.batch_size)]
    command += ["--threads", str(args.threads)] if args.threads else []
    command += ["--gpus-per-worker", str(args.gpus_per_worker)] if args.gpus_per_worker is not None else []
    command += [f"--{name}" for name in ("compile", "profile") if getattr(args, name) and what.startswith("ours")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    print(what, figures, file=sys.stderr, flush=True)
    return figures


def compare(args: argparse.Namespace, precisions: list[str]) -> dict:
    """Both sides in every precision, and their ratios."""
    figures = {name: in_process(args, name, ",".join(precisions)) for name in ("ours", "guide")}
    figures["ratio"] = {
        precision: {
            name: round(figures["ours"][precision][name] / figures["guide"][precision][name], 3)
            for name in ("step_samples_per_second", "samples_per_second", "peak_memory_gb")
        }
        for precision in precisions
    }
    return figures


def pipeline(args: argparse.Namespace, precision: str) -> dict:
    """The whole job with each number of workers, and its share of the bare step's rate."""
    figures = {"ours": in_process(args, "ours", precision)}
    shares, before = {}, figures["ours"]
    for workers in args.workers.split(","):
        name = f"job-{workers}"
        figures[name], after = in_process(args, name, precision), in_process(args, "ours again", precision)
        figures[f"ours after {name}"] = after
        bare = [rates[precision]["step_samples_per_second"] for rates in (before, after)]
        shares[name] = round(figures[name]["samples_per_second"] / statistics.mean(bare), 3)
        before = after
    return figures | {"share_of_step": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--precision", default=None, help="some of float32,bf16,fp16; default all, or float32 (job)")
    parser.add_argument("--pipeline", action="store_true")
    parser.add_argument("--workers", default="1,2", help="numbers of workers with --pipeline")
    parser.add_argument("--gpus-per-worker", type=float, default=None)
    parser.add_argument("--compile", action="store_true", help="our loss through torch.compile")
    parser.add_argument("--profile", action="store_true", help="print which operations of our step take longest")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Ray lowers the priority of its workers; beside other work on the machine both sides must have the same.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if args.only:
        if args.threads:
            import torch

            torch.set_num_threads(args.threads)
        kind, _, workers = args.only.partition("-")
        print(json.dumps(job(args, int(workers)) if kind == "job" else {"ours": ours, "guide": guide}[kind](args)))
        return
    import torch

    precisions = (args.precision or ("float32" if args.pipeline else ",".join(PRECISIONS))).split(",")
    if "fp16" in precisions and not torch.cuda.is_available():
        print("fp16 is left out: there is no GPU to compute in float16 on", file=sys.stderr, flush=True)
        precisions.remove("fp16")
    figures = pipeline(args, precisions[0]) if args.pipeline else compare(args, precisions)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    figures["machine"] = {
        "cpus": cpus,
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "batch_size": args.batch_size,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
