"""A captioner without a model, for tests and for measurements of everything around the model."""

from __future__ import annotations

import time
import zlib

from captioner.data import Captions, Pixels


class FakeCaptioner:
    """Captions each image with the CRC-32 of its pixels, so that only equal images get equal captions.

    `delay`: seconds that each call sleeps. `prompt`: the first words of captions, instead of "picture".
    """

    def __init__(self, delay: float = 0.0, prompt: str | None = None) -> None:
        self.delay, self.prompt = delay, prompt or "picture"

    def caption(self, pixels: Pixels) -> Captions:
        """Caption images: "picture 1a2b3c4d", with a log-probability that depends on the CRC."""
        if self.delay:
            time.sleep(self.delay)
        checksums = [zlib.crc32(image.tobytes()) for image in pixels]
        texts = [f"{self.prompt} {checksum:08x}" for checksum in checksums]
        logprobs = [-(checksum % 1000) / 1000 for checksum in checksums]
        return Captions(texts, [3] * len(texts), logprobs, [True] * len(texts))
