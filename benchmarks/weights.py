"""One model with weights of several kinds: time, memory, and how many captions stay equal.

    python -m benchmarks.weights --model DIR | --shape blip|florence2  [--kinds float32,bfloat16,int8,int4,dynamic]
        [--images 8] [--batch-size 4] [--rounds 2] [--new-tokens 20] [--threads N] [--gpus N] [--work DIR]

The first kind is what the others are compared with. float32 and bfloat16 are values of --dtype; int8 and int4 of
--quantize, in the dtype of the first kind; dynamic is torch's own quantisation of weights and activations to 8 bits,
for CPUs, which captioner does not offer. --shape makes a model with random weights in the shape of BLIP-base or
Florence-2-base. Kinds alternate from round to round; on a CPU the seconds are CPU time, which other work on the machine
changes less. `--gpus 2` spreads the weights over GPUs: its captions are compared with those of one GPU, where they fit.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from PIL import Image
from torch import nn

from captioner.config import ModelConfig
from captioner.data import RawImage
from captioner.imaging import decode_images
from captioner.models import load, resolve
from captioner.models.loading import import_family
from captioner.models.pretrained import quiet
from captioner.starter.scenes import make_scenes
from captioner.testing.tiny_parts import END, PAD, START, special_ids, starter_tokenizer

QUANTIZED = ("int8", "int4")
GAIN = 3.0  # of the weight matrices, so that captions of different images differ


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    directory = options.model or _make_model(options.shape, options.work / options.shape)
    kinds = options.kinds.split(",")
    captioners = {kind: _load(options, directory, kind, kinds[0]) for kind in kinds}
    if options.gpus > 1:
        name = f"{options.gpus} GPUs"
        captioners[name] = _load(options, directory, kinds[0], kinds[0], options.gpus)
    pixels = _pixels(options, directory)
    seconds: dict[str, list[float]] = {name: [] for name in captioners}
    texts: dict[str, list[str]] = {}
    for number in range(options.rounds + 1):
        for name, captioner in captioners.items():
            started = _clock()
            texts[name] = captioner.caption(pixels).texts
            seconds[name].append(_clock() - started)
        print(f"round {number}:", {name: round(times[-1], 2) for name, times in seconds.items()}, flush=True)
    first = texts[kinds[0]]
    result: dict[str, Any] = {"device": captioners[kinds[0]].device_name, "images": len(first)}
    result |= {"unique": round(sum(first.count(text) == 1 for text in first) / len(first), 3)}
    best = {name: min(times[1:]) for name, times in seconds.items()}
    for name, captioner in captioners.items():
        result[f"{name}_speed"] = round(best[kinds[0]] / best[name], 2)
        result[f"{name}_equal"] = round(sum(map(str.__eq__, first, texts[name])) / len(first), 3)
        if name != "dynamic":  # whose packed weights are no tensors
            result[f"{name}_mb"] = round(captioner.weights_bytes / 1e6)
    print(json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path)
    model.add_argument("--shape", choices=list(_SHAPES))
    parser.add_argument("--kinds", default="float32,bfloat16,int8,int4")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "captioner-weights")
    return parser.parse_args()


def _load(options: argparse.Namespace, directory: Path, kind: str, first: str, num_gpus: int = 1) -> Any:
    dtype = first if kind in (*QUANTIZED, "dynamic") else kind
    quantize = kind if kind in QUANTIZED else None
    config = ModelConfig(
        name=str(directory), dtype=dtype, quantize=quantize, max_new_tokens=options.new_tokens, preprocess="fast"
    )
    ref = resolve(config)
    captioner: Any
    if kind == "dynamic":  # of layers that are not packed
        captioner = import_family(ref.family)(ref, torch.device("cpu"), options.batch_size)
        torch.ao.quantization.quantize_dynamic(captioner.model, {nn.Linear}, torch.qint8, inplace=True)
    else:
        captioner = load(ref, "auto", options.batch_size, options.threads, num_gpus=num_gpus)
    captioner.settings.eos_token_id = None  # every caption has as many tokens
    return captioner


def _pixels(options: argparse.Namespace, directory: Path) -> Any:
    files = []
    for index, scene in enumerate(make_scenes(options.images, seed=7)):
        buffer = io.BytesIO()
        noisy = Image.blend(scene.render(480), Image.effect_noise((480, 480), 60).convert("RGB"), 0.15)
        noisy.save(buffer, "JPEG", quality=90)
        files.append(RawImage(str(index), "", buffer.getvalue()))
    return decode_images(files, resolve(ModelConfig(name=str(directory))).spec, max_pixels=10**8).pixels


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _make_model(shape: str, directory: Path) -> Path:
    if not (directory / "config.json").exists():
        torch.manual_seed(0)
        with quiet():
            model = _SHAPES[shape](directory)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if weight.dim() > 1 and "position_embedding" not in name:
                        weight.mul_(GAIN)
            model.save_pretrained(directory)
    return directory


def _blip(directory: Path) -> Any:
    """BlipConfig's own sizes are those of Salesforce/blip-image-captioning-base."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    tokenizer = starter_tokenizer()
    BlipProcessor(BlipImageProcessorPil(size={"height": 384, "width": 384}), tokenizer).save_pretrained(directory)
    text = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "sep_token_id": END}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config={"initializer_range": 0.02}))


def _florence2(directory: Path) -> Any:
    """The sizes of microsoft/Florence-2-base: the vision encoder's are Florence2Config's own."""
    from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = starter_tokenizer("<image>", extra_special_tokens={"image_token": "<image>"})
    side = {"height": 768, "width": 768}
    images = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False, image_seq_length=577)
    Florence2Processor(images, tokenizer).save_pretrained(directory)
    halves = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in _BART.items()}
    text = BartConfig(
        d_model=768,
        max_position_embeddings=1024,
        decoder_start_token_id=END,
        forced_bos_token_id=START,
        **halves,
        **special_ids(tokenizer) | {"vocab_size": 51_289},
    )
    return Florence2ForConditionalGeneration(
        Florence2Config(
            vision_config={"projection_dim": 768},
            text_config=text.to_dict(),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )


_BART = {"layers": 6, "attention_heads": 12, "ffn_dim": 3072}
_SHAPES = {"blip": _blip, "florence2": _florence2}


if __name__ == "__main__":
    main()
