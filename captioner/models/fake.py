"""A captioner that costs nothing: for tests and for measuring everything around the model."""

from __future__ import annotations

import time
import zlib

from captioner.data import Captions, Pixels


class FakeCaptioner:
    """Names each picture by the CRC-32 of its pixels, so that equal pictures and no others get equal captions.

    `delay`: seconds each call takes longer. `prompt`: the caption's first words; another prompt is another model.
    """

    def __init__(self, delay: float = 0.0, prompt: str | None = None) -> None:
        self.delay, self.prompt = delay, prompt or "picture"

    def caption(self, pixels: Pixels) -> Captions:
        """Caption N pictures: "picture 1a2b3c4d". Its log-probability follows from the CRC."""
        if self.delay:
            time.sleep(self.delay)
        sums = [zlib.crc32(picture.tobytes()) for picture in pixels]
        texts, logprobs = [f"{self.prompt} {crc:08x}" for crc in sums], [-(crc % 1000) / 1000 for crc in sums]
        return Captions(texts, [3] * len(sums), logprobs, [True] * len(sums))
