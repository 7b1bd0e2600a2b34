"""The model that ships with the package: small, complete, right about scenes it never saw."""

from pathlib import Path

import pyarrow as pa
import pytest
from helpers import caption_config
from hypothesis import given
from hypothesis import strategies as st

import captioner.starter
from captioner import pipeline
from captioner.errors import UsageError
from captioner.scoring.wer import corpus_wer
from captioner.starter.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, describes_scene, make_scenes
from captioner.store.read import read_parts
from captioner.store.table import open_table
from captioner.testing import make_folder
from ray_jobs.demo import _render_once

MODEL = Path(captioner.starter.__file__).parent / "model"
HELD_OUT_SEED = 7_654_321


def run_starter(source: Path, out: Path) -> dict:
    pipeline.run(caption_config(source, out, model={"name": "starter"}))
    return open_table(str(out)).directory.read_json("run.json")


def test_the_weights_are_small_and_the_card_states_the_measured_figure() -> None:
    card = (MODEL / "README.md").read_text()

    assert (MODEL / "model.safetensors").stat().st_size <= 6_000_000
    assert "WER 0." in card
    assert "mean\nnothing" in card


def test_held_out_scenes_are_captioned_right(tmp_path: Path) -> None:
    record = run_starter(make_folder(tmp_path / "archive", 200, seed=HELD_OUT_SEED, width=192), tmp_path / "out")
    rows = pa.concat_tables(read_parts(open_table(str(tmp_path / "out")))).to_pylist()

    wer = corpus_wer([row["caption"] for row in rows], [row["reference_captions"] for row in rows])
    assert wer is not None
    assert wer <= 0.05
    assert len({row["caption"] for row in rows}) > 150
    assert record["notes"] == []
    assert record["check"]["wer"] == wer


def test_on_other_images_the_record_says_that_captions_mean_nothing(tmp_path: Path, capsys) -> None:
    archive = make_folder(tmp_path / "archive", 2)
    (archive / "metadata.jsonl").unlink()

    record = run_starter(archive, tmp_path / "out")

    assert any("are meaningless" in note for note in record["notes"])
    assert "are meaningless" in capsys.readouterr().err


def test_scenes_have_the_variety_they_promise() -> None:
    scenes = list(make_scenes(500, seed=3))

    assert (len(COLOURS) >= 8, len(SHAPES) >= 5, len(SIZES) >= 2, len(BACKGROUNDS) >= 3) == (True,) * 4
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}
    assert all(describes_scene(caption) for scene in scenes for caption in scene.captions)
    assert all(scene.captions[0] != scene.captions[1] for scene in scenes)
    assert not describes_scene("a man on a red bicycle against a white background")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@given(text=st.text(max_size=80))
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids

    assert tokenizer.decode(ids) == text


def test_the_model_loads_with_plain_transformers(tokenizer) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(MODEL)
    processor = AutoProcessor.from_pretrained(MODEL)
    (scene,) = make_scenes(1, seed=5)
    inputs = processor(images=scene.render(), return_tensors="pt")

    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)

    assert processor.batch_decode(ids, skip_special_tokens=True) == [scene.captions[0]]


def test_scenes_of_a_demo_that_was_stopped_are_rendered_again_and_no_part_is_taken_for_all(tmp_path: Path) -> None:
    images = tmp_path / "archive"
    make_folder(tmp_path / "archive.part", 2)  # what a demo leaves that is stopped while it renders

    assert _render_once(images, 3)
    assert not _render_once(images, 3)
    assert len(list((images / "images").iterdir())) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive"]
    with pytest.raises(UsageError, match=f"{images} holds 3 scenes, not 20; remove {tmp_path} first"):
        _render_once(images, 20)
