"""Chat models from image files to captions, ours beside batched `generate` with the processor in the same process.

    python -m benchmarks.families [--models smolvlm,qwen2_5_vl] [--size cpu|published] [--images 24] [--batch-size 8]
        [--rounds 3] [--new-tokens 20] [--photos DIR] [--dtype float32] [--work DIR]

The models have random weights in the shapes of SmolVLM-256M and Qwen2.5-VL-3B: "published" sizes for a GPU, or with
fewer layers and smaller images until a CPU captions an image/s. Both sides read the same JPEGs (rendered scenes of
several sizes, or photos), use the same weights, batch size and threads, and write exactly --new-tokens tokens. Theirs
decodes a batch, calls the processor and `generate`, one after the other, as the examples of transformers do. Ours is
what `--local` does: decoders in a child process, one chunk ahead. The rounds of the two alternate. Prints a line for
each round and, after each model, a JSON line with all figures so far: the median ratio of images/s, and of CPU time,
which other work on the machine changes less; the share of equal captions, and of captions that no other image has; the
share of our time that was spent waiting for decoded images and for the processor; and the share of padding.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import torch
from PIL import Image

from captioner.config import ModelConfig
from captioner.data import RawImage, Usage
from captioner.imaging import decode_images
from captioner.imaging.sandbox.decoder import GuardedDecoder
from captioner.models import load, resolve
from captioner.models.families import family_of
from captioner.models.pretrained import open_model, quiet
from captioner.models.processors import images_only, open_processor
from captioner.run.prefetch import one_ahead
from captioner.starter.scenes import make_scenes
from captioner.testing.tiny_chat_models import CHAT
from captioner.testing.tiny_parts import PAD, special_ids, starter_tokenizer

SIZES = ((640, 480), (480, 640), (640, 427), (1024, 683), (500, 500))  # of the scenes
BATCHES_PER_CHUNK = 2
SIDES = "generate", "ours"
# By how much the weight matrices are enlarged, so that captions of different images differ.
GAIN = {"cpu": 3.0, "published": 2.0}


@dataclass(frozen=True)
class Shape:
    """The size of a model. `images`: the settings of its image processor."""

    vision: dict[str, Any]
    text: dict[str, Any]
    images: dict[str, Any]
    vocabulary: int = 0


def _text(hidden: int, layers: int, heads: int, groups: int, inner: int) -> dict[str, int]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 8192}


def _vision(hidden: int, layers: int, heads: int, inner: int, side: int) -> dict[str, int]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"intermediate_size": inner, "image_size": side, "patch_size": 16}


def _qwen_vision(hidden: int, layers: int, heads: int, inner: int, out: int, full: list[int]) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "depth": layers, "num_heads": heads, "intermediate_size": inner}
    return sizes | {"out_hidden_size": out, "fullatt_block_indexes": full, "patch_size": 14, "window_size": 112}


def _tiles(edge: int, side: int) -> dict[str, Any]:
    return {"size": {"longest_edge": edge}, "max_image_size": {"longest_edge": side}}


SHAPES = {  # published: config.json of HuggingFaceTB/SmolVLM-256M-Instruct and Qwen/Qwen2.5-VL-3B-Instruct
    ("smolvlm", "cpu"): Shape(_vision(512, 2, 8, 2048, 256), _text(512, 4, 8, 2, 1536), _tiles(1024, 256)),
    ("smolvlm", "published"): Shape(
        _vision(768, 12, 12, 3072, 512), _text(576, 30, 9, 3, 1536), _tiles(2048, 512), 49_280
    ),
    ("qwen2_5_vl", "cpu"): Shape(
        _qwen_vision(512, 2, 8, 1536, 512, [1]), _text(512, 4, 8, 2, 1536), {"size": (3136, 401_408)}
    ),
    ("qwen2_5_vl", "published"): Shape(
        _qwen_vision(1280, 32, 16, 3420, 2048, [7, 15, 23, 31]),
        _text(2048, 36, 16, 2, 11_008),
        {"size": (3136, 1_003_520)},
        151_936,
    ),
}


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = options.size or ("published" if device == "cuda" else "cpu")
    dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    files = _files(options)
    result: dict[str, Any] = {"device": device, "dtype": dtype, "size": size, "threads": torch.get_num_threads()}
    for family in options.models.split(","):
        directory = options.work / f"{family}-{size}"
        if not (directory / "config.json").exists():
            make_model(family, size, directory)
        result |= {f"{family}_{name}": value for name, value in compare(options, directory, dtype, files).items()}
        print(json.dumps(result), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smolvlm,qwen2_5_vl", help="comma-separated")
    parser.add_argument("--size", choices=["cpu", "published"], help="default: published on a GPU")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--photos", type=Path, help="JPEGs instead of scenes")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "captioner-families")
    return parser.parse_args()


def _files(options: argparse.Namespace) -> list[bytes]:
    if options.photos:
        return [path.read_bytes() for path in sorted(options.photos.rglob("*.jpg"))[: options.images]]
    files = []
    for index, scene in enumerate(make_scenes(options.images, seed=7)):
        buffer = io.BytesIO()
        noisy = Image.blend(scene.render(320), Image.effect_noise((320, 320), 60).convert("RGB"), 0.15)
        noisy.resize(SIZES[index % len(SIZES)]).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def make_model(family: str, size: str, directory: Path) -> None:
    """Write a model of a shape of SHAPES with random weights, and its processor."""
    shape = SHAPES[family, size]
    torch.manual_seed(0)
    with quiet():
        model = {"smolvlm": _smolvlm, "qwen2_5_vl": _qwen2_5}[family](shape, directory)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1 and "position_embedding" not in name:
                    weight.mul_(GAIN[size])
            model.get_output_embeddings().weight[model.config.used_vocabulary :] = 0  # these ids have no text
        (model if size == "cpu" else model.to(torch.bfloat16)).save_pretrained(directory)


def _smolvlm(shape: Shape, directory: Path) -> Any:
    from transformers import Idefics3Processor, SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    positions = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *positions]
    tokenizer = starter_tokenizer(*special, ends=False)
    images, tile = SmolVLMImageProcessorPil(**shape.images), shape.vision["image_size"]
    tokens = (tile // 16 // 4) ** 2
    template = CHAT.replace("IMAGE", "<image>")
    Idefics3Processor(images, tokenizer, image_seq_len=tokens, chat_template=template).save_pretrained(directory)
    text = shape.text | special_ids(tokenizer) | {"model_type": "llama"}
    config = SmolVLMConfig(
        vision_config=shape.vision,
        text_config=text | {"vocab_size": max(len(tokenizer), shape.vocabulary)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=4,
        pad_token_id=PAD,
        used_vocabulary=len(tokenizer),
    )
    return SmolVLMForConditionalGeneration(config)


def _qwen2_5(shape: Shape, directory: Path) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = starter_tokenizer(*special, ends=False)
    least, most = shape.images["size"]
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": least, "longest_edge": most})
    template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    images_only(Qwen2_5_VLProcessor)(images, tokenizer, None, chat_template=template).save_pretrained(directory)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    part = shape.text["hidden_size"] // shape.text["num_attention_heads"] // 8
    rope = {"rope_type": "default", "mrope_section": [2 * part, part, part], "rope_theta": 10_000.0}
    text = shape.text | special_ids(tokenizer) | {"rope_parameters": rope}
    config = Qwen2_5_VLConfig(
        **dict(zip(names, tokenizer.convert_tokens_to_ids(special), strict=True)),
        vision_config=shape.vision,
        text_config=text | {"vocab_size": max(len(tokenizer), shape.vocabulary)},
        used_vocabulary=len(tokenizer),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def compare(options: argparse.Namespace, directory: Path, dtype: str, files: list[bytes]) -> dict[str, Any]:
    """Return the figures of one model."""
    theirs, ours = Plain(options, directory, dtype), Ours(options, directory, dtype)
    warm_up = files[: options.batch_size]
    theirs.caption(warm_up), ours.caption(warm_up)
    ours.reset()
    seconds: list[list[float]] = []
    cpu_seconds: list[list[float]] = []
    for number in range(options.rounds):
        spent, used, texts = [], [], []
        for side in (theirs, ours):
            started, before = time.perf_counter(), _cpu_seconds()
            texts.append(side.caption(files))
            spent.append(time.perf_counter() - started)
            used.append(_cpu_seconds() - before)
        seconds.append(spent)
        cpu_seconds.append(used)
        shown = (f"{name} {clock:.2f} s, CPU {cpu:.2f} s" for name, clock, cpu in zip(SIDES, spent, used, strict=True))
        print(f"{directory.name} round {number}: {'; '.join(shown)}", flush=True)
    ratios = [spent[0] / spent[1] for spent in seconds]
    equal = sum(their == our for their, our in zip(*texts, strict=True)) / len(files)
    unique = sum(texts[0].count(text) == 1 for text in texts[0]) / len(files)
    total = sum(spent[1] for spent in seconds)
    return {
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "cpu_ratio": round(statistics.median(used[0] / used[1] for used in cpu_seconds), 2),
        "images_per_second": round(len(files) / min(spent[1] for spent in seconds), 2),
        "generate_images_per_second": round(len(files) / min(spent[0] for spent in seconds), 2),
        "equal": round(equal, 3),
        "unique": round(unique, 3),
        "waiting": round(ours.waited / total, 3),
        "padding": round(ours.usage.padding_tokens / ours.usage.input_tokens, 3),
    }


def _cpu_seconds() -> float:
    """The CPU time of this process and its children, which decode."""
    process = psutil.Process()
    times = [process.cpu_times(), *(child.cpu_times() for child in process.children(recursive=True))]
    return sum(time.user + time.system for time in times)


class Plain:
    """The documented way: processor and `generate`, batch after batch in one thread."""

    def __init__(self, options: argparse.Namespace, directory: Path, dtype: str) -> None:
        self.ref = resolve(_config(options, directory, dtype))
        self.batch_size, self.new_tokens = options.batch_size, options.new_tokens
        self.processor = open_processor(str(directory), family_of(self.ref.family))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = open_model(str(directory), getattr(torch, dtype), device)
        self.model.generation_config.eos_token_id = None
        content = [{"type": "image"}, {"type": "text", "text": self.ref.prompt}]
        chat = [{"role": "user", "content": content}]
        self.question = self.processor.apply_chat_template(chat, add_generation_prompt=True)

    @torch.inference_mode()
    def caption(self, files: list[bytes]) -> list[str]:
        texts: list[str] = []
        for first in range(0, len(files), self.batch_size):
            images = [[Image.open(io.BytesIO(data)).convert("RGB")] for data in files[first : first + self.batch_size]]
            questions = [self.question] * len(images)
            options = {} if self.processor.tokenizer.bos_token not in self.question else {"add_special_tokens": False}
            inputs = self.processor(text=questions, images=images, padding=True, return_tensors="pt", **options)
            inputs = inputs.to(self.model.device, self.model.dtype)
            with quiet():
                ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.new_tokens)
            answers = ids[:, inputs["input_ids"].shape[1] :]
            texts += self.processor.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]


class Ours:
    """What `--local` does with files that are read: decode the next chunk while one is captioned."""

    def __init__(self, options: argparse.Namespace, directory: Path, dtype: str) -> None:
        self.ref = resolve(_config(options, directory, dtype))
        self.chunk = BATCHES_PER_CHUNK * options.batch_size
        self.captioner: Any = load(self.ref, "auto", options.batch_size, options.threads)
        self.captioner.settings.eos_token_id = None
        self._batches: Callable[..., AbstractContextManager[Iterator[Any]]] = self.captioner._batches
        self.captioner._batches = self._timed_batches
        self.decoder = GuardedDecoder(self.ref.spec, 10**8, 60.0)
        self.reset()

    def reset(self) -> None:
        self.waited, self.usage = 0.0, Usage()

    def caption(self, files: list[bytes]) -> list[str]:
        raws = [RawImage(str(index), "", data) for index, data in enumerate(files)]
        chunks = [raws[first : first + self.chunk] for first in range(0, len(raws), self.chunk)]
        decoded = (decode_images(chunk, self.ref.spec, 10**8, self.decoder) for chunk in chunks)
        texts: list[str] = []
        with one_ahead(decoded) as batches:
            for batch in self._timed(batches):
                captions = self.captioner.caption(batch.pixels)
                texts += captions.texts
                self.usage = Usage.total([self.usage, *captions.usage])
        return texts

    @contextmanager
    def _timed_batches(self, pixels: Any) -> Iterator[Iterator[Any]]:
        with self._batches(pixels) as batches:
            yield self._timed(batches)

    def _timed(self, items: Iterator[Any]) -> Iterator[Any]:
        """Yield the items, counting the time until each is there."""
        while True:
            started = time.perf_counter()
            item = next(items, None)
            self.waited += time.perf_counter() - started
            if item is None:
                return
            yield item


def _config(options: argparse.Namespace, directory: Path, dtype: str) -> ModelConfig:
    fields = {"name": str(directory), "dtype": dtype, "max_new_tokens": options.new_tokens, "preprocess": "fast"}
    return ModelConfig.model_validate(fields)


if __name__ == "__main__":
    main()
