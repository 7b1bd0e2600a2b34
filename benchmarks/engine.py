"""The search alone: pixels in, token ids out, ours and transformers' `generate` in turn.

    python -m benchmarks.engine --model DIR [--batch-size 8] [--rounds 3] [--threads 4] [--dtype float32]

Both make exactly --new-tokens tokens for random pixels, from the same weights. Prints a line a round and, last, one
JSON line of ratios of the fastest rounds: times of `generate` and of encoding (once a picture: vision tower, and keys
and values of the image tokens) over ours. On a GPU also the rate of large matrix products, to hold the figures against.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from captioner.config import ModelConfig
from captioner.models import load, resolve
from captioner.models.git_fast import FastSearch
from captioner.models.pretrained import open_model, quiet


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    plain = open_model(options.model, getattr(torch, dtype), device, "eager")
    result: dict[str, Any] = {"device": _name(device), "dtype": dtype, "batch_size": options.batch_size}
    equal = []
    for beams in (1, 3):
        measured, same = _compare(options, plain, dtype, beams)
        result |= measured
        equal.append(same)
    result["ids_equal"] = all(equal)
    if device.type == "cuda":
        result["matmul_teraflops"] = _matmul_rate(device, getattr(torch, dtype))
    print(json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GIT model directory")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    return parser.parse_args()


def _compare(options: argparse.Namespace, plain: Any, dtype: str, beams: int) -> tuple[dict[str, Any], bool]:
    config = ModelConfig(name=options.model, num_beams=beams, max_new_tokens=options.new_tokens, dtype=dtype)
    captioner: Any = load(resolve(config), batch_size=options.batch_size, num_threads=options.threads)
    captioner.settings.min_new_tokens = options.new_tokens
    ours = FastSearch.over(captioner.model, captioner.settings, captioner.prefix)
    spec = captioner.ref.spec
    shape = options.batch_size, spec.height, spec.width, 3
    with torch.inference_mode(), quiet():
        noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        pixels = captioner.normalise(noise.to(captioner.device))
        state = ours.stepper.network.new_state(options.batch_size, 1, 1 + options.new_tokens)
        rows = captioner.start_rows(options.batch_size)
        length = {"min_new_tokens": options.new_tokens, "max_new_tokens": options.new_tokens}
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda: ours(pixels).tokens,
            "generate": lambda: plain.generate(
                pixel_values=pixels, input_ids=rows, num_beams=beams, do_sample=False, **length
            ),
            "encode": lambda: ours.stepper.network.encode(pixels, state),
        }
        seconds = _in_turn(runs, options.rounds, beams)
        same = torch.equal(runs["ours"](), runs["generate"]()[:, -options.new_tokens :])
    return _figures("greedy" if beams == 1 else f"beam{beams}", seconds, options.batch_size), same


def _in_turn(runs: dict[str, Callable[[], Any]], rounds: int, beams: int) -> dict[str, float]:
    """Seconds of the fastest round of each run, after one that is not counted: what else runs can only add time."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
        print(f"{beams} beams, round {number}:", {name: round(times[-1], 4) for name, times in seconds.items()})
    return {name: min(times[1:]) for name, times in seconds.items()}


def _figures(name: str, seconds: dict[str, float], batch_size: int) -> dict[str, Any]:
    return {
        f"{name}_vs_generate": round(seconds["generate"] / seconds["ours"], 3),
        f"{name}_vs_encode": round(seconds["encode"] / seconds["ours"], 3),
        f"{name}_images_per_second": round(batch_size / seconds["ours"], 2),
    }


def _matmul_rate(device: torch.device, dtype: torch.dtype, side: int = 8192, times: int = 20) -> float:
    """Teraflops of square matrix products."""
    left = torch.randn(side, side, device=device, dtype=dtype)
    for _ in range(3):
        left @ left
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        left @ left
    torch.cuda.synchronize()
    return round(2 * side**3 * times / (time.perf_counter() - started) / 1e12, 1)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
