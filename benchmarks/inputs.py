"""Write what the GPU benchmark needs: a GIT model with random weights, and rendered scenes as JPEGs of 640 x 480.

    python -m benchmarks.inputs FOLDER [--size base|tiny] [--images 12288] [--few 1024] [--pairs 1152] [--photos DIR]

FOLDER/model    base: the git-base shape (176.6 M parameters); tiny: `captioner.testing.tiny_models`
FOLDER/images   the JPEGs; FOLDER/few: the first of them
FOLDER/pairs    images with captions (metadata.jsonl), for training

The weight matrices of the model are enlarged until captions of different images differ. The scenes carry noise, so
that decoding one costs about what a photo of that size costs; --photos takes the JPEGs of a folder instead, under other
names as often as needed. What FOLDER holds already stays. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioner.starter.scenes import make_scene

WIDTH, HEIGHT = 640, 480
GAIN = 2.0  # of the weight matrices: 10 of 12 scenes have captions of their own, where with 1 all have the same
VOCABULARY, START, END = 30_522, 101, 102  # as of git-base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=["base", "tiny"], default="base")
    parser.add_argument("--images", type=int, default=12_288)
    parser.add_argument("--few", type=int, default=1_024)
    parser.add_argument("--pairs", type=int, default=1_152)
    parser.add_argument("--photos", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    write_images(options.folder / "images", options.images, options.photos)
    link_first(options.folder / "images", options.folder / "few", options.few)
    write_pairs(options.folder / "pairs", options.pairs)
    rendered = time.perf_counter()
    write_model(options.folder / "model", options.size)
    result = {
        "images": options.images,
        "mean_image_kb": round(_mean_bytes(options.folder / "images") / 1e3, 1),
        "images_seconds": round(rendered - started, 1),
        "model_seconds": round(time.perf_counter() - rendered, 1),
    }
    print(json.dumps(result | torch_device()))


def torch_device() -> dict[str, Any]:
    """What torch computes on here."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}


def write_images(folder: Path, count: int, photos: Path | None = None, seed: int = 0) -> None:
    """`count` JPEGs, named by their number, on all CPUs."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(count) if not _path(folder, number).exists()]
    originals = sorted(photos.rglob("*.jpg")) if photos else []
    if photos and not originals:
        raise SystemExit(f"{photos}: holds no .jpg")
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(_write_image, folder, originals, seed), missing, chunksize=16))


def _write_image(folder: Path, originals: list[Path], seed: int, number: int) -> None:
    data = originals[number % len(originals)].read_bytes() if originals else _jpeg(seed, number)
    path = _path(folder, number)
    temporary = path.with_suffix(".part")
    temporary.write_bytes(data)
    temporary.replace(path)  # a run that was cut off leaves no half of an image


def _jpeg(seed: int, number: int) -> bytes:
    scene = np.asarray(make_scene(seed, number).render(WIDTH).resize((WIDTH, HEIGHT)), dtype=np.int16)
    noisy = np.clip(scene + np.roll(_noise(), number, axis=1), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@cache
def _noise() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 10, (HEIGHT, WIDTH, 1)).astype(np.int16)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.jpg"


def link_first(folder: Path, other: Path, count: int) -> None:
    other.mkdir(exist_ok=True)
    for path in sorted(folder.glob("*.jpg"))[:count]:
        if not (other / path.name).exists():
            os.link(path, other / path.name)


def write_pairs(folder: Path, count: int) -> None:
    """Scenes of another seed with their captions, as Hugging Face's ImageFolder."""
    write_images(folder, count, seed=1)
    rows = [{"file_name": _path(folder, n).name, "text": make_scene(1, n).captions[0]} for n in range(count)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _mean_bytes(folder: Path) -> float:
    return float(np.mean([path.stat().st_size for path in folder.glob("*.jpg")]))


def write_model(folder: Path, size: str) -> None:
    if (folder / "model.safetensors").exists():
        return
    if size == "tiny":
        from captioner.testing.tiny_models import make_tiny_model

        make_tiny_model("git", folder)
        return
    import torch
    from transformers import GitConfig, GitForCausalLM, GitProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    model = GitForCausalLM(GitConfig())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "position_embedding" not in name:
                weight.mul_(GAIN)
    model.generation_config.update(bos_token_id=START, eos_token_id=END, pad_token_id=0)
    images = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    GitProcessor(images, _tokenizer(folder)).save_pretrained(folder)
    model.save_pretrained(folder)


def _tokenizer(folder: Path) -> Any:
    """A BERT tokenizer with as many entries as git-base's, special tokens in the same positions, and the words that
    scenes are described with."""
    from transformers import BertTokenizer

    captions = " ".join(make_scene(1, number).captions[0].replace(",", " ,") for number in range(1_000))
    special = ["[PAD]", *(f"[unused{number}]" for number in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    entries = [*special, *sorted(set(captions.split()))]
    entries += [f"word{number}" for number in range(VOCABULARY - len(entries))]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(entries) + "\n")
    return BertTokenizer(vocab=str(vocabulary), do_lower_case=True, model_max_length=512)


if __name__ == "__main__":
    main()
