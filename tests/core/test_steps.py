"""A model that fails on an image, or is unsure of everything: one row, and no neighbour goes with it."""

import math

import numpy as np
import pytest

from captioner.data import Captions
from captioner.steps import Caption, caption_or_reasons
from captioner.testing import FakeCaptioner

PIXELS = np.arange(16 * 4 * 4 * 3, dtype=np.uint32).astype(np.uint8).reshape(16, 4, 4, 3)


class Failing(FakeCaptioner):
    """Raises where a batch is larger than `largest`, or holds one of the images that it cannot bear."""

    def __init__(self, unbearable: list[int], largest: int = 1_000, error: Exception | None = None) -> None:
        super().__init__()
        self.unbearable = [PIXELS[index].tobytes() for index in unbearable]
        self.largest, self.error = largest, error or RuntimeError("CUDA error:\n device-side assert")
        self.batches: list[int] = []

    def caption(self, pixels: np.ndarray) -> Captions:
        self.batches.append(len(pixels))
        if len(pixels) > self.largest or any(image.tobytes() in self.unbearable for image in pixels):
            raise self.error
        return super().caption(pixels)


def texts(results: list) -> list[str]:
    return [result.text if isinstance(result, Caption) else result for result in results]


EXPECTED = texts(caption_or_reasons(FakeCaptioner(), PIXELS))


@pytest.mark.parametrize("unbearable", [[0], [15], [3, 4], [0, 7, 15], list(range(16))])
def test_an_image_the_model_cannot_bear_fails_alone(unbearable: list[int]) -> None:
    results = texts(caption_or_reasons(Failing(unbearable), PIXELS))

    for index, text in enumerate(results):
        assert text == ("RuntimeError: CUDA error: device-side assert" if index in unbearable else EXPECTED[index])


def test_memory_that_is_too_small_for_a_batch_costs_no_image() -> None:
    captioner = Failing([], largest=5, error=MemoryError("out of memory"))

    assert texts(caption_or_reasons(captioner, PIXELS)) == EXPECTED
    assert captioner.batches == [16, 8, 4, 4, 8, 4, 4]


def test_one_bad_image_costs_a_few_calls_and_not_one_for_each() -> None:
    captioner = Failing([9])

    caption_or_reasons(captioner, PIXELS)

    assert len(captioner.batches) == 1 + 2 * int(math.log2(16))


def test_no_images_are_no_call() -> None:
    captioner = Failing([])

    assert caption_or_reasons(captioner, PIXELS[:0]) == []
    assert captioner.batches == []


@pytest.mark.parametrize("logprob", [math.nan, math.inf, -math.inf])
def test_a_log_probability_that_is_no_number_is_flagged_and_never_stored(logprob: float) -> None:
    class Unsure:
        def caption(self, pixels: np.ndarray) -> Captions:
            return Captions(["a cat", ""], [3, 1], [logprob, -0.5], [False, True])

    unsure, empty = caption_or_reasons(Unsure(), PIXELS[:2])

    assert isinstance(unsure, Caption)
    assert isinstance(empty, Caption)
    assert (unsure.text, unsure.logprob_mean, unsure.flags) == ("a cat", None, ["truncated", "no_logprob"])
    assert (empty.logprob_mean, empty.flags) == (-0.5, ["empty"])
