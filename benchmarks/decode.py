"""File bytes to the model's pixels on one core: ours, and Pillow with the model's own image processor, in turn.

    python -m benchmarks.decode --model DIR --images DIR [--rounds 5] [--limit N]

Both start from the same bytes in memory; ours ends with uint8 pixels, since normalising is the device's work, and the
processor's with normalised ones. The last line is one JSON object: pictures a second of CPU time, medians of the
rounds; `mean_abs_diff`, of values scaled to 0..1, before normalising, over all pictures and the worst of them.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor

from captioner.config import ModelConfig
from captioner.imaging import decode
from captioner.models import ModelRef, resolve

MAX_PIXELS = 300_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ref = resolve(ModelConfig(name=options.model))
    processor = AutoImageProcessor.from_pretrained(ref.path, backend="pil")
    files = [path.read_bytes() for path in sorted(Path(options.images).rglob("*.jpg"))[: options.limit]]
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: [decode(data, ref.spec, MAX_PIXELS) for data in files],
        "processor": lambda: [processor(images=[_open(data)], return_tensors="pt") for data in files],
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name, run in runs.items():
            started = time.process_time()
            run()
            rates[name].append(len(files) / (time.process_time() - started))
        print(f"round {number}:", {name: round(values[-1], 1) for name, values in rates.items()})
    ours, theirs = (statistics.median(values[1:]) for values in rates.values())
    differences = [_difference(data, ref, processor) for data in files]
    print(
        json.dumps(
            {
                "ours_per_core": round(ours, 1),
                "processor_per_core": round(theirs, 1),
                "ratio": round(ours / theirs, 3),
                "mean_abs_diff": round(statistics.fmean(differences), 5),
                "worst_mean_abs_diff": round(max(differences), 5),
                "images": len(files),
            }
        )
    )


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _difference(data: bytes, ref: ModelRef, processor: Any) -> float:
    """Mean absolute difference of one picture's pixels, scaled to 0..1."""
    prepared = processor(images=[_open(data)], do_rescale=False, do_normalize=False, return_tensors="np")
    expected = np.asarray(prepared["pixel_values"][0], np.float32).transpose(1, 2, 0)
    pixels = decode(data, ref.spec, MAX_PIXELS).pixels
    assert pixels is not None, "a picture that cannot be decoded"
    return float(np.abs(pixels - expected).mean() / 255)


if __name__ == "__main__":
    main()
