"""A PixelSpec from an image processor's settings gives the pixels of the transformers class, or is refused."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from captioner.data import PixelSpec, RawImage
from captioner.errors import ModelError
from captioner.imaging import decode_images
from captioner.models.pixel_spec import read_pixel_spec

CLASSES = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "BlipImageProcessor": BlipImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
    "BeitImageProcessor": BeitImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
}
RESAMPLE = {"bilinear": 2, "bicubic": 3}
SMALL = {"height": 9, "width": 50}


def write(directory, **settings):
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


def normalised(spec: PixelSpec, pixels: np.ndarray) -> np.ndarray:
    """Return normalised pixels, float [3, H, W], as `captioner.models` computes them on the device."""
    values = (pixels.astype(np.float64) / 255 - np.array(spec.mean)) / np.array(spec.std)
    return values.transpose(2, 0, 1)


@pytest.mark.parametrize("name", CLASSES)
def test_absent_settings_are_the_defaults_of_their_class(name, tmp_path) -> None:
    spec = read_pixel_spec(write(tmp_path, image_processor_type=name), "git")
    processor = CLASSES[name]()
    image = np.random.default_rng(0).integers(0, 256, (spec.height, spec.width, 3), dtype=np.uint8)

    expected = processor(Image.fromarray(image), return_tensors="np").pixel_values[0]

    np.testing.assert_allclose(normalised(spec, image), expected, atol=1e-5)
    assert RESAMPLE[spec.resample] == processor.resample
    assert spec.shortest_edge == (dict(processor.size).get("shortest_edge") or 0)


@settings(max_examples=20, deadline=None)
@given(
    do_rescale=st.booleans(),
    do_normalize=st.booleans(),
    rescale_factor=st.sampled_from([1 / 255, 1 / 127.5, 1.0]),
    mean=st.lists(st.floats(0.1, 0.9), min_size=3, max_size=3),
)
def test_any_scale_gives_the_pixels_of_transformers(
    tmp_path_factory, do_rescale, do_normalize, rescale_factor, mean
) -> None:
    flags = {"do_rescale": do_rescale, "do_normalize": do_normalize, "rescale_factor": rescale_factor}
    values = {"image_mean": mean, "image_std": [0.25, 0.5, 0.75], "size": {"height": 8, "width": 8}}
    directory = write(tmp_path_factory.mktemp("any"), image_processor_type="ViTImageProcessor", **flags, **values)
    image = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)

    expected = ViTImageProcessorPil(**flags, **values)(Image.fromarray(image), return_tensors="np").pixel_values[0]

    np.testing.assert_allclose(
        normalised(read_pixel_spec(directory, "vision-encoder-decoder", "vit"), image), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 96, "crop_size": 64}, ("shortest_edge", 96, 64)),
        ({"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 64}, "crop_size": 64}, None),
        ({"image_processor_type": "ViTFeatureExtractor", "size": 96}, ("exact", 0, 96)),
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 96, "width": 96}}, ("exact", 0, 96)),
        ({"size": {"shortest_edge": 96}, "crop_size": {"height": 96, "width": 96}}, ("shortest_edge", 96, 96)),
    ],
)
def test_older_formats_are_read(settings, expected, tmp_path) -> None:
    spec = read_pixel_spec(write(tmp_path, **settings), "git")

    assert (spec.resize, spec.shortest_edge, spec.height) == (expected or ("shortest_edge", 64, 64))


def test_the_section_of_the_processor_takes_precedence(tmp_path) -> None:
    write(tmp_path, image_processor_type="ViTImageProcessor", size=96)
    section = {"image_processor_type": "BlipImageProcessor", "size": {"height": 48, "width": 40}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": section}))

    spec = read_pixel_spec(tmp_path, "blip")

    assert (spec.height, spec.width) == (48, 40)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"do_resize": False, "do_center_crop": False}, "do_resize=False"),
        ({"do_center_crop": False}, "do_center_crop=False"),
        ({"do_center_crop": False, "size": {"shortest_edge": 100, "longest_edge": 200}}, "size="),
        (
            {"do_pad": True, "do_center_crop": False, "size": {"max_height": 50, "max_width": 50}, "pad_size": SMALL},
            "pad",
        ),
        ({"resample": 9}, "resample=9"),
        ({"size": {"shortest_edge": "large"}}, "size="),
        ({"crop_size": "large"}, "crop_size='large'"),
        ({"image_mean": [0.5]}, "image_mean="),
        ({"image_std": [0.5, 0, 0.5]}, "image_std="),
    ],
)
def test_settings_that_no_batch_of_images_can_have_are_refused_by_name(settings, key, tmp_path) -> None:
    with pytest.raises(ModelError) as raised:
        read_pixel_spec(write(tmp_path, **settings), "git")

    assert key in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "side"),
    [
        ({"image_processor_type": "DonutImageProcessor", "size": {"height": 2560, "width": 1920}}, 5120),
        ({"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.9}, 2048),
        ({"size": {"shortest_edge": 100, "longest_edge": 200}, "do_center_crop": True, "crop_size": 100}, 2048),
        ({"do_pad": True, "pad_size": {"height": 300, "width": 300}}, 2048),
    ],
)
def test_settings_that_only_the_processor_supports_are_left_to_it(settings, side, tmp_path) -> None:
    spec = read_pixel_spec(write(tmp_path, **settings), "vision-encoder-decoder", "vit")

    assert spec.variable_size
    assert (spec.resize, spec.limit) == ("own_edge", side)


PADDED = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"max_height": 48, "max_width": 64},
    "do_pad": True,
    "pad_size": {"height": 50, "width": 64},
}


def test_exact_padding_is_left_to_the_processor(tmp_path) -> None:
    write(tmp_path, **PADDED)

    assert read_pixel_spec(tmp_path, "vision-encoder-decoder").resize == "inside"
    assert read_pixel_spec(tmp_path, "vision-encoder-decoder", preprocess="processor").variable_size


def settings_of_processors() -> st.SearchStrategy[dict[str, Any]]:
    """Generate settings: a way to resize, a crop or padding, and a filter."""
    side = st.integers(16, 64)
    box = st.builds(lambda height, width: {"height": height, "width": width}, side, side)
    edge = st.builds(lambda length: {"shortest_edge": length}, side)
    cropped = {"do_center_crop": st.just(True), "crop_size": box}
    ways = st.one_of(
        st.fixed_dictionaries({"size": box}),
        st.fixed_dictionaries({"size": st.one_of(box, edge)} | cropped),
        st.fixed_dictionaries({"do_resize": st.just(False)} | cropped),
        st.just({key: PADDED[key] for key in ("size", "do_pad", "pad_size")}),
    )
    return st.builds(lambda way, number: way | {"resample": number}, ways, st.integers(0, 5))


BOX_FILTER = {
    "size": {"shortest_edge": 24},
    "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16},
    "resample": 4,
}


@settings(max_examples=60, deadline=None)
@given(
    chosen=settings_of_processors() | st.just(BOX_FILTER),
    size=st.tuples(st.integers(17, 150), st.integers(17, 150)),
    data=st.data(),
)
def test_pixels_are_those_of_the_processor(chosen, size, data, tmp_path_factory) -> None:
    """Exactly with `processor`, within 1/255 on average with `fast`."""
    preprocess = data.draw(st.sampled_from(["fast", "processor"]))
    directory = write(tmp_path_factory.mktemp("any"), image_processor_type="ViTImageProcessor", **chosen)
    spec = replace(read_pixel_spec(directory, "vision-encoder-decoder", "vit", preprocess), preprocess=preprocess)
    processor = ViTImageProcessorPil(**chosen)
    image = smooth_image(*size)

    (decoded,) = decode_images([RawImage("0", "", as_png(image))], spec, 10**6).pixels
    if spec.variable_size:
        assert (decoded == np.asarray(image)).all()
    else:
        expected = processor(image, return_tensors="np").pixel_values[0]
        difference = np.abs(normalised(spec, decoded) - expected).mean() * 0.5 * 255  # the standard deviation is 0.5
        assert difference <= (0.01 if preprocess == "processor" else 1)


def smooth_image(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 9 + y / 17), np.cos(x / 7), (x // 20 + y // 15) % 2 * 1.6 - 0.8], axis=-1)
    return Image.fromarray((128 + 120 * waves).astype(np.uint8))


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
