"""Florence-2 (florence-community/Florence-2-*): an encoder reads image and task, a decoder writes the answer."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from captioner.errors import ModelError
from captioner.models.base import TransformersCaptioner
from captioner.models.families import family_of
from captioner.models.processors import open_processor
from captioner.models.prompt_text import PromptError, check_no_placeholder
from captioner.models.ref import ModelRef


class Florence2Captioner(TransformersCaptioner):
    """The prompt is a task token (<CAPTION>, ...), which the processor replaces by its question, or a question."""

    def __init__(self, ref: ModelRef, device: torch.device, batch_size: int) -> None:
        processor = open_processor(ref.path, family_of(ref.family))
        try:
            check_no_placeholder(ref.prompt or "", processor.image_token)
        except PromptError as error:
            raise ModelError(f"{ref.path}: {error}") from None
        self.question_ids: list[int] = processor(images=Image.new("RGB", (32, 32)), text=ref.prompt).input_ids[0]
        super().__init__(ref, device, batch_size)

    def start_ids(self) -> list[int]:
        start = self.model.config.text_config.decoder_start_token_id
        if start is None:
            raise ModelError(f"{self.ref.path}: config.json has no decoder_start_token_id in text_config; set it there")
        return [start]

    def special_token_settings(self) -> dict[str, Any]:
        return {"decoder_start_token_id": self.prefix[0]}

    def generate(self, pixel_values: torch.Tensor, /, **options: Any) -> Any:
        rows = torch.tensor([self.question_ids], device=self.device).repeat(len(pixel_values), 1)
        return self.model.generate(pixel_values=pixel_values, input_ids=rows, **options)
