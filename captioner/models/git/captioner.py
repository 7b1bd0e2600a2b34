"""The captioner of GIT models."""

from __future__ import annotations

from typing import Any

import torch

from captioner.models.base import TransformersCaptioner
from captioner.models.git.search import FastSearch, open_network, unsupported_settings
from captioner.models.ref import ModelRef


class GitCaptioner(TransformersCaptioner):
    """Captions by the search of this package, or by `generate` where the checkpoint's settings need it (`engine`)."""

    attention = "eager"  # transformers has no other for GIT

    def __init__(self, ref: ModelRef, device: torch.device, batch_size: int) -> None:
        super().__init__(ref, device, batch_size)
        self._fast: FastSearch | None = None
        if not unsupported_settings(self.settings):
            self._fast = FastSearch(open_network(self.model), self.settings, self.prefix, self.sampling)
            self.engine = "fast"

    def start_ids(self) -> list[int]:
        """Return start token and prompt, without an end token, as in transformers' GIT examples."""
        return [self.model.generation_config.bos_token_id, *self.prompt_ids()]

    def search(
        self, pixel_values: torch.Tensor, numbers: torch.Tensor | None = None, /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._fast is None:
            return super().search(pixel_values, numbers)
        result = self._fast(pixel_values, numbers)
        return result.tokens.flatten(0, -2).cpu(), result.logprobs.flatten(0, -2).cpu()

    def free_memory(self) -> None:
        if self._fast is not None:
            self._fast.stepper.clear()
        super().free_memory()

    def generate(self, pixel_values: torch.Tensor, /, **options: Any) -> Any:
        return self.model.generate(pixel_values=pixel_values, input_ids=self.start_rows(len(pixel_values)), **options)
