"""A captioner without a model, for tests and for measurements of everything around the model."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

from captioner.data import CAPTION, Captions, Pixels, Prompts, Question
from captioner.models.questions import fill, with_answers
from captioner.models.seeds import random_numbers


class FakeCaptioner:
    """Captions each image with the CRC-32 of its pixels, so that only equal images get equal captions.

    `num_captions`, `seed`: of sampled captions, which end with a random number; None where none are sampled.
    `questions`: asked about each image; captions and answers begin with the prompt of their question, or with "picture"
    where it has none. None: the caption alone.
    """

    def __init__(
        self,
        num_captions: int = 1,
        seed: int | None = None,
        questions: Sequence[Question] | None = None,
    ) -> None:
        self.num_captions, self.seed = num_captions, seed
        self.questions = questions or [Question(CAPTION, None, 40)]

    def caption(self, pixels: Pixels, prompts: Sequence[Prompts] | None = None) -> Captions:
        """Caption images: "picture 1a2b3c4d", with a log-probability that depends on the CRC."""
        checksums = [zlib.crc32(image.tobytes()) for image in pixels]
        logprobs = [-(checksum % 1000) / 1000 for checksum in checksums]
        if prompts is None:
            prompts = [tuple(fill(question.prompt, {}) for question in self.questions)] * len(checksums)
        replies = []
        for column in zip(*prompts, strict=True):
            texts = [
                f"{prompt or 'picture'} {checksum:08x}" for prompt, checksum in zip(column, checksums, strict=True)
            ]
            replies.append(self._sampled(pixels, Captions(texts, [3] * len(texts), logprobs, [True] * len(texts))))
        return with_answers(self.questions, replies, prompts)

    def _sampled(self, pixels: Pixels, captions: Captions) -> Captions:
        """Return captions with the random numbers of sampling, where there is any."""
        if self.seed is None:
            return captions
        numbers = random_numbers(pixels, self.seed, self.num_captions, 1)[:, :, 0]
        sampled = [
            [f"{text} {number:.6f}" for number in row] for text, row in zip(captions.texts, numbers, strict=True)
        ]
        return replace(
            captions,
            texts=[row[0] for row in sampled],
            num_tokens=[4] * len(sampled),
            samples=sampled if self.num_captions > 1 else [],
        )
