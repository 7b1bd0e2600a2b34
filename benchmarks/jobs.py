"""Whole jobs on a GPU machine, as a person runs them; each prints one JSON object last and fails where a proof fails.

    python -m benchmarks.jobs caption   --model DIR --images DIR --out OUT [CAPTIONER OPTIONS]
    python -m benchmarks.jobs kill      --model DIR --images DIR --out OUT --against TABLE [CAPTIONER OPTIONS]
    python -m benchmarks.jobs oversized --model DIR --images DIR --out OUT [CAPTIONER OPTIONS]
    python -m benchmarks.jobs train     --model DIR --images PAIRS --out OUT [CAPTIONER OPTIONS]

caption    images/s in steady state, seconds from the command to the first committed image, shares of time that devices
           and decoders were busy; with --against TABLE the captions must equal those of that table
kill       SIGKILL to every process of a run when a third is committed, the same command again, `captioner verify`;
           captions must equal those of TABLE, a run that was left alone
oversized  a batch that the GPU's memory cannot hold: torch may take little more than 32 images need, the job is told
           --batch-size 512; it must end with every row ok
train      seconds from the command to the first step on the display, and samples/s

CAPTIONER OPTIONS go to the command as they are. OUT is removed first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captioner.testing import num_committed_chunks

CAPTIONER = (sys.executable, "-m", "ray_jobs.cli")
POLL_S = 0.02
# Of git-base: what captioning a batch takes grows with it, weights and working memory of libraries do not.
FITTING, OVERSIZED = 32, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["caption", "kill", "oversized", "train"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--against", type=Path)
    options, rest = parser.parse_known_args()
    options.model, options.images = (str(Path(path).resolve()) for path in (options.model, options.images))
    os.environ.setdefault("RAY_ADDRESS", "local")
    shutil.rmtree(options.out, ignore_errors=True)
    run = {"caption": caption, "kill": kill, "oversized": oversized, "train": train}[options.kind]
    print(json.dumps(run(options, rest)))


def caption(options: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    started = time.perf_counter()
    job = start(caption_command(options, rest))
    wait_for_chunks(job, options.out, 1)
    first = time.perf_counter() - started
    finish(job)
    figures = {"first_image_seconds": round(first, 1), "all_seconds": round(time.perf_counter() - started, 1)}
    return figures | record_figures(options.out) | compared(options)


def kill(options: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    command, chunks = caption_command(options, rest), sum(plan.num_chunks for plan in plans_of(options.against))
    job = start(command)
    wait_for_chunks(job, options.out, max(1, chunks // 3))
    kill_all(job)
    committed = num_committed_chunks(options.out)
    if not 0 < committed < chunks:
        raise SystemExit(f"{committed} of {chunks} chunks were committed when the run was killed: not its middle")
    started = time.perf_counter()
    job = start(command)
    wait_for_chunks(job, options.out, committed + 1)
    resumed = time.perf_counter() - started
    finish(job)
    subprocess.run([*CAPTIONER, "verify", str(options.out)], check=True, stdout=sys.stderr)
    figures = {
        "chunks": chunks,
        "committed_when_killed": committed,
        "resume_seconds": round(resumed, 1),
        "verified": True,
    }
    return figures | compared(options)


def oversized(options: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("the memory of a GPU is needed, and torch has none here")
    fraction, halved_to = tight_memory(options.model)
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = f"per_process_memory_fraction:{fraction:.5f}"
    job = start(caption_command(options, ["--batch-size", str(OVERSIZED), *rest]))
    finish(job)
    rows = max(plan.rows_per_chunk for plan in plans_of(options.out))
    if rows <= halved_to:
        raise SystemExit(f"chunks of {rows} images fit, as batches of {halved_to} did: give more images")
    figures = {"memory_fraction": round(fraction, 5), "halved_to": halved_to, "images_per_chunk": rows}
    return figures | record_figures(options.out)


def tight_memory(model: str) -> tuple[float, int]:
    """The share of the GPU's memory that holds FITTING images and not OVERSIZED ones, and what an oversized batch was
    halved to in this process. Fails where it was not."""
    import numpy as np
    import torch

    from captioner.config import ModelConfig
    from captioner.models import load, resolve

    ref = resolve(ModelConfig(name=model, max_new_tokens=20, dtype="bfloat16"))
    captioner: Any = load(ref, batch_size=FITTING)
    pixels = np.random.default_rng(0).integers(0, 256, (OVERSIZED, ref.spec.height, ref.spec.width, 3), dtype=np.uint8)
    captioner.caption(pixels[:FITTING])
    fraction = 1.2 * torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    captioner.free_memory()
    captioner.batch_size = OVERSIZED
    torch.cuda.set_per_process_memory_fraction(fraction)
    captions = captioner.caption(pixels)
    if captioner.batch_size == OVERSIZED or len(captions.texts) != OVERSIZED:
        raise SystemExit(f"{OVERSIZED} images fit {fraction:.2%} of the memory: nothing was halved")
    return fraction, captioner.batch_size


def train(options: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    """The display of a terminal, which a pseudo-terminal asks for, is renewed four times a second."""
    started = time.perf_counter()
    leader, terminal = os.openpty()
    command = [*CAPTIONER, "train", options.images, str(options.out), "--model", options.model, *rest]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
    job = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment, start_new_session=True)
    os.close(terminal)
    first, rate = watch_display(leader, started)
    if job.wait():
        raise SystemExit(f"captioner train ended with {job.returncode}")
    if first is None:
        raise SystemExit("the display never showed a step")
    return {
        "first_step_seconds": round(first, 1),
        "all_seconds": round(time.perf_counter() - started, 1),
        "samples_per_second": rate,
    }


def watch_display(terminal: int, started: float) -> tuple[float | None, float | None]:
    """Seconds until the display shows a first step, and the highest samples/s on it: the rate counts from the first
    step, and falls once an evaluation ran. Copies it to standard error until
    the job ends."""
    first, rate, shown = None, None, b""
    while data := read_terminal(terminal):
        sys.stderr.buffer.write(data)
        sys.stderr.flush()
        shown = (shown + data)[-4_096:]
        if first is None and re.search(rb"step [1-9][\d,]*/", shown):
            first = time.perf_counter() - started
        if rates := re.findall(rb"([\d.,]+) samples/s", shown):
            rate = max(rate or 0.0, float(rates[-1].replace(b",", b"")))
    print(file=sys.stderr)  # the display ends within a line
    return first, rate


def read_terminal(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:  # this is how Linux says that nobody writes to a pseudo-terminal any more
        return b""


def caption_command(options: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    own = ["--no-dedupe", "--sample", "0"]
    return [*CAPTIONER, "caption", options.images, str(options.out), "--model", options.model, *own, *rest]


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)


def finish(job: subprocess.Popen[bytes]) -> None:
    if job.wait():
        raise SystemExit(f"captioner ended with {job.returncode}")


def wait_for_chunks(job: subprocess.Popen[bytes], out: Path, count: int) -> None:
    while num_committed_chunks(out) < count:
        if job.poll() is not None:
            raise SystemExit(f"captioner ended with {job.returncode} before chunk {count} was committed")
        time.sleep(POLL_S)


def plans_of(table: Path) -> list[Any]:
    from captioner.store.table import open_table

    return open_table(str(table)).plans()


def kill_all(job: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process group, and to what has left it: Ray starts its processes in groups of their own."""
    import psutil

    children = psutil.Process(job.pid).children(recursive=True)
    os.killpg(job.pid, signal.SIGKILL)
    for process in children:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    job.wait()


