"""A GPU whose memory is too small for the model stops the run; one that is too small for an image costs that image."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import caption_config, rows_of
from PIL import Image

from captioner import pipeline
from captioner.config import CaptionConfig, ModelConfig
from captioner.errors import OK, ModelError, TooManyFailedError
from captioner.models import load, resolve
from captioner.models.placement import no_room
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder, make_tiny_model, num_committed_chunks, with_room_for

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL_IMAGE = 512 * 512 * 3  # values of the image that tells whether the model or an image is too large
GIANT = "giant.png"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return cache(lambda family: make_tiny_model(family, tmp_path_factory.mktemp(family)))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run_with_room(config: CaptionConfig, room: int | None = None) -> int:
        """Run in this process; `room`: values of the largest batch that the GPU has memory for."""
        with monkeypatch.context() as patched:
            if room is not None:
                patched.setattr(pipeline, "load", lambda *args, **named: with_room_for(load(*args, **named), room))
            return pipeline.run(config)

    return run_with_room


def settings(model: Path | str) -> dict[str, object]:
    return {"name": str(model), "device": "cpu", "max_new_tokens": 4, "batch_size": 8}


@pytest.mark.parametrize("family", ["blip", "gemma3"])
def test_where_not_even_a_small_image_fits_the_run_stops_and_resumes_elsewhere(
    tiny, tmp_path: Path, run, family: str
) -> None:
    config = caption_config(make_folder(tmp_path / "images", 20), tmp_path / "out", model=settings(tiny(family)))

    message = r"not one image, not even of \d+ x \d+ pixels, fits the memory of cpu, "
    with pytest.raises(ModelError, match=message) as caught:
        run(config, room=0)

    assert "\n" not in str(caught.value)
    assert num_committed_chunks(tmp_path / "out") == 0
    assert run(config) == OK
    assert {row["status"] for row in rows_of(tmp_path / "out")} == {"ok"}
    assert verify(open_table(str(tmp_path / "out"))).proven


def test_one_giant_image_is_a_failed_row_and_is_captioned_where_there_is_room(tiny, tmp_path: Path, run) -> None:
    """Also where it is the first image of a worker, and alone in its chunk, as in a retry."""
    archive, out = make_folder(tmp_path / "images", 20), tmp_path / "out"
    Image.effect_noise((700, 700), 50).convert("RGB").save(archive / GIANT)
    config = caption_config(archive, out, model=settings(tiny("gemma3")), max_failed=0.5)
    again = caption_config(archive, out, model=settings(tiny("gemma3")), max_failed=0.01, retry_failed=True)

    assert run(config, SMALL_IMAGE) == OK
    with pytest.raises(TooManyFailedError):
        run(again, SMALL_IMAGE)
    failed = [row for row in rows_of(out) if row["status"] != "ok"]
    assert [(row["image_id"], row["error_code"]) for row in failed] == [(GIANT, "generate_error")]
    assert failed[0]["error_message"].startswith("OutOfMemoryError: no memory for ")

    assert run(again) == OK
    assert {row["status"] for row in rows_of(out)} == {"ok"}
    assert verify(open_table(str(out))).proven


def test_a_worker_that_has_captioned_asks_for_no_other_image(tiny) -> None:
    """Its memory may be short for a moment: that costs images, which a retry captions, and not the run."""
    captioner = load(resolve(ModelConfig(name=str(tiny("blip")), max_new_tokens=4)), "cpu", 8)
    spec = captioner.ref.spec
    image = np.zeros((1, spec.height, spec.width, 3), np.uint8)
    captioner.caption(image)

    with_room_for(captioner, 0)

    with pytest.raises(torch.OutOfMemoryError):
        captioner.caption(image)


def test_what_would_make_room_is_named(tiny) -> None:
    ref = resolve(ModelConfig(name=str(tiny("qwen2_5_vl")), num_beams=3))

    line = str(no_room(ref, "512 x 512 pixels", "H100, 79 GiB", 80 * 10**9, 10**9))

    assert "fits the memory of H100, 79 GiB, of which the weights take 80.0 GB in float32 and 1.0 GB are free" in line
    ways = (
        "--num-beams 1 instead of 3, --dtype bfloat16 (",
        "--quantize int8 (",
        "--gpus-per-worker 2",
        "a smaller model",
    )
    assert all(way in line for way in ways)
    int8 = str(no_room(resolve(ModelConfig(name=ref.path, quantize="int8")), "", "", 10**9, 0))
    assert "--quantize int8" not in int8
    assert "--quantize int4 (" in int8
