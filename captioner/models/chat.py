"""Chat models that take a picture in the user's turn: Idefics3, SmolVLM, Qwen2-VL, Qwen2.5-VL.

Picture and prompt go through the model's own processor: it splits or scales the picture, writes the chat template out
and puts as many placeholders into it as the picture has tokens. The rows of a batch so differ in length; they are
padded on the left, where the answer begins for all of them at once.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import Idefics3Processor, ProcessorMixin, Qwen2_5_VLProcessor, Qwen2VLProcessor

from captioner.data import Pixels
from captioner.errors import ModelError
from captioner.models.base import TransformersCaptioner
from captioner.models.native_batches import ProcessedBatch
from captioner.models.pretrained import LOADING_ERRORS
from captioner.models.processors import open_processor
from captioner.models.ref import ModelRef

_PROCESSORS: dict[str, type[ProcessorMixin]] = {
    "idefics3": Idefics3Processor,
    # SmolVLM's own differs for video alone, for which it asks for one more package.
    "smolvlm": Idefics3Processor,
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
}
_TILED = ("idefics3", "smolvlm")


class ChatCaptioner(TransformersCaptioner):
    """The caption is the answer alone; question, picture tokens and template are no part of it."""

    def __init__(self, ref: ModelRef, device: torch.device, batch_size: int) -> None:
        super().__init__(ref, device, batch_size)
        self.question = _written_out(self.processor, ref)
        begins = self.tokenizer.bos_token is not None and self.question.startswith(self.tokenizer.bos_token)
        # A template that writes the start token itself must not get a second one (as transformers has it).
        self._special_tokens = {"add_special_tokens": False} if begins else {}
        # Of a picture's many tiles normalising takes most of the processor's time: it is left to the device.
        images = self.processor.image_processor
        tiled = bool(ref.family in _TILED and images.do_pad and images.do_rescale and images.do_normalize)
        self._unnormalised = {"do_rescale": False, "do_normalize": False} if tiled else {}

    def open_own_processor(self) -> Any:
        return open_processor(self.ref.path, _PROCESSORS[self.ref.family])

    def start_ids(self) -> list[int]:
        return []

    def process(self, pictures: Pixels) -> dict[str, torch.Tensor]:
        """The processor's output for the pictures and the question, but for what `_unnormalised` leaves undone."""
        made = self.processor(
            text=[self.question] * len(pictures),
            images=[[Image.fromarray(picture)] for picture in pictures],
            padding=True,
            return_tensors="pt",
            **self._special_tokens,
            **self._unnormalised,
        )
        return dict(made)

    def prepare(self, values: ProcessedBatch) -> dict[str, torch.Tensor]:
        made = {name: value.to(self.device, non_blocking=True) for name, value in values.result().items()}
        if self._unnormalised:
            made["pixel_values"] = self._normalised(made["pixel_values"], made["pixel_attention_mask"])
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in made.items()}

    def _normalised(self, tiles: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Normalise pixels uint8 [N, tiles, 3, H, W] to float32 as the image processor does.

        They are 0 outside of `mask` [N, tiles, H, W], by which the model knows padding.
        """
        images = self.processor.image_processor
        mean, std = (torch.tensor(of, device=self.device).view(3, 1, 1) for of in (images.image_mean, images.image_std))
        values = (tiles.float() * images.rescale_factor - mean) / std
        return values * mask[:, :, None]

    def search(self, prepared: dict[str, torch.Tensor], /) -> tuple[torch.Tensor, torch.Tensor]:
        return self.search_from(prepared["input_ids"].shape[1], prepared)

    def generate(self, prepared: dict[str, torch.Tensor], /, **options: Any) -> Any:
        return self.model.generate(**prepared, **options)


def _written_out(processor: Any, ref: ModelRef) -> str:
    """The prompt as a user's turn after the picture, in the model's chat template."""
    content = [{"type": "image"}, {"type": "text", "text": ref.prompt}]
    try:
        question = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{ref.path}: its chat template cannot be used: {reason}") from None
    places = question.count(processor.image_token)
    if places != 1:
        raise ModelError(
            f"{ref.path}: --prompt and its chat template leave {places} places ({processor.image_token}) for one"
            " picture; take them out of the prompt, or give a model whose template knows pictures"
        )
    return str(question)
