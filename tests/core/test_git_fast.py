"""The search for GIT finds the token ids of transformers' `generate`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.activations import QuickGELUActivation

import captioner.starter
from captioner.config import ModelConfig
from captioner.models import load, resolve
from captioner.models.git import unsupported_settings
from captioner.models.packed import PackedLinear, QuickGELU, pack_linears, replace_quick_gelus
from captioner.starter.scenes import make_scenes
from captioner.testing import make_tiny_model

LIMIT = 20
STARTER = Path(captioner.starter.__file__).parent / "model"


pytestmark = pytest.mark.usefixtures("one_thread")


def images(side: int, count: int) -> np.ndarray:
    """Return scenes and as many images of noise, which the starter gives long and different captions."""
    scenes = np.stack([np.asarray(scene.render(side)) for scene in make_scenes(count // 2, seed=5)])
    noise = np.random.default_rng(0).integers(0, 256, scenes.shape, dtype=np.uint8)
    return np.concatenate([scenes, noise])


def open_fast(directory: Path, batch_size: int = 32, **settings):
    config = ModelConfig(name=str(directory), **({"max_new_tokens": LIMIT} | settings))
    return load(resolve(config), device="cpu", batch_size=batch_size)


def search_and_generate(
    directory: Path, pixels: np.ndarray, generate=None, **settings
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the new token ids of each image, end token included, by the fast search and by transformers."""
    captioner = open_fast(directory, **settings)
    assert captioner.engine == "fast"
    plain = AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager").eval()
    prefix = torch.tensor([captioner.prefix])
    options = {"num_beams": captioner.ref.num_beams, "max_new_tokens": captioner.ref.max_new_tokens, "do_sample": False}
    fast, expected = [], []
    with torch.inference_mode():
        for first in range(0, len(pixels), captioner.batch_size):
            values = captioner.normalise(torch.from_numpy(pixels[first : first + captioner.batch_size]))
            rows = prefix.repeat(len(values), 1)
            output = plain.generate(pixel_values=values, input_ids=rows, **options, **(generate or {}))
            fast += [caption_of(row) for row in captioner.search(values)[0]]
            expected += [caption_of(row) for row in output[:, prefix.shape[1] :]]
    assert len({tuple(row) for row in expected}) >= len(pixels) / 2
    return fast, expected


def caption_of(tokens: torch.Tensor, end: int = 2) -> list[int]:
    ids = tokens.tolist()
    return ids[: ids.index(end) + 1] if end in ids else ids


@pytest.mark.parametrize("num_beams", [1, 3, 5])
def test_token_ids_of_the_starter_are_those_of_generate(num_beams) -> None:
    fast, expected = search_and_generate(STARTER, images(64, 80), num_beams=num_beams)

    assert fast == expected
    assert len({len(row) for row in expected}) >= 3  # rows leave the search at different steps


@pytest.mark.parametrize("num_beams", [1, 3, 5])
def test_token_ids_of_a_tiny_model_are_those_of_generate(num_beams, tiny) -> None:
    fast, expected = search_and_generate(tiny, images(32, 80), num_beams=num_beams)

    assert fast == expected
    assert {row[-1] == 2 for row in expected} == {True, False}


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_search_starts_with_the_prompt(num_beams, tiny) -> None:
    fast, expected = search_and_generate(tiny, images(32, 40), num_beams=num_beams, prompt="a small red")

    assert fast == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"length_penalty": 2.0},
        {"length_penalty": -1.0},
        {"length_penalty": 0.0, "early_stopping": "never"},
        {"length_penalty": 2.0, "early_stopping": "never"},
        {"early_stopping": True},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9},
        {"min_length": 12, "no_repeat_ngram_size": 1, "early_stopping": True},
        {"eos_token_id": [2, 40, 41]},
    ],
    ids=str,
)
def test_settings_of_the_checkpoint_are_applied(settings, tmp_path) -> None:
    model = write_settings(make_tiny_model("git", tmp_path), **settings)

    fast, expected = search_and_generate(model, images(32, 64), num_beams=3)

    assert fast == expected


@pytest.mark.parametrize("settings", [{"no_repeat_ngram_size": 1}, {"min_new_tokens": 9}], ids=str)
def test_greedy_search_applies_settings_of_the_checkpoint(settings, tmp_path) -> None:
    model = write_settings(make_tiny_model("git", tmp_path), **settings)

    fast, expected = search_and_generate(model, images(32, 64))

    assert fast == expected


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batches_token_counts_and_logprobs_are_those_of_the_generic_search(num_beams, tiny) -> None:
    pixels = images(32, 50)
    fast = open_fast(tiny, batch_size=7, num_beams=num_beams).caption(pixels)
    captioner = open_fast(tiny, num_beams=num_beams)
    captioner._fast = None

    generic = captioner.caption(pixels)

    assert (fast.texts, fast.num_tokens, fast.finished) == (generic.texts, generic.num_tokens, generic.finished)
    np.testing.assert_allclose(fast.logprob_mean, generic.logprob_mean, atol=1e-4)


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_shortest_limits(limit, num_beams, tiny) -> None:
    pixels = images(32, 20)
    captioner = open_fast(tiny, num_beams=num_beams, max_new_tokens=limit)
    values = captioner.normalise(torch.from_numpy(pixels))
    with torch.inference_mode():
        fast = captioner.search(values)[0]
        captioner._fast = None
        expected = captioner.search(values)[0]

    assert [caption_of(row) for row in fast] == [caption_of(row) for row in expected]


def test_settings_that_only_generate_supports_are_left_to_it(tmp_path) -> None:
    model = write_settings(make_tiny_model("git", tmp_path), repetition_penalty=5.0)

    captioner = open_fast(model)

    assert captioner.engine == "generic"
    assert len(set(captioner.caption(images(32, 20)).texts)) >= 10


def test_settings_without_effect_do_not_need_generate() -> None:
    assert unsupported_settings(GenerationConfig(repetition_penalty=1.0, max_new_tokens=3, num_beams=3)) == []
    assert unsupported_settings(GenerationConfig(repetition_penalty=1.2)) == ["repetition_penalty"]
    assert unsupported_settings(GenerationConfig(do_sample=True, temperature=0.5)) == ["temperature"]


def test_a_packed_layer_has_the_results_of_the_layer() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(700, 512, bias=False))
    model = nn.Sequential(nn.Linear(600, 700), nn.GELU(), inner, nn.Linear(512, 4))
    values = torch.randn(3, 5, 600)
    with torch.inference_mode():
        before = model(values)
        packed = pack_linears(model)
        after = model(values)

    assert packed in (0, 2)  # none where this build of torch cannot
    assert sum(isinstance(part, PackedLinear) for part in model.modules()) == packed
    assert isinstance(model[-1], nn.Linear)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_a_quick_gelu_that_takes_less_memory_has_equal_results() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Sequential(QuickGELUActivation()))
    values = torch.randn(3, 5, 30)
    with torch.inference_mode():
        before = model(values)
        replace_quick_gelus(model)
        after = model(values)

    assert isinstance(model[1][0], QuickGELU)
    assert torch.equal(after, before)


def test_a_loaded_model_has_the_quick_gelu_that_takes_less_memory() -> None:
    kinds = {type(part) for part in open_fast(STARTER).model.modules()}

    assert QuickGELU in kinds
    assert QuickGELUActivation not in kinds


def write_settings(directory: Path, **settings) -> Path:
    file = directory / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return directory
