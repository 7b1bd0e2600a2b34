"""`--preprocess fast|processor`: nearly the pixels of the model's image processor, or exactly those."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from captioner.config import ModelConfig
from captioner.data import PixelSpec
from captioner.imaging import decode
from captioner.models import resolve

CLIP = PixelSpec(224, 224, "shortest_edge", 224)
BLIP = PixelSpec(160, 160)
SIZES = [(640, 480), (480, 640), (301, 999), (224, 224), (100, 80), (1700, 1300)]


def photo(width: int, height: int) -> bytes:
    """Return a JPEG with smooth parts, edges and noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 37 + y / 91), np.cos(x / 11), ((x // 40 + y // 30) % 2) * 2.0 - 1], axis=-1)
    grain = np.random.default_rng(0).normal(0, 6, waves.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(128 + 90 * waves + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def with_transformers(data: bytes, spec: PixelSpec) -> np.ndarray:
    if spec.resize == "exact":
        processor = BlipImageProcessorPil(size={"height": spec.height, "width": spec.width})
    else:
        processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    image = Image.open(io.BytesIO(data)).convert("RGB")
    output = processor([image], do_rescale=False, do_normalize=False, return_tensors="np")
    return np.asarray(output["pixel_values"][0]).transpose(1, 2, 0)


@pytest.mark.parametrize("spec", [CLIP, BLIP], ids=["shortest_edge", "exact"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_those_of_the_processor_exactly_or_nearly(size, spec) -> None:
    data = photo(*size)
    expected = with_transformers(data, spec)

    exact = decode(data, with_preprocess(spec, "processor"), 10**8).pixels
    fast = decode(data, spec, 10**8).pixels

    np.testing.assert_array_equal(exact, expected)
    assert np.abs(fast.astype(int) - expected.astype(int)).mean() <= 1.0


def with_preprocess(spec: PixelSpec, preprocess: str) -> PixelSpec:
    return PixelSpec(spec.height, spec.width, spec.resize, spec.shortest_edge, spec.resample, preprocess=preprocess)


def test_the_value_is_in_the_fingerprint_and_in_the_spec() -> None:
    fast, exact = (resolve(ModelConfig(name="starter", preprocess=choice)) for choice in ("fast", "processor"))

    assert (fast.spec.preprocess, exact.spec.preprocess) == ("fast", "processor")
    assert fast.fingerprint != exact.fingerprint
    assert fast.fingerprint == resolve(ModelConfig(name="starter")).fingerprint


def test_a_long_strip_is_decoded_with_either_value() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (30_000, 2), "red").save(buffer, "PNG")

    assert decode(buffer.getvalue(), with_preprocess(CLIP, "processor"), 10**8).pixels.shape == (224, 224, 3)
