"""Captions of each family are equal in batches and one by one, and equal to those of plain transformers."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from captioner.config import ModelConfig
from captioner.errors import ModelError
from captioner.models import load, resolve
from captioner.models.logits import token_counts
from captioner.starter.scenes import make_scenes
from captioner.testing import FakeCaptioner, make_tiny_model

LIMIT = 12
START, END = 1, 2
FAMILIES = ("git", "blip", "vision-encoder-decoder")  # the others: test_models_families.py
PROCESSORS = {
    "git": CLIPImageProcessorPil,
    "blip": BlipImageProcessorPil,
    "vision-encoder-decoder": ViTImageProcessorPil,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return {family: make_tiny_model(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.stack([np.asarray(scene.render(32)) for scene in make_scenes(40, seed=5)])


def caption(directory, pixels, batch_size=16, **settings):
    config = ModelConfig(name=str(directory), **({"max_new_tokens": LIMIT} | settings))
    return load(resolve(config), device="cpu", batch_size=batch_size).caption(pixels)


def generate_with_transformers(family, directory, pixels, **inputs):
    """Return token ids, model and pixels of transformers' own image processor and `generate`."""
    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    processor = PROCESSORS[family].from_pretrained(directory)
    images = [Image.fromarray(image) for image in pixels]
    values = processor(images, return_tensors="pt").pixel_values
    with torch.inference_mode():
        ids = model.generate(pixel_values=values, do_sample=False, **({"max_new_tokens": LIMIT} | inputs))
    return ids, model, values


