"""Public test doubles: small archives with known captions, tiny models of each family, a captioner that costs nothing.

For the tests of this package and of whatever is built on it. torch and transformers are imported when a model is made.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import captioner.starter
from captioner.faults import GatedDirectory, Killed, killed_at_write, sigkill_at_write
from captioner.imaging.poison import ABORT_MARKER, GATE_MARKER, HANG_MARKER
from captioner.models.fake import FakeCaptioner
from captioner.models.ref import ModelRef
from captioner.scenes import Scene, make_scenes

__all__ = [
    "ABORT_MARKER",
    "GATE_MARKER",
    "HANG_MARKER",
    "FakeCaptioner",
    "GatedDirectory",
    "Killed",
    "SmallGpu",
    "killed_at_write",
    "make_folder",
    "make_parquet",
    "make_tar",
    "make_tiny_model",
    "sigkill_at_write",
]

TINY_SIDE = 32  # pixels, of the tiny models' pictures
_PAD, _START, _END = 0, 1, 2  # of the starter's tokenizer, which the tiny models share


class SmallGpu:
    """Stands in for a captioner on a GPU with memory for `room` pictures; see `captioner.models.batch_size`.

    A batch takes `start` + pictures x `each` seconds of its own `clock`. `tried`: the sizes it was asked for.
    """

    device_name = "small GPU, 1 GiB"

    def __init__(self, ref: ModelRef, room: int, start: float = 1.0, each: float = 0.0) -> None:
        self.ref, self.batch_size, self.tried = ref, 1, list[int]()
        self._room, self._start, self._each, self._now = room, start, each, 0.0

    def clock(self) -> float:
        return self._now

    def try_batch(self, size: int) -> None:
        """Raises torch.OutOfMemoryError above `room`."""
        import torch

        self.tried.append(size)
        if size > self._room:
            raise torch.OutOfMemoryError(f"no memory for {size} pictures")
        self._now += self._start + self._each * size

    def free_memory(self) -> None:
        """Nothing is held."""


def make_folder(path: Path, count: int, seed: int = 0, width: int = 64) -> Path:
    """A Hugging Face ImageFolder: 000000.png ... and metadata.jsonl with `file_name` and `captions`."""
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, scene in enumerate(make_scenes(count, seed)):
        name = f"{index:06d}.png"
        (path / name).write_bytes(_png(scene, width))
        lines.append(json.dumps({"file_name": name, "captions": scene.captions}))
    (path / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def make_tar(path: Path, count: int, seed: int = 0, width: int = 64) -> Path:
    """A WebDataset tar: 000000.png, 000000.txt (the first caption) ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, scene in enumerate(make_scenes(count, seed)):
            members = {f"{index:06d}.png": _png(scene, width), f"{index:06d}.txt": scene.captions[0].encode()}
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def make_parquet(path: Path, count: int, seed: int = 0, width: int = 64) -> Path:
    """A table as `datasets` writes it: `id`, `image` struct{bytes, path}, `captions` list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scenes = list(make_scenes(count, seed))
    names = [f"{index:06d}.png" for index in range(count)]
    images = [{"bytes": _png(scene, width), "path": name} for scene, name in zip(scenes, names, strict=True)]
    captions = [scene.captions for scene in scenes]
    table = pa.table({"id": [f"scene-{index}" for index in range(count)], "image": images, "captions": captions})
    pq.write_table(table, path, row_group_size=100)
    return path


def make_tiny_model(family: str, path: Path, seed: int = 0) -> Path:
    """A model directory of `family` ("git", "blip" or "vision-encoder-decoder") with random weights.

    Pictures of 32x32, vocabulary and tokenizer of the starter. A random model says the same of every picture; here
    the weight matrices are enlarged until the captions of different pictures differ.
    """
    import torch

    from captioner.models.opening import quiet

    makers: dict[str, Callable[[Path], Any]] = {
        "git": _make_git,
        "blip": _make_blip,
        "vision-encoder-decoder": _make_vision_encoder_decoder,
    }
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = makers[family](path)
        _enlarge(model, **_GAINS[family])
        model.save_pretrained(path)
    return path


# By how much the weight matrices are enlarged (transformers draws them with a standard deviation of 0.02); those of
# BLIP's text layers less, or they drown the picture; the end token's row more, so that some captions end early.
_GAINS: dict[str, dict[str, float]] = {
    "git": {"gain": 20.0, "end_gain": 2.0},
    "blip": {"gain": 25.0, "end_gain": 2.0, "text_gain": 10.0},
    "vision-encoder-decoder": {"gain": 25.0, "end_gain": 1.6},
}


def _enlarge(model: Any, gain: float, end_gain: float, text_gain: float | None = None) -> None:
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "position_embedding" not in name:
                weight.mul_(text_gain if text_gain and name.startswith("text_decoder.bert.encoder") else gain)
        writer = getattr(model, "text_decoder", None) or getattr(model, "decoder", None) or model
        writer.get_output_embeddings().weight[_END] *= end_gain


_LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _make_git(path: Path) -> Any:
    from transformers import GitConfig, GitForCausalLM, GitProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = _tokenizer()
    side = {"height": TINY_SIDE, "width": TINY_SIDE}
    GitProcessor(CLIPImageProcessorPil(size={"shortest_edge": TINY_SIDE}, crop_size=side), tokenizer).save_pretrained(
        path
    )
    return GitForCausalLM(
        GitConfig(
            vision_config=_LAYERS | {"image_size": TINY_SIDE, "patch_size": 8},
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            pad_token_id=_PAD,
            bos_token_id=_START,
            eos_token_id=_END,
            **_LAYERS,
            **_NO_DROPOUT,
        )
    )


def _make_blip(path: Path) -> Any:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    tokenizer = _tokenizer()
    side = {"height": TINY_SIDE, "width": TINY_SIDE}
    BlipProcessor(BlipImageProcessorPil(size=side), tokenizer).save_pretrained(path)
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64,
        "encoder_hidden_size": _LAYERS["hidden_size"],
        "pad_token_id": _PAD,
        "bos_token_id": _START,
        "eos_token_id": _END,
        "sep_token_id": _END,
    }
    return BlipForConditionalGeneration(
        BlipConfig(
            text_config=_LAYERS | _NO_DROPOUT | text,
            vision_config=_LAYERS | {"image_size": TINY_SIDE, "patch_size": 8, "initializer_range": 0.02},
        )
    )


def _make_vision_encoder_decoder(path: Path) -> Any:
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    tokenizer = _tokenizer()
    tokenizer.save_pretrained(path)
    ViTImageProcessorPil(size={"height": TINY_SIDE, "width": TINY_SIDE}).save_pretrained(path)
    encoder = ViTConfig(image_size=TINY_SIDE, patch_size=8, **_LAYERS, **_NO_DROPOUT)
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        add_cross_attention=True,
        pad_token_id=_PAD,
        bos_token_id=_START,
        eos_token_id=_END,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = _START, _PAD, _END
    return VisionEncoderDecoderModel(config=config)


def _tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    file = Path(captioner.starter.__file__).parent / "model" / "tokenizer.json"
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def _png(scene: Scene, width: int) -> bytes:
    buffer = io.BytesIO()
    scene.render(width).save(buffer, format="PNG")
    return buffer.getvalue()
