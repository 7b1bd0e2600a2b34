"""Models that embed images and texts into one space, CLIP and SigLIP: they judge captions without references.

`resolve_judge` reads a directory's files without torch, as `captioner.models.resolving` does for captioners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from captioner.console.phases import phase
from captioner.data import Pixels
from captioner.errors import ModelError
from captioner.files import shown
from captioner.models import adapters, weights
from captioner.models.devices import auto_dtype, device_name, gpu_failures, pick_device
from captioner.models.pixel_spec import read_pixel_spec
from captioner.models.ref import ModelRef
from captioner.models.resolving import ensure_local, locate

if TYPE_CHECKING:
    import torch

# The supported model types, and whether a text is padded to the full length, as the model was trained.
PADDED_TO_END = {"clip": False, "siglip": True}
_TEXTS_AT_ONCE = 256

Embeddings = npt.NDArray[np.float32]  # [N, D], each of length 1


def resolve_judge(name: str, revision: str | None, notify: Callable[[str], None] = print) -> ModelRef:
    """Find a CLIP or SigLIP model, download it if needed, and return what its files say without loading it.

    Raises ModelError where there is no such model or it cannot be used.
    """
    with phase(f"reading the files of model {shown(name)}", notify):
        directory, commit = locate(name, revision, notify)
        config = weights.read_json(directory / "config.json")
        family = str(config.get("model_type"))
        if family not in PADDED_TO_END:
            kinds = " or ".join(PADDED_TO_END)
            raise ModelError(
                f"{directory}: model_type {family!r} does not judge captions; give a model of type {kinds}"
            )
        for file in weights.weight_files(directory):
            weights.check_header(file)
        spec = read_pixel_spec(directory, "git", family)
        side = (config.get("vision_config") or {}).get("image_size", spec.height)
        if spec.variable_size or (spec.height, spec.width) != (side, side):
            raise ModelError(
                f"{directory}: its image processor does not make {side}x{side} pixels, which its model wants"
            )
        sha256, settings_sha256 = adapters.hashes(directory, None)
        return ModelRef(name, str(directory), family, sha256, settings_sha256, spec, revision=commit)


def open_encoder(ref: ModelRef, device: str = "auto", batch_size: int = 64, num_threads: int | None = None) -> Encoder:
    """Load the model of `resolve_judge`. Raises ModelError where it or the device cannot be used."""
    torch_device = pick_device(device)
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return Encoder(replace(ensure_local(ref), dtype=auto_dtype(torch_device.type)), torch_device, batch_size)


class Encoder:
    """Embeds images and texts; loads its model when it is made."""

    def __init__(self, ref: ModelRef, device: torch.device, batch_size: int) -> None:
        import torch
        from transformers import AutoModel

        from captioner.models.pretrained import LOADING_ERRORS, check_loading_info, open_tokenizer, quiet

        self._family, self._device, self._batch_size = ref.family, device, batch_size
        self._device_name = device_name([device])
        self._dtype: torch.dtype = getattr(torch, ref.dtype)
        options = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
        try:
            with quiet():
                model, info = AutoModel.from_pretrained(
                    ref.path, dtype=self._dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
                )
        except LOADING_ERRORS as error:
            raise ModelError(f"{ref.path}: the model cannot be loaded: {' '.join(str(error).split())}") from None
        check_loading_info(ref.path, info)
        self._tokenizer = open_tokenizer(ref.path)
        with gpu_failures([device], self._device_name):
            self._model = model.to(device).eval()
            self._mean = torch.tensor(ref.spec.mean, device=device).view(1, 3, 1, 1)
            self._std = torch.tensor(ref.spec.std, device=device).view(1, 3, 1, 1)
        self._max_tokens: int = self._model.config.text_config.max_position_embeddings

    def embed_images(self, pixels: Pixels) -> Embeddings:
        """Return the embeddings of images, uint8 [N, H, W, 3] of the model's size."""
        import torch

        def embed(first: int) -> torch.Tensor:
            batch = torch.from_numpy(pixels[first : first + self._batch_size]).to(self._device)
            values = ((batch.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std).to(self._dtype)
            features: torch.Tensor = self._model.get_image_features(pixel_values=values).pooler_output
            return features

        return self._embed_all(embed, range(0, len(pixels), self._batch_size))

    def embed_texts(self, texts: Sequence[str]) -> Embeddings:
        """Return the embeddings of texts, each cut at the length that the model takes."""
        return self._embed_all(
            lambda first: self._embed_some(texts[first : first + _TEXTS_AT_ONCE]),
            range(0, len(texts), _TEXTS_AT_ONCE),
        )

    def _embed_some(self, texts: Sequence[str]) -> torch.Tensor:
        padding: Any = "max_length" if PADDED_TO_END[self._family] else True
        tokens = self._tokenizer(
            list(texts), padding=padding, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._device)
        names = ("input_ids",) if PADDED_TO_END[self._family] else ("input_ids", "attention_mask")
        features: torch.Tensor = self._model.get_text_features(**{name: tokens[name] for name in names}).pooler_output
        return features

    def _embed_all(self, embed: Callable[[int], torch.Tensor], starts: range) -> Embeddings:
        """Return the results of `embed` at all starts as unit vectors. Raises ModelError where the GPU has failed."""
        import torch

        with torch.inference_mode(), gpu_failures([self._device], self._device_name):
            parts = [torch.nn.functional.normalize(embed(first).float(), dim=-1).cpu().numpy() for first in starts]
        return np.concatenate(parts) if parts else np.empty((0, 1), np.float32)