def own_tokens(row: torch.Tensor) -> list[int]:
    """Return the generated tokens of a row of `generate`, end token included."""
    tokens = row.tolist()
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_do_not_change_captions(family, num_beams, models, pixels) -> None:
    single = caption(models[family], pixels, batch_size=1, num_beams=num_beams)

    assert len(set(single.texts)) >= len(pixels) / 2
    for batch_size in (7, 64):
        batched = caption(models[family], pixels, batch_size=batch_size, num_beams=num_beams)
        assert (batched.texts, batched.num_tokens, batched.finished) == (
            single.texts,
            single.num_tokens,
            single.finished,
        )
        np.testing.assert_allclose(batched.logprob_mean, single.logprob_mean, atol=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_those_of_transformers(family, num_beams, models, pixels) -> None:
    ids, _, _ = generate_with_transformers(family, models[family], pixels, num_beams=num_beams)
    tokenizer = AutoTokenizer.from_pretrained(models[family])

    captions = caption(models[family], pixels, num_beams=num_beams)

    expected = [own_tokens(row[1:]) for row in ids]
    assert captions.texts == [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in expected]
    assert captions.num_tokens == [len(tokens) for tokens in expected]
    assert captions.finished == [tokens[-1] == END for tokens in expected]
    assert {True, False} == set(captions.finished)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_teacher_forcing(family, num_beams, models, pixels) -> None:
    ids, model, values = generate_with_transformers(family, models[family], pixels, num_beams=num_beams)
    text = {"decoder_input_ids" if family == "vision-encoder-decoder" else "input_ids": ids[:, :-1]}
    with torch.inference_mode():
        logits = model(pixel_values=values, **text).logits[:, -(ids.shape[1] - 1) :]
    logprobs = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    expected = [logprobs[row, : len(own_tokens(ids[row, 1:]))].mean().item() for row in range(len(ids))]

    captions = caption(models[family], pixels, num_beams=num_beams)

    np.testing.assert_allclose(captions.logprob_mean, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["git", "blip"])
def test_a_caption_continues_the_prompt_without_containing_it(family, models, pixels) -> None:
    prompt = "a small red"
    tokenizer = AutoTokenizer.from_pretrained(models[family])
    start = [START, *tokenizer(prompt, add_special_tokens=False).input_ids]
    # BLIP's generate takes a complete tokenized text and removes its end token; GIT's takes the start of a text.
    rows = torch.tensor([[*start, END] if family == "blip" else start]).repeat(len(pixels), 1)
    ids, _, _ = generate_with_transformers(family, models[family], pixels, input_ids=rows)

    prompted = caption(models[family], pixels, prompt=prompt)

    expected = [own_tokens(row[len(start) :]) for row in ids]
    assert prompted.texts == [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in expected]
    assert prompted.num_tokens == [len(tokens) for tokens in expected]
    assert prompted.texts != caption(models[family], pixels).texts


def test_with_a_limit_of_one_token_only_empty_captions_are_finished(models, pixels) -> None:
    captions = caption(models["git"], pixels, max_new_tokens=1)

    assert captions.num_tokens == [1] * len(pixels)
    assert all(text == "" for text, finished in zip(captions.texts, captions.finished, strict=True) if finished)
    assert not all(captions.finished)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_runs_in_bfloat16(family, models, pixels) -> None:
    ref = resolve(ModelConfig(name=str(models[family]), max_new_tokens=LIMIT), dtype="bfloat16")
    captioner = load(ref, device="cpu")

    captions = captioner.caption(pixels[:5])

    assert ref.dtype == "bfloat16"
    assert {parameter.dtype for parameter in captioner.model.parameters()} == {torch.bfloat16}
    assert len(captions.texts) == 5
    assert all(math.isfinite(value) and value <= 0 for value in captions.logprob_mean)


def write_generation_settings(directory, **settings) -> None:
    file = directory / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_search_settings_of_the_checkpoint_are_kept(tmp_path, pixels) -> None:
    model = make_tiny_model("git", tmp_path)
    before = caption(model, pixels, num_beams=3)
    write_generation_settings(model, repetition_penalty=5.0, length_penalty=-3.0)
    ids, _, _ = generate_with_transformers("git", model, pixels, num_beams=3)
    tokenizer = AutoTokenizer.from_pretrained(model)

    after = caption(model, pixels, num_beams=3)

    assert after.texts == [tokenizer.decode(own_tokens(row[1:]), skip_special_tokens=True).strip() for row in ids]
    assert after.texts != before.texts


def test_lengths_beams_and_sampling_of_the_checkpoint_are_ignored(tmp_path, pixels) -> None:
    model = make_tiny_model("git", tmp_path)
    before = caption(model, pixels)
    write_generation_settings(
        model, max_length=3, num_beams=5, do_sample=True, temperature=0.1, top_k=7, num_return_sequences=4
    )

    assert caption(model, pixels).texts == before.texts


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", ["git", "vision-encoder-decoder"])  # BLIP takes these settings from its config.json
def test_a_caption_that_is_forced_to_end_at_the_limit_is_marked_as_cut(family, num_beams, tmp_path, pixels) -> None:
    model = make_tiny_model(family, tmp_path)
    before = caption(model, pixels, num_beams=num_beams)
    write_generation_settings(model, forced_eos_token_id=END)

    after = caption(model, pixels, num_beams=num_beams)

    assert after.finished == [count < LIMIT for count in after.num_tokens]
    assert {True, False} == set(after.finished)
    assert num_beams > 1 or [text for text, ended in zip(after.texts, after.finished, strict=True) if ended] == [
        text for text, count in zip(before.texts, before.num_tokens, strict=True) if count < LIMIT
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_token_that_is_only_in_the_configuration_is_used(family, tmp_path, pixels) -> None:
    model = make_tiny_model(family, tmp_path)
    before = caption(model, pixels)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": END, "pad_token_id": 0}))

    assert caption(model, pixels).texts == before.texts


def test_the_minimum_length_of_the_checkpoint_is_lowered_to_the_limit(tmp_path, pixels) -> None:
    model = make_tiny_model("git", tmp_path)
    write_generation_settings(model, min_length=30, min_new_tokens=30)

    assert caption(model, pixels, max_new_tokens=5).num_tokens == [5] * len(pixels)


def test_prompt_and_caption_must_fit_the_model(models) -> None:
    config = ModelConfig(name=str(models["git"]), prompt="a red circle " * 20, max_new_tokens=40)

    with pytest.raises(ModelError, match="has 64 text positions; shorten one of them"):
        load(resolve(config), device="cpu")


def test_an_absent_device_is_named(models) -> None:
    with pytest.raises(ModelError, match=r"--device cuda:97 cannot be used on node .*; install torch with CUDA there"):
        load(resolve(ModelConfig(name=str(models["git"]))), device="cuda:97")


@pytest.mark.parametrize(("small_model_bytes", "expected"), [(0, 2), (20_000_000, 1)])
def test_threads_are_set_and_a_small_model_gets_one(
    models, monkeypatch: pytest.MonkeyPatch, small_model_bytes: int, expected: int
) -> None:
    monkeypatch.setattr("captioner.models.loading.SMALL_MODEL_BYTES", small_model_bytes)
    before = torch.get_num_threads()
    try:
        load(resolve(ModelConfig(name=str(models["git"]))), device="cpu", num_threads=2)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_read_only_pixels_are_accepted(models, pixels) -> None:
    frozen = pixels[:3].copy()
    frozen.setflags(write=False)

    assert caption(models["git"], frozen).texts == caption(models["git"], pixels[:3]).texts


@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=5))
def test_a_caption_ends_with_its_first_end_token(rows) -> None:
    counts, finished = token_counts(torch.tensor(rows), [END, 5])

    for row, count, done in zip(rows, counts, finished, strict=True):
        ends = [position for position, token in enumerate(row, start=1) if token in (END, 5)]
        assert (count, done) == ((ends[0], True) if ends else (len(row), False))


def test_a_model_without_an_end_token_never_finishes() -> None:
    assert token_counts(torch.tensor([[3, 2, 1]]), []) == ([3], [False])


def test_captions_of_the_fake_depend_on_the_pixels(pixels) -> None:
    captions = load(resolve(ModelConfig(name="fake"))).caption(pixels)

    assert captions == FakeCaptioner().caption(pixels)
    assert captions.texts[0] == f"picture {zlib.crc32(pixels[0].tobytes()):08x}"
    assert len(set(captions.texts)) == len({image.tobytes() for image in pixels})
    assert captions.num_tokens == [3] * len(pixels)
    assert captions.logprob_mean == [-(zlib.crc32(image.tobytes()) % 1000) / 1000 for image in pixels]
    assert all(captions.finished)


def test_the_starter_loads_and_captions() -> None:
    images = np.stack([np.asarray(scene.render(64)) for scene in make_scenes(3, seed=5)])

    captions = load(resolve(ModelConfig(name="starter")), device="cpu").caption(images)

    assert len(captions.texts) == 3
