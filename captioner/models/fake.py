"""A captioner without a model, for tests and for measurements of everything around the model."""

from __future__ import annotations

import time
import zlib

from captioner.data import Captions, Pixels
from captioner.models.seeds import random_numbers


class FakeCaptioner:
    """Captions each image with the CRC-32 of its pixels, so that only equal images get equal captions.

    `delay`: seconds that each call sleeps. `prompt`: the first words of captions, instead of "picture". `num_captions`,
    `seed`: of sampled captions, which end with a random number; None where none are sampled.
    """

    def __init__(
        self, delay: float = 0.0, prompt: str | None = None, num_captions: int = 1, seed: int | None = None
    ) -> None:
        self.delay, self.prompt = delay, prompt or "picture"
        self.num_captions, self.seed = num_captions, seed

    def caption(self, pixels: Pixels) -> Captions:
        """Caption images: "picture 1a2b3c4d", with a log-probability that depends on the CRC."""
        if self.delay:
            time.sleep(self.delay)
        checksums = [zlib.crc32(image.tobytes()) for image in pixels]
        texts = [f"{self.prompt} {checksum:08x}" for checksum in checksums]
        logprobs = [-(checksum % 1000) / 1000 for checksum in checksums]
        if self.seed is None:
            return Captions(texts, [3] * len(texts), logprobs, [True] * len(texts))
        numbers = random_numbers(pixels, self.seed, self.num_captions, 1)[:, :, 0]
        sampled = [[f"{text} {number:.6f}" for number in row] for text, row in zip(texts, numbers, strict=True)]
        samples = sampled if self.num_captions > 1 else []
        return Captions([row[0] for row in sampled], [4] * len(texts), logprobs, [True] * len(texts), samples=samples)
