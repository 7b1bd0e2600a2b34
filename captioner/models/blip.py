"""BLIP (Salesforce/blip-image-captioning-*): a vision encoder and a text decoder that attends to it."""

from __future__ import annotations

from typing import Any

import torch

from captioner.models.base import TransformersCaptioner


class BlipCaptioner(TransformersCaptioner):
    @property
    def text_config(self) -> Any:
        return self.model.config.text_config

    def start_ids(self) -> list[int]:
        return [self.text_config.bos_token_id, *self.prompt_ids()]

    def text_model(self) -> Any:
        return self.model.text_decoder

    def special_token_settings(self) -> dict[str, Any]:
        """Return the separator as end token: BLIP captions end with it."""
        return {"eos_token_id": self.text_config.sep_token_id, "pad_token_id": self.text_config.pad_token_id}

    def generate(self, pixel_values: torch.Tensor, /, **options: Any) -> Any:
        rows = self.start_rows(len(pixel_values))
        separator = torch.full_like(rows[:, :1], self.text_config.sep_token_id)
        # BLIP's `generate` removes the last input token, which it takes for the end token of a tokenized text.
        return self.model.generate(pixel_values=pixel_values, input_ids=torch.cat([rows, separator], dim=1), **options)
