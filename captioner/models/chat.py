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
from captioner.models.opening import UNREADABLE
from captioner.models.processors import open_processor
from captioner.models.ref import ModelRef

_PROCESSORS: dict[str, type[ProcessorMixin]] = {
    "idefics3": Idefics3Processor,
    # SmolVLM's own differs for video alone, for which it asks for one more package.
    "smolvlm": Idefics3Processor,
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
}


class ChatCaptioner(TransformersCaptioner):
    """The caption is the answer alone; question, picture tokens and template are no part of it."""

    def __init__(self, ref: ModelRef, device: torch.device, batch_size: int) -> None:
        super().__init__(ref, device, batch_size)
        self.question = _written_out(self.processor, ref)
        begins = self.tokenizer.bos_token is not None and self.question.startswith(self.tokenizer.bos_token)
        # A template that writes the start token itself must not get a second one (as transformers has it).
        self._special_tokens = {"add_special_tokens": False} if begins else {}

    def open_own_processor(self) -> Any:
        return open_processor(self.ref.path, _PROCESSORS[self.ref.family])

    def start_ids(self) -> list[int]:
        return []

    def prepare(self, values: Pixels) -> dict[str, torch.Tensor]:
        """The processor's output for the pictures and the question, on the device."""
        made = self.processor(
            text=[self.question] * len(values),
            images=[[Image.fromarray(picture)] for picture in values],
            padding=True,
            return_tensors="pt",
            **self._special_tokens,
        )
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in made.items()
        }

    def search(self, prepared: dict[str, torch.Tensor], /) -> tuple[torch.Tensor, torch.Tensor]:
        return self.search_from(prepared["input_ids"].shape[1], prepared)

    def generate(self, prepared: dict[str, torch.Tensor], /, **options: Any) -> Any:
        return self.model.generate(**prepared, **options)


def _written_out(processor: Any, ref: ModelRef) -> str:
    """The prompt as a user's turn after the picture, in the model's chat template."""
    content = [{"type": "image"}, {"type": "text", "text": ref.prompt}]
    try:
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{ref.path}: its chat template cannot be used: {reason}") from None
