"""GIT (microsoft/git-*, and the starter): a decoder that reads image tokens and text in one sequence."""

from __future__ import annotations

from typing import Any

import torch

from captioner.models.base import TransformersCaptioner


class GitCaptioner(TransformersCaptioner):
    attention = "eager"  # the only one transformers has for GIT

    def start_ids(self) -> list[int]:
        """Start token and prompt, without an end token, as in transformers' GIT examples."""
        return [self.model.generation_config.bos_token_id, *self.prompt_ids()]

    def generate(self, pixel_values: torch.Tensor, **options: Any) -> Any:
        return self.model.generate(pixel_values=pixel_values, input_ids=self.start_rows(len(pixel_values)), **options)
