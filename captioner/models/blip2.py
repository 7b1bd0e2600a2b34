"""BLIP-2 (Salesforce/blip2-*): a vision encoder whose queries a language model, OPT or T5, reads before the text."""

from __future__ import annotations

from typing import Any

import torch

from captioner.errors import ModelError
from captioner.models.base import TransformersCaptioner


class Blip2Captioner(TransformersCaptioner):
    def start_ids(self) -> list[int]:
        """What the text decoder begins with: of OPT all it reads, of T5 only its start token."""
        if not self.generator().config.is_encoder_decoder:
            return self.read_ids()
        start: int | None = self.generator().generation_config.decoder_start_token_id
        if start is None:
            raise ModelError(f"{self.ref.path}: has no decoder_start_token_id; set it to the start token's id")
        return [start]

    def read_ids(self) -> list[int]:
        """Return image tokens for the image's queries, then the prompt, as `Blip2Processor` tokenizes it.

        The prompt is "" where there is none, which leaves OPT's start token.
        """
        config = self.model.config
        if config.image_token_index is None:
            raise ModelError(
                f"{self.ref.path}: config.json has no image_token_index; save the model with transformers 5"
            )
        return [config.image_token_index] * config.num_query_tokens + self.tokenizer(self.ref.prompt or "").input_ids

    def generator(self) -> Any:
        return self.model.language_model

    def generate(self, pixel_values: torch.Tensor, /, **options: Any) -> Any:
        rows = torch.tensor([self.read_ids()], device=self.device).repeat(len(pixel_values), 1)
        return self.model.generate(pixel_values=pixel_values, input_ids=rows, **options)
