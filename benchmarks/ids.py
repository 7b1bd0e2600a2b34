"""Token ids of ours against transformers' `generate`, from the same weights and pixels.

    python -m benchmarks.ids --model DIR [--count 64] [--beams 1,3,5] [--max-new-tokens 20]

float32 (TF32 off): ids must be equal, else the exit code is 1. bfloat16: the share of captions whose ids equal those
of `generate` in bfloat16, and the share equal to `generate` in float32. Both for --model and for the starter, whose
trained weights say how a real model behaves; images are rendered scenes. At least half of the captions must differ, or
equal ids would prove nothing. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
import torch

from captioner.config import ModelConfig
from captioner.models import load, resolve
from captioner.models.pretrained import open_model, quiet
from captioner.starter.scenes import make_scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GIT model directory")
    parser.add_argument("--count", type=int, default=64, help="captions")
    parser.add_argument("--beams", default="1,3,5")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sizes = [int(beams) for beams in options.beams.split(",")]
    figures: dict[str, list[float]] = {}
    faults: list[str] = []
    for label, model in (("model", options.model), ("starter", "starter")):
        for beams, measured in compare(model, sizes, options.count, options.max_new_tokens).items():
            print(f"{label}, {beams} beams:", measured, flush=True)
            faults += [f"{label}, {beams} beams: {fault}" for fault in faults_of(measured)]
            for name, share in measured.items():
                figures.setdefault(f"{label}: {name}", []).append(round(share, 4))
    print(json.dumps({"beams": sizes, **figures}))
    sys.exit("; ".join(faults) or 0)


def compare(name: str, sizes: list[int], count: int, limit: int) -> dict[int, dict[str, float]]:
    """Shares of the captions, for each number of beams."""
    single, half = (both_ids(name, dtype, sizes, count, limit) for dtype in ("float32", "bfloat16"))
    return {beams: shares(*single[beams], *half[beams]) for beams in sizes}


def shares(
    ours32: torch.Tensor, plain32: torch.Tensor, ours16: torch.Tensor, plain16: torch.Tensor
) -> dict[str, float]:
    return {
        "distinct": len({tuple(row.tolist()) for row in plain32}) / len(plain32),
        "float32 equal to generate": equal_rows(ours32, plain32),
        "bfloat16 equal to generate": equal_rows(ours16, plain16),
        "bfloat16 equal to float32": equal_rows(ours16, plain32),
        "generate's bfloat16 equal to its float32": equal_rows(plain16, plain32),
    }


def faults_of(measured: dict[str, float]) -> list[str]:
    faults = []
    if measured["distinct"] < 0.5:
        faults.append(f"only {measured['distinct']:.0%} of the captions differ: equal ids prove nothing")
    if measured["float32 equal to generate"] < 1:
        faults.append(f"{1 - measured['float32 equal to generate']:.1%} of the float32 captions have other ids")
    return faults


@torch.inference_mode()
def both_ids(
    name: str, dtype: str, sizes: list[int], count: int, limit: int
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """New token ids int64 [count, limit] for each number of beams: ours and `generate`'s."""
    ids, plain = {}, None
    for beams in sizes:
        config = ModelConfig(name=name, num_beams=beams, max_new_tokens=limit, dtype=dtype)
        captioner: Any = load(resolve(config), batch_size=count)
        if captioner.engine != "fast":
            raise SystemExit(f"{name} is captioned by `generate` itself: nothing to compare")
        plain = plain or open_model(captioner.ref.path, captioner.dtype, captioner.device, "eager")
        pixels = captioner.prepare(scenes(count, captioner.ref.spec).to(captioner.device))
        with quiet():
            output = plain.generate(
                pixel_values=pixels, input_ids=captioner.start_rows(count), generation_config=captioner.settings
            )
            ours, _ = captioner.search(pixels)
        reference, end = output.sequences[:, len(captioner.prefix) :].cpu(), captioner.settings.eos_token_id
        ids[beams] = up_to_end(ours.cpu(), limit, end), up_to_end(reference, limit, end)
    return ids


def scenes(count: int, spec: Any) -> torch.Tensor:
    """Rendered scenes of the model's own size, uint8 [count, height, width, 3]."""
    images = (make_scene(2, number).render(max(spec.height, spec.width)) for number in range(count))
    return torch.from_numpy(np.stack([np.asarray(image.resize((spec.width, spec.height))) for image in images]))


def up_to_end(ids: torch.Tensor, limit: int, end: int) -> torch.Tensor:
    """The ids of each caption up to its end token, then -1: what follows the end is not part of it."""
    ids = torch.nn.functional.pad(ids, (0, limit - ids.shape[1]), value=-1)
    ends = (ids == end).int()
    return ids.masked_fill(ends.cumsum(1) - ends > 0, -1)


def equal_rows(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left == right).all(1).float().mean())


if __name__ == "__main__":
    main()
