"""VisionEncoderDecoder (such as nlpconnect/vit-gpt2-image-captioning): any vision encoder with any text decoder."""

from __future__ import annotations

from typing import Any

import torch

from captioner.errors import ModelError
from captioner.models.base import TransformersCaptioner


class VisionEncoderDecoderCaptioner(TransformersCaptioner):
    """Takes no prompt, because its decoders are trained to begin at their start token."""

    def start_ids(self) -> list[int]:
        settings, config = self.model.generation_config, self.model.config
        for start in (settings.decoder_start_token_id, config.decoder_start_token_id, settings.bos_token_id):
            if start is not None:
                return [start]
        raise ModelError(f"{self.ref.path}: config.json has no decoder_start_token_id; set it to the start token's id")

    def special_token_settings(self) -> dict[str, Any]:
        return {"decoder_start_token_id": self.prefix[0]}

    def generate(self, pixel_values: torch.Tensor, /, **options: Any) -> Any:
        rows = self.start_rows(len(pixel_values))
        return self.model.generate(pixel_values=pixel_values, decoder_input_ids=rows, **options)
