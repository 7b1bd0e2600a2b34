"""Pixels on their way to the device, each batch's copy under way while the device works on the batch before."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from captioner.data import Pixels


class Uploads:
    """Copies pixels to `device`: to a CUDA GPU from page-locked memory on a stream of its own, else when they are asked
    for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches(self, pixels: Pixels, size: int) -> Iterator[torch.Tensor]:
        """Pixels [N, H, W, 3] as tensors on the device, `size` pictures in each."""
        ahead = self._start(pixels[:size])
        for following in range(size, len(pixels) + size, size):
            # Waited for before the next copy starts: a stream is waited for with all it has to do by then.
            values = self._arrived(ahead)
            if following < len(pixels):
                ahead = self._start(pixels[following : following + size])
            yield values

    def _start(self, pixels: Pixels) -> torch.Tensor:
        values = torch.from_numpy(np.array(pixels))  # a copy, because Arrow's memory is read-only and torch warns of it
        if self._stream is None:
            return values.to(self.device)
        with torch.cuda.stream(self._stream):
            return values.pin_memory().to(self.device, non_blocking=True)

    def _arrived(self, values: torch.Tensor) -> torch.Tensor:
        if self._stream is not None:
            using = torch.cuda.current_stream(self.device)
            using.wait_stream(self._stream)
            values.record_stream(using)  # else its memory could be handed to the next copy while it is still read
        return values