def record_figures(out: Path) -> dict[str, Any]:
    """What the record of a run says. Fails unless every image is ok."""
    record = json.loads((out / "run.json").read_text())
    counts = record["counts"]
    if counts["ok"] != counts["planned"]:
        raise SystemExit(f"{counts['ok']} of {counts['planned']} rows are ok")
    return {
        "images": counts["ok"],
        "images_per_second": record["images_per_second"],
        "startup_seconds": record["seconds"]["startup"],
        "busy": record["busy"],
        "slots": record["slots"],
    }


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """Whether the captions equal those of --against, by image id. Fails where one differs, or where they are so alike
    that being equal proves nothing."""
    if options.against is None:
        return {}
    captions, others = captions_of(options.out), captions_of(options.against)
    differ = sum(others.get(image_id) != caption for image_id, caption in captions.items())
    if differ or not captions:
        raise SystemExit(f"{differ} of {len(captions)} captions differ from those of {options.against}")
    unlike = 1 - sum((count / len(captions)) ** 2 for count in Counter(captions.values()).values())
    if unlike < 0.5:
        raise SystemExit(f"two images have different captions in {unlike:.0%} of cases: equal captions prove nothing")
    return {"captions_equal": len(captions), "two_images_differ": round(unlike, 3)}


def captions_of(table: Path) -> dict[str, str]:
    import pyarrow.parquet as pq

    rows = pq.read_table(table / "captions", columns=["image_id", "caption"])
    return dict(zip(rows["image_id"].to_pylist(), rows["caption"].to_pylist(), strict=True))


if __name__ == "__main__":
    main()
