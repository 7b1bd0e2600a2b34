"""What judging captions costs: `captioner judge --local` with a CLIP of ViT-B/32's shape and random weights.

    python -m benchmarks.judging [--images 512]

Captions rendered scenes of 640 x 480 with the fake model, then judges them on one thread, after a run over a few that
is not counted. The last line is one JSON object:

    images_per_second       by the clock
    cpu_ms_per_image        of this process and its decoder, all of them
    encode_share            of the seconds of the clock: embedding images, captions and references
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = make_clip(Path(folder, "clip"))
        for count in (8, options.images):
            result = judge(Path(folder, str(count)), count, model)
    print(json.dumps(result | {"images": options.images, "cores": os.cpu_count(), "python": platform.python_version()}))


def make_clip(path: Path) -> Path:
    """A CLIP of 151 M parameters: transformers' default shape is that of openai/clip-vit-base-patch32."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from captioner.testing.tiny_clip import make_tokenizer

    tokenizer = make_tokenizer()
    CLIPProcessor(CLIPImageProcessorPil(), tokenizer).save_pretrained(path)
    ids = {"eos_token_id": len(tokenizer) - 1, "bos_token_id": 1, "pad_token_id": 0}
    CLIPModel(CLIPConfig(text_config=ids)).save_pretrained(path)
    return path


def judge(folder: Path, count: int, model: Path) -> dict[str, Any]:
    from captioner import pipeline
    from captioner.config import CaptionConfig, JudgeTableConfig
    from captioner.run import judging
    from captioner.starter.scenes import make_scene

    (folder / "images").mkdir(parents=True)
    for index in range(count):
        image = make_scene(0, index).render(480).resize((640, 480), Image.Resampling.BILINEAR)
        image.save(folder / "images" / f"{index:05d}.jpg", quality=90)
    source, out = {"path": str(folder / "images")}, str(folder / "out")
    pipeline.run(CaptionConfig.model_validate({"source": source, "model": {"name": "fake"}, "output": {"path": out}}))
    engine, before, started = Timed(), _cpu_seconds(), time.perf_counter()
    judging.judge(out, JudgeTableConfig.model_validate({"judge": {"name": str(model), "device": "cpu"}}), engine)
    seconds = time.perf_counter() - started
    return {
        "images_per_second": round(count / seconds, 2),
        "cpu_ms_per_image": round(1000 * (_cpu_seconds() - before) / count, 1),
        "encode_share": round(engine.seconds / seconds, 3),
    }


class Timed:
    """The engine of one process. `seconds`: spent on scores."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def judge_chunks(self, work: Any, chunks: Any) -> Any:
        from captioner.run import judging

        score = judging.score

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            rows = score(*arguments)
            self.seconds += time.perf_counter() - started
            return rows

        judging.score = timed
        try:
            yield from judging.LocalJudgeEngine().judge_chunks(work, chunks)
        finally:
            judging.score = score


def _cpu_seconds() -> float:
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


if __name__ == "__main__":
    main()
