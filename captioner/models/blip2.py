"""BLIP-2 (Salesforce/blip2-*): a language model (OPT or T5) reads queries of a vision encoder before the text."""

from __future__ import annotations

from typing import Any

import torch

from captioner.errors import ModelError
from captioner.models.base import TransformersCaptioner


class Blip2Captioner(TransformersCaptioner):
    """With OPT `generate` returns the input ids before the caption, with T5 only a start token."""

    def start_ids(self) -> list[int]:
        if not self.text_model().config.is_encoder_decoder:
            return self.input_ids()
        start: int | None = self.text_model().generation_config.decoder_start_token_id
        if start is None:
            raise ModelError(f"{self.ref.path}: has no decoder_start_token_id; set it to the start token's id")
        return [start]

    def input_ids(self) -> list[int]:
        """Return placeholders for the image queries and the tokenized prompt, as `Blip2Processor` does.

        Without a prompt the text is "", which the tokenizer of OPT turns into its start token.
        """
        config = self.model.config
        if config.image_token_index is None:
            raise ModelError(
                f"{self.ref.path}: config.json has no image_token_index; save the model with transformers 5"
            )
        prompt: list[int] = self.tokenizer(self.ref.prompt or "").input_ids
        if config.image_token_index in prompt:
            placeholder = self.tokenizer.decode([config.image_token_index])
            raise ModelError(f"{self.ref.path}: --prompt contains the image placeholder {placeholder}; remove it")
        return [config.image_token_index] * config.num_query_tokens + prompt

    def text_model(self) -> Any:
        return self.model.language_model

    def generate(self, pixel_values: torch.Tensor, /, **options: Any) -> Any:
        rows = torch.tensor([self.input_ids()], device=self.device).repeat(len(pixel_values), 1)
        return self.model.generate(pixel_values=pixel_values, input_ids=rows, **options)
