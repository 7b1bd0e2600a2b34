"""A training step of ours beside the transformers guide's, and the whole job beside the bare step.

    python -m benchmarks.train --model DIR --data DIR [--batch-size 4] [--steps 4] [--threads N] [--pipeline]

The guide pads every caption to the model's length, counts padding in the loss and computes logits for every position.
Each runs in a process of its own, in turn. `--pipeline` runs the whole job (Ray Train fed by Ray Data) with 1 and 2
workers instead, and says which share of the bare step's rate it reaches: of the mean of what the bare step did right
before and right after. `share_in_step` is the share of a worker's time that goes into forward and backward pass,
clipping and optimiser, which hardly depends on what else the machine does. DATA: pictures with captions; the last line
is one JSON object.
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
from itertools import cycle, islice
from pathlib import Path

DEVICE_STEPS = 1  # not counted: the first step allocates


def ours(args: argparse.Namespace) -> dict:
    """Decode, collate, forward, backward, optimiser: what a worker does for a step."""

    from captioner.config import ModelConfig, TrainDataConfig, TrainModelConfig
    from captioner.models import resolve
    from captioner.training.archives import list_pairs, open_archives
    from captioner.training.collate import Decode
    from captioner.training.loop import make_collate
    from captioner.training.loss import CaptionLoss
    from captioner.training.order import GlobalOrder, Share
    from captioner.training.pairs import Examine, make_pairs
    from captioner.training.trainable import open_trainable

    ref, config = resolve(ModelConfig(name=args.model)), TrainDataConfig(path=args.data, max_failed=1.0)
    archives = open_archives(config)
    listed = list_pairs(archives, 200)
    train = make_pairs(config, map(Examine(archives, ref.spec, ref.path, None), listed), 0).tables["train"]
    captioner = open_trainable(ref, TrainModelConfig(), device(), args.batch_size, None)
    loss, collate, decode = CaptionLoss(captioner).train(), make_collate(captioner), Decode(archives, ref.spec)
    optimiser = adamw(loss)
    order, share = GlobalOrder(train, 0, "first"), Share(0, 1, args.batch_size)
    times = []
    for step in range(args.steps + DEVICE_STEPS):
        start = time.perf_counter()
        batch = collate(decode(order.take(share.positions(step))))
        batch = {name: values.to(device()) for name, values in batch.items()}
        (loss(**batch) / int((batch["labels"] >= 0).sum())).backward()
        update(loss, optimiser)
        times.append(time.perf_counter() - start)
    return figures(args, times)


def guide(args: argparse.Namespace) -> dict:
    """The recipe of transformers' image captioning guide."""
    from PIL import Image
    from transformers import AutoModelForCausalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device()).train()
    optimiser = adamw(model)
    rows = [json.loads(line) for line in (Path(args.data) / "metadata.jsonl").read_text().splitlines()]
    stream, times = cycle(rows), []
    for _ in range(args.steps + DEVICE_STEPS):
        start = time.perf_counter()
        chunk = list(islice(stream, args.batch_size))
        images = [Image.open(Path(args.data) / row["file_name"]).convert("RGB") for row in chunk]
        texts = [row["text"] if "text" in row else row["captions"][0] for row in chunk]
        inputs = processor(images=images, text=texts, padding="max_length", truncation=True, return_tensors="pt")
        inputs = inputs.to(device())
        inputs.pop("token_type_ids", None)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        update(model, optimiser)
        times.append(time.perf_counter() - start)
    return figures(args, times)


def device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def adamw(model):
    """The optimiser that transformers' Trainer takes by default."""
    import torch

    return torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)


def update(model, optimiser) -> None:
    """What Trainer does after the backward pass."""
    import torch

    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def figures(args: argparse.Namespace, times: list[float]) -> dict:
    import torch

    step = statistics.median(times[DEVICE_STEPS:])
    on_gpu = torch.cuda.is_available()
    peak = (
        torch.cuda.max_memory_allocated() / 1e9 if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    )
    return {
        "samples_per_second": round(args.batch_size / step, 3),
        "seconds_per_step": round(step, 3),
        "peak_memory_gb": round(peak, 3),
    }


def job(args: argparse.Namespace, workers: int) -> dict:
    """The whole job on Ray; the rate of its steps after the first two."""
    from captioner.config import TrainConfig
    from captioner.training import job
    from ray_jobs.train import RayTrainEngine

    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times"
        batch = max(1, args.batch_size // workers)
        steps = args.steps + 5
        config = TrainConfig.model_validate(
            {
                "data": {"path": args.data, "max_eval_samples": 4, "max_failed": 1.0, "limit": 200},
                "model": {"name": args.model, "max_new_tokens": 4},
                "cluster": {"num_workers": workers},
                "training": {"per_device_train_batch_size": batch, "max_steps": steps},
                "output": {"path": f"{folder}/out"},
            }
        )
        job.run(config, RayTrainEngine(config, timed_loop(str(times))))
        ticks = [tuple(map(float, line.split())) for line in times.read_text().splitlines()]
    # The start, two steps that fill the pipeline, and the last step with its evaluation are left out.
    (first, spent_before), (last, spent) = ticks[3], ticks[-3]
    return {
        "samples_per_second": round(batch * workers * (len(ticks) - 6) / (last - first), 3),
        "share_in_step": round((spent - spent_before) / (last - first), 3),
    }


def timed_loop(file: str):
    """The loop of a worker that notes, after each step, the time and the seconds spent so far in what is the bare step
    too: forward and backward pass, clipping, optimiser."""

    def loop(config: dict) -> dict:
        import time

        from accelerate.optimizer import AcceleratedOptimizer

        from captioner.training.loop import CaptionTrainer
        from ray_jobs.train import RayWorker, train_loop

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
            def tell(self, progress: dict) -> None:
                super().tell(progress)
                with open(file, "a") as stream:
                    stream.write(f"{time.perf_counter()} {spent}\n")

        return train_loop(config, Timed)

    return loop


def in_process(args: argparse.Namespace, what: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.train", "--only", what.split()[0]]
    command += ["--model", args.model, "--data", args.data]
    command += ["--steps", str(args.steps), "--batch-size", str(args.batch_size)]
    command += ["--threads", str(args.threads)] if args.threads else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(what, found, file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--pipeline", action="store_true")
    parser.add_argument("--only", choices=["ours", "guide", "job-1", "job-2"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Ray lowers the priority of its workers; beside other work on the machine both sides must have the same.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if args.only:
        if args.threads:
            import torch

            torch.set_num_threads(args.threads)
        run = {"ours": ours, "guide": guide, "job-1": lambda a: job(a, 1), "job-2": lambda a: job(a, 2)}[args.only]
        print(json.dumps(run(args)))
        return
    names = ["ours", "job-1", "ours again", "job-2", "ours at last"] if args.pipeline else ["ours", "guide"]
    found = {name: in_process(args, name) for name in names}
    rates = [found[name]["samples_per_second"] for name in names]
    if args.pipeline:
        shares = {names[k]: rates[k] / ((rates[k - 1] + rates[k + 1]) / 2) for k in (1, 3)}
        found["share_of_step"] = {name: round(share, 3) for name, share in shares.items()}
    else:
        memory = found["ours"]["peak_memory_gb"] / found["guide"]["peak_memory_gb"]
        found["ratio"] = {"samples_per_second": round(rates[0] / rates[1], 2), "peak_memory": round(memory, 3)}
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found["machine"] = {"cpus": cpus, "python": platform.python_version(), "batch_size": args.batch_size}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
