"""Everything that a GPU machine is to prove and measure, in one command: see `benchmarks/gpu.sh`.

    python -m benchmarks.gpu [--form long|short|rehearsal] [--out DIR] [--work DIR] [--photos DIR] [--peers DIR]
        [--model DIR] [--seconds N] [--only STEP,...]

long takes ten minutes, short four; rehearsal runs every step on a CPU with a tiny model, before minutes of a GPU are
spent on a fault in a step. Each step is a process of its own with its own time limit, and never stops the next one.
OUT/gpu.md (the table, shown at the end), OUT/gpu.json and OUT/STEP.log are written after every step. Inputs and tables
stay in WORK, so that a second run on a machine starts where inputs are there. The exit code is 1 where a step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_table import available_cpus, describe_machine, nvidia_smi, summary, write_results
from benchmarks.jobs import kill_all

MIN_SECONDS = 15  # a step that has fewer left of the whole time is not started


@dataclass(frozen=True)
class Form:
    """How large the steps are."""

    seconds: int
    size: str
    images: int
    batch_size: int
    few: int  # images of the slow peer
    pairs: int
    train_batch: int
    train_steps: int
    steps: tuple[str, ...]


LONG = (
    *("inputs", "ids", "engine", "job", "kill", "train_job", "train_step", "hf_loader", "two_workers", "oversized"),
    *("ray_naive", "families", "quantized", "two_gpus", "train_families"),
)
FORMS = {
    "long": Form(570, "base", 12_288, 256, 1_024, 1_152, 32, 20, LONG),
    "short": Form(230, "base", 6_144, 256, 1_024, 384, 32, 10, ("inputs", "ids", "engine", "job", "kill")),
    "rehearsal": Form(3_600, "tiny", 96, 8, 48, 48, 4, 3, LONG),
}


@dataclass(frozen=True)
class Setup:
    """Where things are."""

    options: argparse.Namespace
    form: Form

    @property
    def model(self) -> str:
        return str(self.options.model or self.options.work / "model")

    def path(self, name: str) -> str:
        return str(self.options.work / name)

    def module(self, name: str, *arguments: object) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]

    def job(self, kind: str, images: str, out: str, *arguments: object) -> list[str]:
        paths = ("--model", self.model, "--images", self.path(images), "--out", self.path(out))
        return self.module("jobs", kind, *paths, *arguments)

    def peer(self, script: str, *arguments: object) -> list[str]:
        if self.options.peers is None or not (self.options.peers / script).exists():
            raise SkippedError(f"no {script} in --peers")
        command = [sys.executable, str(self.options.peers / script), "--model", self.model]
        return [*command, "--batch-size", str(self.form.batch_size), *map(str, arguments)]


class SkippedError(Exception):
    """A step that this machine or this run cannot take; the message says why."""


@dataclass(frozen=True)
class Step:
    limit: int  # seconds
    command: Callable[[Setup], list[str]]


def inputs(setup: Setup) -> list[str]:
    form, options = setup.form, setup.options
    photos = ["--photos", options.photos] if options.photos else []
    counts = ("--images", form.images, "--few", form.few, "--pairs", form.pairs)
    return setup.module("inputs", options.work, "--size", form.size, *counts, *photos)


def ids(setup: Setup) -> list[str]:
    return setup.module("ids", "--model", setup.model, "--count", 64 if setup.form.size == "base" else 24)


def engine(setup: Setup) -> list[str]:
    return setup.module("engine", "--model", setup.model, "--batch-size", setup.form.batch_size, "--whole")


def job(setup: Setup) -> list[str]:
    return setup.job("caption", "images", "job", *TOKENS)


def kill(setup: Setup) -> list[str]:
    return setup.job("kill", "images", "killed", "--against", setup.path("job"), *TOKENS)


def two_workers(setup: Setup) -> list[str]:
    share = ("--gpus-per-worker", 0.5) if has_gpu() else ("--decode-cpus", 1)
    return setup.job("caption", "images", "two", "--against", setup.path("job"), "--num-workers", 2, *share, *TOKENS)


def oversized(setup: Setup) -> list[str]:
    need_gpu()
    return setup.job("oversized", "images", "oversized", *TOKENS)


def train_job(setup: Setup) -> list[str]:
    sizes = ("--max-steps", setup.form.train_steps, "--per-device-train-batch-size", setup.form.train_batch)
    return setup.job("train", "pairs", "trained", "--bf16", *sizes, "--max-eval-samples", 16, *TOKENS)


def train_step(setup: Setup) -> list[str]:
    steps, precisions = (4, "fp16,bf16") if has_gpu() else (2, "float32,bf16")
    sizes = ("--batch-size", setup.form.train_batch, "--steps", steps, "--precision", precisions)
    return setup.module("train", "--model", setup.model, "--data", setup.path("pairs"), *sizes)


def hf_loader(setup: Setup) -> list[str]:
    need_gpu()
    workers = max(1, available_cpus() - 1)
    return setup.peer("hf_loader.py", "--images", setup.path("images"), "--workers", workers)


def families(setup: Setup) -> list[str]:
    sizes = ("--images", 96, "--batch-size", 16) if has_gpu() else ("--images", 4, "--batch-size", 2, "--rounds", 1)
    return setup.module("families", "--work", setup.path("families"), *sizes)


def quantized(setup: Setup) -> list[str]:
    kinds, size = ("bfloat16,int8,int4", 64) if has_gpu() else ("float32,int8,int4", 4)
    batch = 16 if has_gpu() else 2
    return setup.module("weights", "--model", _chat_model(setup), "--kinds", kinds, *_sized(size, batch))


def two_gpus(setup: Setup) -> list[str]:
    if len(nvidia_smi()) < 2:
        raise SkippedError("needs two GPUs")
    return setup.module("weights", "--model", _chat_model(setup), "--kinds", "bfloat16", "--gpus", 2, *_sized(64, 16))


def _sized(images: int, batch_size: int) -> tuple[object, ...]:
    return ("--images", images, "--batch-size", batch_size)


def _chat_model(setup: Setup) -> str:
    """The Qwen2.5-VL that the step families made."""
    model = setup.path(f"families/qwen2_5_vl-{'published' if has_gpu() else 'cpu'}")
    if not Path(model, "config.json").exists():
        raise SkippedError("needs the model of step families")
    return model


def train_families(setup: Setup) -> list[str]:
    precision, batch = ("bf16", 8) if has_gpu() else ("float32", 2)
    sizes = ("--batch-size", batch, "--precision", precision, "--steps", 4)
    return setup.module("train_families", "--work", setup.path("train_families"), *sizes)


def ray_naive(setup: Setup) -> list[str]:
    shutil.rmtree(setup.path("ray_naive"), ignore_errors=True)  # it would add to what is there
    return setup.peer("ray_naive.py", "--images", setup.path("few"), "--out", setup.path("ray_naive"))


TOKENS = ("--max-new-tokens", 20)
STEPS = {
    "inputs": Step(75, inputs),
    "ids": Step(90, ids),
    "engine": Step(60, engine),
    "job": Step(75, job),
    "kill": Step(100, kill),
    "train_job": Step(75, train_job),
    "train_step": Step(110, train_step),
    "hf_loader": Step(60, hf_loader),
    "two_workers": Step(60, two_workers),
    "oversized": Step(75, oversized),
    "ray_naive": Step(60, ray_naive),
    "families": Step(180, families),
    "quantized": Step(90, quantized),
    "two_gpus": Step(60, two_gpus),
    "train_families": Step(300, train_families),
}


def main() -> None:
    options = _options()
    form = FORMS[options.form]
    setup, deadline = Setup(options, form), time.monotonic() + (options.seconds or form.seconds)
    os.environ |= {"RAY_ADDRESS": "local", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["XDG_CACHE_HOME"] = str(options.work / "cache")
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.work / "cache", ignore_errors=True)  # the first job finds its batch size, as anybody's does
    machine, results = describe_machine(), dict[str, dict[str, Any]]()
    for name in form.steps:
        if options.only and name not in options.only.split(","):
            continue
        results[name] = run_step(name, setup, deadline)
        print(summary(name, results[name]), flush=True)
        write_results(options, machine, results)
    print((options.out / "gpu.md").read_text())
    sys.exit(any(result["status"] not in ("ok", "skipped") for result in results.values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=list(FORMS), default="long")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "captioner-gpu")
    parser.add_argument("--photos", type=Path, help="JPEGs to caption; default: rendered scenes")
    parser.add_argument("--peers", type=Path, help="directory with hf_loader.py and ray_naive.py")
    parser.add_argument("--model", type=Path, help="a GIT model directory; default: the git-base shape, random weights")
    parser.add_argument("--seconds", type=int, help="of the whole, if not those of the form")
    parser.add_argument("--only", help="steps, comma-separated")
    options = parser.parse_args()
    for name in ("out", "work", "photos", "peers", "model"):
        path = getattr(options, name)
        setattr(options, name, path and path.resolve())
    return options


def run_step(name: str, setup: Setup, deadline: float) -> dict[str, Any]:
    """Status, seconds and figures of a step; its output is in OUT/NAME.log."""
    left = deadline - time.monotonic()
    limit = STEPS[name].limit if setup.form.size == "base" else setup.form.seconds
    if left < MIN_SECONDS:
        return {"status": "skipped", "message": "no time left"}
    try:
        command = STEPS[name].command(setup)
    except SkippedError as reason:
        return {"status": "skipped", "message": str(reason)}
    log, started = setup.options.out / f"{name}.log", time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
        status = wait(process, min(limit, left))
    result: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - started, 1)}
    lines = log.read_text(errors="replace").splitlines()
    result["figures"] = last_object(lines)
    if status != "ok":
        result["message"] = next((line.strip() for line in reversed(lines) if line.strip()), "no output")[-300:]
    return result


def wait(process: subprocess.Popen[bytes], limit: float) -> str:
    try:
        code = process.wait(limit)
        return "ok" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        kill_all(process)
        return f"cut off after {limit:.0f} s"


def last_object(lines: list[str]) -> dict[str, Any]:
    """The last line that is a JSON object; {} where there is none."""
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                return dict(json.loads(line))
            except ValueError:
                continue
    return {}


def has_gpu() -> bool:
    return bool(nvidia_smi())


def need_gpu() -> None:
    if not has_gpu():
        raise SkippedError("needs a GPU")


if __name__ == "__main__":
    main()
