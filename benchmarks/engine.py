"""The search alone: pixels in, token ids out, ours and transformers' `generate` in turn.

    python -m benchmarks.engine --model DIR [--batch-size 8] [--rounds 3] [--threads 4] [--dtype float32]
        [--whole]

Both make exactly --new-tokens tokens for random pixels, from the same weights. Prints a line a round and, last, one
JSON line of ratios of the fastest rounds: times of `generate` and of encoding (once a picture: vision tower, and keys
and values of the image tokens) over ours. On a GPU also the rate of large matrix products, to hold the figures against.
--whole adds what stands around the search: `captioner.caption` of two batches of uint8 images as a share of the
search's rate, and the seconds that `--batch-size auto` takes where nothing is remembered.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from captioner.config import ModelConfig
from captioner.models import load, resolve
from captioner.models.git import FastSearch, open_network
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
    if options.whole:
        result |= _caption_rate(options, dtype, result["greedy_images_per_second"]) | _automatic_size(options, dtype)
    print(json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GIT model directory")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--whole", action="store_true", help="`captioner.caption` and --batch-size auto as well")
    return parser.parse_args()


def _compare(options: argparse.Namespace, plain: Any, dtype: str, beams: int) -> tuple[dict[str, Any], bool]:
    captioner: Any = load(_ref(options, dtype, beams), batch_size=options.batch_size, num_threads=options.threads)
    # Without an end token both make every token; a minimum length would be a logits processor, which needs the host.
    captioner.settings.eos_token_id = plain.generation_config.eos_token_id = None
    ours = FastSearch(open_network(captioner.model), captioner.settings, captioner.prefix)
    spec = captioner.ref.spec
    shape = options.batch_size, spec.height, spec.width, 3
    with torch.inference_mode(), quiet():
        noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        pixels = captioner.normalise(noise.to(captioner.device))
        state = ours.network.new_state(options.batch_size, 1, 1 + options.new_tokens)
        rows = captioner.start_rows(options.batch_size)
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda: ours(pixels).tokens,
            "generate": lambda: plain.generate(
                pixel_values=pixels,
                input_ids=rows,
                num_beams=beams,
                do_sample=False,
                max_new_tokens=options.new_tokens,
            ),
            "encode": lambda: ours.network.encode(pixels, state),
        }
        seconds = _in_turn(runs, options.rounds, beams)
        same = torch.equal(runs["ours"](), runs["generate"]()[:, -options.new_tokens :])
    figures = _figures("greedy" if beams == 1 else f"beam{beams}", seconds, options.batch_size)
    figures["encode_teraflops"] = round(options.batch_size * _encode_flop(plain.config) / seconds["encode"] / 1e12, 2)
    return figures, same


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
        f"{name}_ms": round(seconds["ours"] * 1e3, 2),
        "encode_ms": round(seconds["encode"] * 1e3, 2),
    }


def _encode_flop(config: Any) -> float:
    """Of the matrix products that encoding one image needs: the vision tower, and the text layers over its tokens, of
    the last of which only keys and values are used."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2

    def layer(width: int, inner: int) -> float:
        tokens = patches + 1
        return 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width

    embedding = 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size
    tower = vision.num_hidden_layers * layer(vision.hidden_size, vision.intermediate_size)
    text = (config.num_hidden_layers - 1) * layer(config.hidden_size, config.intermediate_size)
    return embedding + tower + text + 2 * (patches + 1) * 2 * config.hidden_size**2


def _caption_rate(options: argparse.Namespace, dtype: str, search_rate: float) -> dict[str, float]:
    """Two batches of uint8 images to captions, greedy: what a worker's call costs."""
    captioner: Any = load(_ref(options, dtype, 1), batch_size=options.batch_size, num_threads=options.threads)
    spec, count = captioner.ref.spec, 2 * options.batch_size
    pixels = np.random.default_rng(1).integers(0, 256, (count, spec.height, spec.width, 3), dtype=np.uint8)
    seconds = []
    for _ in range(options.rounds + 2):
        started = time.perf_counter()
        captioner.caption(pixels)
        seconds.append(time.perf_counter() - started)
    rate = count / min(seconds[1:])
    return {"caption_images_per_second": round(rate, 2), "caption_of_engine": round(rate / search_rate, 3)}


def _automatic_size(options: argparse.Namespace, dtype: str) -> dict[str, float]:
    """Seconds that finding a batch size adds to a start, and the size."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # where sizes are remembered
        for size in (options.batch_size, "auto"):
            started = time.perf_counter()
            captioner: Any = load(_ref(options, dtype, 1), batch_size=size, num_threads=options.threads)
            seconds[size] = time.perf_counter() - started
    extra = seconds["auto"] - seconds[options.batch_size]
    return {"batch_size_auto": captioner.batch_size, "batch_size_auto_seconds": round(extra, 1)}


def _ref(options: argparse.Namespace, dtype: str, beams: int) -> Any:
    return resolve(ModelConfig(name=options.model, num_beams=beams, max_new_tokens=options.new_tokens, dtype=dtype))


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
