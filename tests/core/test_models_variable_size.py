"""Images of variable size are reduced only as far as their model's processor does, through a complete run."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.donut.image_processing_pil_donut import DonutImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from captioner import pipeline
from captioner.config import CaptionConfig, ModelConfig
from captioner.data import Chunk, RawImage
from captioner.imaging import decode_images
from captioner.imaging.fitting import resized, tiled_sizes
from captioner.imaging.sandbox.decoder import GuardedDecoder
from captioner.models import load, resolve
from captioner.models.pixel_spec import native_spec
from captioner.models.prepared import PreparedPatches, PreparedTiles
from captioner.starter.scenes import make_scenes
from captioner.steps import ChunkRows, Work
from captioner.testing import make_tiny_model
from ray_jobs.stages import from_block, to_block

SIDES = st.integers(1, 9000)
FILE = Path("preprocessor_config.json")


@settings(max_examples=300, deadline=None)
@given(height=SIDES, width=SIDES, edge=st.sampled_from([364, 1456, 2048]))
def test_an_image_to_be_tiled_gets_the_sizes_its_processor_uses(height, width, edge) -> None:
    spec = native_spec("idefics3", FILE, {"size": {"longest_edge": edge}, "max_image_size": {"longest_edge": 364}})

    first, second = tiled_sizes((height, width), spec)

    assert first == get_resize_output_image_size(np.empty((3, height, width), np.uint8), edge)
    assert second[0] % 364 == second[1] % 364 == 0
    assert second[0] + 364 <= spec.height
    assert second[1] <= spec.width


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (100, 7), (7, 100), (31, 32), (200, 200), (400, 300)])
def test_tiles_are_those_of_the_image_processor(size) -> None:
    settings = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}}
    spec = replace(native_spec("smolvlm", FILE, settings), preprocess="processor")
    image, processor = Image.effect_noise(size, 90).convert("RGB"), Idefics3ImageProcessorPil(**settings)
    wanted = processor([[image]], return_tensors="pt", return_row_col_info=True)
    (pixels,) = decode_images([RawImage("", "", as_file(image))], spec, 10**6).pixels
    prepared = PreparedTiles(processor)

    cut = prepared([[pixels], [pixels[-32:, :32]]])  # and a smaller one in the same batch

    assert [cut["rows"][0], cut["cols"][0]] == [wanted["rows"][0], wanted["cols"][0]]
    assert [cut["rows"][1], cut["cols"][1]] == [[0], [0]]
    normalised = prepared.normalised(cut)["pixel_values"]
    torch.testing.assert_close(normalised[:1], wanted["pixel_values"])
    assert not normalised[1, 1:].any()
    assert bool(wanted["pixel_attention_mask"].all())


def test_fast_tiles_are_nearly_those_of_the_image_processor() -> None:
    spec = native_spec("smolvlm", FILE, {"size": {"longest_edge": 1024}, "max_image_size": {"longest_edge": 256}})
    files = [as_file(scene.render(320).resize((400, 290))) for scene in make_scenes(4, seed=3)]
    specs = [replace(spec, preprocess=name) for name in ("fast", "processor")]

    fast, exact = (
        decode_images([RawImage("", "", file) for file in files], pixel_spec, 10**6).pixels for pixel_spec in specs
    )

    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(fast, exact, strict=True)) < 1


@settings(max_examples=300, deadline=None)
@example(height=36, width=5615, area=200_704)
@given(height=SIDES, width=SIDES, area=st.sampled_from([200_704, 1_003_520, 12_845_056]))
def test_an_image_for_qwen_gets_the_size_its_processor_uses(height, width, area) -> None:
    spec = native_spec("qwen2_5_vl", FILE, {"min_pixels": 3136, "max_pixels": area})

    size = resized((height, width), spec)

    refused = max(height, width) > 200 * min(height, width)
    assert size == ((1, 1) if refused else smart_resize(height, width, 28, 3136, area))
    assert 3 * size[0] * size[1] <= spec.max_bytes


@pytest.mark.parametrize("size", [(64, 48), (30, 100), (10, 10), (200, 150)])
def test_patches_are_those_of_the_image_processor(size) -> None:
    settings = {"size": {"shortest_edge": 1024, "longest_edge": 16384}, "patch_size": 8, "merge_size": 2}
    spec = replace(native_spec("qwen2_5_vl", FILE, settings), preprocess="processor")
    images = [Image.effect_noise(size, 90).convert("RGB"), Image.effect_noise((50, 60), 90).convert("RGB")]
    processor = Qwen2VLImageProcessorPil(**settings)
    wanted = processor(images, return_tensors="pt")
    pixels = decode_images([RawImage("", "", as_file(image)) for image in images], spec, 10**6).pixels
    prepared = PreparedPatches(processor)

    normalised = prepared.normalised(prepared([[image] for image in pixels]))

    torch.testing.assert_close(normalised["pixel_values"], wanted["pixel_values"])
    assert normalised["image_grid_thw"].tolist() == wanted["image_grid_thw"].tolist()


def test_the_limit_is_read_from_the_settings() -> None:
    assert native_spec("smolvlm", FILE, {"size": {"longest_edge": 2048}}).resize == "tiles"
    assert native_spec("idefics3", FILE, {"size": {"longest_edge": 9999}}).limit == 4096
    assert native_spec("idefics3", FILE, {"size": {"height": 980, "width": 980}}).limit == 2048
    assert native_spec("qwen2_vl", FILE, {"size": {"shortest_edge": 3136, "longest_edge": 784}}).limit == 784
    assert native_spec("qwen2_vl", FILE, {"patch_size": 16}).multiple == 32


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("smolvlm", {"do_image_splitting": False}),
        ("smolvlm", {"do_normalize": False}),
        ("idefics3", {"image_processor_type": "SomeImageProcessor"}),
        ("qwen2_5_vl", {"do_rescale": False}),
        ("qwen2_5_vl", {"image_processor_type": "PixtralImageProcessor"}),
    ],
)
def test_decoders_leave_to_other_processors_what_they_do_not_know(family, settings) -> None:
    assert native_spec(family, FILE, settings).resize == "own_edge"


def as_file(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def test_a_guarded_decoder_returns_images_of_any_size() -> None:
    spec = native_spec("qwen2_vl", FILE, {"max_pixels": 32 * 32, "min_pixels": 64, "patch_size": 4})
    files = [as_file(Image.effect_noise(size, 50)) for size in [(20, 30), (90, 50)]]
    here = decode_images([RawImage("0", "", file) for file in files], spec, 10**6)

    with GuardedDecoder(spec, 10**6, 60) as decoder:
        there = list(decoder(files))

    assert [image.shape for image in here.pixels] == [(32, 16, 3), (16, 40, 3)]
    assert all((decoded.pixels == image).all() for decoded, image in zip(there, here.pixels, strict=True))


def test_pixels_of_any_size_pass_from_stage_to_stage(tmp_path) -> None:
    ref = resolve(ModelConfig(name=str(make_tiny_model("qwen2_vl", tmp_path))))
    raws = [RawImage("0", "", as_file(Image.new("RGB", (20, 30), "red"))), RawImage("1", "", b"no image")]
    batch = decode_images(raws, ref.spec, 10**6)
    rows = ChunkRows(Chunk(0, 0, 0, 2), batch.rows, batch.pixels, {"read": 0.0, "decode": 0.0})
    work = Work(None, None, 10**6, ref, "run", 60.0)  # type: ignore[arg-type]

    passed = from_block(to_block(rows), work)

    assert passed.rows.equals(rows.rows)
    assert [image.tolist() for image in passed.pixels] == [image.tolist() for image in rows.pixels]


def test_a_run_captions_images_of_many_sizes(tmp_path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index, scene in enumerate(make_scenes(12, seed=3)):
        scene.render(64).resize((15 + 7 * index, 60 - 3 * index)).save(folder / f"{index:02d}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    model = make_tiny_model("qwen2_5_vl", tmp_path / "model")
    config = {"source": {"path": str(folder)}, "output": {"path": str(tmp_path / "out")}}
    config |= {"model": {"name": str(model), "max_new_tokens": 8}, "check": {"sample": 0}}

    assert pipeline.run(CaptionConfig.model_validate(config)) == 0

    rows = pq.read_table(tmp_path / "out" / "captions").sort_by("image_id").to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 12 + ["failed"]
    assert {row["prompt"] for row in rows} == {"Describe the image in one sentence."}
    assert len({row["caption"] for row in rows}) >= 6


def test_images_go_to_a_processor_that_is_not_known(tmp_path) -> None:
    """A VisionEncoderDecoder whose images Donut's processor turns, shrinks and pads."""
    model = make_tiny_model("vision-encoder-decoder", tmp_path)
    processor = DonutImageProcessorPil(size={"height": 32, "width": 32}, do_align_long_axis=True)
    processor.save_pretrained(model)
    (model / "processor_config.json").unlink(missing_ok=True)
    images = [scene.render(64).resize((30 + 9 * index, 64)) for index, scene in enumerate(make_scenes(10, seed=5))]
    ref = resolve(ModelConfig(name=str(model), max_new_tokens=8))
    decoded = decode_images([RawImage("", "", as_file(image)) for image in images], ref.spec, 10**6)

    captions = load(ref, device="cpu", batch_size=4).caption(decoded.pixels)

    network = AutoModelForImageTextToText.from_pretrained(model).eval()
    with torch.inference_mode():
        values = processor(images, return_tensors="pt").pixel_values
        ids = network.generate(pixel_values=values, do_sample=False, max_new_tokens=8)
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = [tokenizer.decode(row[1:], skip_special_tokens=True).strip() for row in ids]
    assert len(set(expected)) >= 5
    assert captions.texts == expected
    assert "its own image processor" in ref.summary
