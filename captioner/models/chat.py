"""Chat models that take an image in the user's turn: Idefics3, SmolVLM, Qwen2-VL, Qwen2.5-VL.

The model's own processor prepares image and prompt: it splits or scales the image, applies the chat template and
inserts as many placeholders as the image has tokens. So the rows of a batch differ in length; they are padded on the
left, so that all answers begin at the same position.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import Idefics3Processor, ProcessorMixin, Qwen2_5_VLProcessor, Qwen2VLProcessor

from captioner.data import Pixels
from captioner.errors import ModelError
from captioner.models.base import TransformersCaptioner
from captioner.models.pretrained import LOADING_ERRORS
from captioner.models.processors import ProcessedBatch, open_processor
from captioner.models.ref import ModelRef

_PROCESSORS: dict[str, type[ProcessorMixin]] = {
    "idefics3": Idefics3Processor,
    # SmolVLM's own processor differs only for video, for which it needs one more package.
    "smolvlm": Idefics3Processor,
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
}
_TILED = ("idefics3", "smolvlm")


class ChatCaptioner(TransformersCaptioner):
    """The caption is the answer without question, image tokens and template."""

    def __init__(self, ref: ModelRef, device: torch.device, batch_size: int) -> None:
        super().__init__(ref, device, batch_size)
        self.question = _apply_template(self.processor, ref)
        bos_token = self.tokenizer.bos_token
        has_start_token = bos_token is not None and self.question.startswith(bos_token)
        # A template that contains the start token must not get a second one (as in transformers).
        self._special_tokens = {"add_special_tokens": False} if has_start_token else {}
        # Normalising the many tiles of an image takes most of the processor's time, so the device does it.
        image_processor = self.processor.image_processor
        steps = (image_processor.do_pad, image_processor.do_rescale, image_processor.do_normalize)
        on_device = ref.family in _TILED and all(steps)
        self._unnormalised = {"do_rescale": False, "do_normalize": False} if on_device else {}

    def open_native_processor(self) -> Any:
        return open_processor(self.ref.path, _PROCESSORS[self.ref.family])

    def start_ids(self) -> list[int]:
        return []

    def process(self, images: Pixels) -> dict[str, torch.Tensor]:
        """Return the processor's output for the images and the question, without the steps in `_unnormalised`."""
        inputs = self.processor(
            text=[self.question] * len(images),
            images=[[Image.fromarray(image)] for image in images],
            padding=True,
            return_tensors="pt",
            **self._special_tokens,
            **self._unnormalised,
        )
        return dict(inputs)

    def prepare(self, values: ProcessedBatch) -> dict[str, torch.Tensor]:
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in values.inputs().items()}
        if self._unnormalised:
            inputs["pixel_values"] = self._normalise_tiles(inputs["pixel_values"], inputs["pixel_attention_mask"])
        return {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()
        }

    def _normalise_tiles(self, tiles: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return uint8 tiles [N, tiles, 3, H, W] normalised as by the image processor, float32.

        Padding, where `mask` [N, tiles, H, W] is 0, becomes 0.
        """
        settings = self.processor.image_processor
        mean = torch.tensor(settings.image_mean, device=self.device).view(3, 1, 1)
        std = torch.tensor(settings.image_std, device=self.device).view(3, 1, 1)
        normalised: torch.Tensor = (tiles.float() * settings.rescale_factor - mean) / std
        return normalised * mask[:, :, None]

    def search(self, prepared: dict[str, torch.Tensor], /) -> tuple[torch.Tensor, torch.Tensor]:
        return self.search_after(prepared["input_ids"].shape[1], prepared)

    def generate(self, prepared: dict[str, torch.Tensor], /, **options: Any) -> Any:
        return self.model.generate(**prepared, **options)


def _apply_template(processor: Any, ref: ModelRef) -> str:
    """Return the prompt after an image in a user's turn of the model's chat template."""
    content = [{"type": "image"}, {"type": "text", "text": ref.prompt}]
    try:
        question = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{ref.path}: its chat template cannot be used: {reason}") from None
    num_placeholders = question.count(processor.image_token)
    if num_placeholders != 1:
        raise ModelError(
            f"{ref.path}: --prompt and its chat template contain {num_placeholders} image placeholders"
            f" ({processor.image_token}), not 1; remove them from the prompt, or use a model whose template has one"
        )
    return str(question)
