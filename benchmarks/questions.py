"""Several questions about each image to a chat model: what it saves that the vision part encodes an image once.

    python -m benchmarks.questions [--questions 3] [--images 16] [--batch-size 4] [--new-tokens 10] [--rounds 3]
        [--size cpu|published] [--work DIR]

The SmolVLM shape of `benchmarks.families` with random weights, float32, noisy scenes that decoders have prepared. The
rounds of the two sides alternate: features shared by all questions about a batch, and encoded for each question. Prints
the median ratio of CPU time, which other work on the machine changes less than the clock, and if answers are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.families import _files, make_model
from captioner.config import ModelConfig
from captioner.data import RawImage
from captioner.imaging import decode_images
from captioner.models import load, resolve

PROMPTS = ("Describe the image in one sentence.", "Which objects are there?", "Which text is in the image?", "Where?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=3, choices=range(2, len(PROMPTS) + 1))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=["cpu", "published"], default="cpu")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "captioner-families")
    options = parser.parse_args()
    options.photos = None
    captioner = _captioner(options)
    raws = [RawImage(str(index), "", data) for index, data in enumerate(_files(options))]
    pixels = decode_images(raws, captioner.ref.spec, 10**8).pixels
    shared = captioner._features.sharing
    sides = {"shared": shared, "alone": lambda images: nullcontext()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    answers: dict[str, Any] = {}
    for number in range(options.rounds + 1):
        for name, sharing in sides.items():
            captioner._features.sharing = sharing
            started = time.process_time()
            captions = captioner.caption(pixels)
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - started)
            answers[name] = [captions.texts, captions.answers]
    ratios = [alone / shared for alone, shared in zip(seconds["alone"], seconds["shared"], strict=True)]
    result = {
        "questions": options.questions,
        "images": options.images,
        "cpu_seconds": {name: round(statistics.median(spent), 2) for name, spent in seconds.items()},
        "cpu_ratio": round(statistics.median(ratios), 2),
        "equal": answers["shared"] == answers["alone"],
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result))


def _captioner(options: argparse.Namespace) -> Any:
    directory = options.work / f"smolvlm-{options.size}"
    if not (directory / "config.json").exists():
        make_model("smolvlm", options.size, directory)
    names = ("caption", "objects", "text", "place")
    questions = {name: {"prompt": prompt} for name, prompt in zip(names, PROMPTS[: options.questions], strict=False)}
    file = options.work / "questions.json"
    file.write_text(json.dumps(questions))  # JSON is YAML
    model = {"name": str(directory), "dtype": "float32", "max_new_tokens": options.new_tokens, "preprocess": "fast"}
    return load(resolve(ModelConfig.model_validate(model | {"questions": str(file)})), "cpu", options.batch_size)


if __name__ == "__main__":
    main()
