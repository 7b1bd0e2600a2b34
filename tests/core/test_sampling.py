"""Sampled captions depend on image and seed alone, and follow the model's own distribution."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import caption_config, rows_of
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

from captioner import pipeline
from captioner.config import ModelConfig
from captioner.data import Captions, object_array
from captioner.errors import FingerprintError, UsageError
from captioner.models import load, resolve
from captioner.models.logits import Sampling
from captioner.models.seeds import image_seed, random_numbers
from captioner.starter.scenes import make_scenes
from captioner.testing import make_folder, make_tiny_model

LIMIT = 8
FAMILIES = ("git", "blip", "blip-2", "vision-encoder-decoder", "florence2", "smolvlm", "qwen2_5_vl")
WARM = {"temperature": 4.0, "seed": 3}  # tiny models are so sure of their tokens that 1 would hardly differ from greedy

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda family: make_tiny_model(family, tmp_path_factory.mktemp(family)))


def images(count: int) -> Any:
    return [np.asarray(scene.render(32)) for scene in make_scenes(count, seed=5)]


def caption(directory: Path, pixels: Any, batch_size: int = 16, **settings: Any) -> Captions:
    config = ModelConfig.model_validate({"name": str(directory), "max_new_tokens": LIMIT, **settings})
    ref = resolve(config)
    pixels = object_array(pixels) if ref.spec.variable_size else np.stack(pixels)
    return load(ref, device="cpu", batch_size=batch_size).caption(pixels)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_and_their_order_do_not_change_sampled_captions(family: str, model: Any) -> None:
    pixels = images(10)
    settings = WARM | {"num_captions": 3, "top_p": 0.95}

    single = caption(model(family), pixels, batch_size=1, **settings)
    batched = caption(model(family), pixels[::-1], batch_size=7, **settings)
    alone = caption(model(family), pixels, batch_size=4, **settings | {"num_captions": 1})

    assert [len(set(row)) for row in single.samples] == [3] * len(pixels)
    assert len({text for row in single.samples for text in row}) > 25
    assert list(batched.samples)[::-1] == list(single.samples)
    assert single.texts == [row[0] for row in single.samples] == alone.texts
    assert batched.num_tokens[::-1] == single.num_tokens
    np.testing.assert_allclose(batched.logprob_mean[::-1], single.logprob_mean, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_changes_captions_and_the_lowest_temperature_does_not(family: str, model: Any) -> None:
    pixels = images(8)
    greedy = caption(model(family), pixels)

    sampled = caption(model(family), pixels, **WARM)
    other = caption(model(family), pixels, **WARM | {"seed": 4})
    cold = caption(model(family), pixels, temperature=1e-12, seed=3)

    assert len(set(sampled.texts) | set(other.texts) | set(greedy.texts)) >= 20
    assert cold.texts == greedy.texts
    np.testing.assert_allclose(cold.logprob_mean, greedy.logprob_mean, atol=1e-3)
    assert not sampled.samples


def test_both_searches_of_git_draw_the_same_captions(model: Any, tmp_path: Path) -> None:
    fast = load(resolve(ModelConfig(name=str(model("git")), max_new_tokens=LIMIT, num_captions=2, **WARM)), "cpu", 5)
    pixels = np.stack(images(12))
    drawn = fast.caption(pixels)
    fast._fast = None  # the search of transformers

    assert fast.engine == "fast"
    assert fast.caption(pixels).samples == drawn.samples


def test_first_tokens_are_as_frequent_as_the_model_says(model: Any) -> None:
    temperature, count = 3.0, 100
    image = np.stack(images(1))
    settings = {"name": str(model("git")), "max_new_tokens": 1, "temperature": temperature, "num_captions": count}
    captioner = load(resolve(ModelConfig.model_validate(settings)), "cpu", 1)
    plain = AutoModelForImageTextToText.from_pretrained(model("git")).eval()
    values = captioner.normalise(torch.from_numpy(image))
    with torch.inference_mode():
        logits = plain(pixel_values=values, input_ids=torch.tensor([captioner.prefix])).logits[0, -1]
        numbers = np.concatenate([random_numbers(image, seed, count, 1) for seed in range(40)], axis=1)
        tokens = [captioner.search(values, torch.from_numpy(part))[0] for part in np.split(numbers, 40, axis=1)]
    expected = (logits.double() / temperature).softmax(-1).numpy() * numbers.size
    observed = np.bincount(torch.cat(tokens).flatten().numpy(), minlength=len(expected))

    often = expected >= 20
    deviations = (observed - expected)[often] / np.sqrt(expected[often])
    assert often.sum() >= 8
    assert np.mean(deviations**2) < 2
    assert abs(observed[~often].sum() - expected[~often].sum()) < 4 * np.sqrt(expected[~often].sum() + 1)


@given(
    st.lists(st.floats(-8, 8), min_size=2, max_size=12),
    st.floats(0.2, 3),
    st.floats(0.05, 1),
)
def test_numbers_spread_evenly_draw_each_token_in_its_share(
    logits: list[float], temperature: float, top_p: float
) -> None:
    count = 1000
    logprobs = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count

    drawn = Sampling(temperature, top_p, 1).draw(logprobs.expand(count, -1), numbers)

    shares = torch.bincount(drawn, minlength=len(logits)).double() / count
    probabilities = (logprobs / temperature).softmax(-1)
    kept = shares > 0
    mass = probabilities[kept].sum()
    assert torch.allclose(shares[kept], probabilities[kept] / mass, atol=0.003)
    assert mass > top_p - 0.02  # no less than top_p, except tokens too rare to be drawn
    assert mass - probabilities[kept].min() < top_p + 1e-6


def test_random_numbers_depend_on_the_pixels_the_seed_and_the_number_of_the_caption() -> None:
    first, second = images(2)
    seeds = {image_seed(image, seed, sample) for image in (first, second) for seed in (0, 1) for sample in (0, 1)}

    assert len(seeds) == 8
    assert image_seed(first.copy(), 1) == image_seed(first, 1)
    assert image_seed(first.reshape(16, 64, 3), 1) != image_seed(first, 1)
    numbers = random_numbers([first, second], 0, 3, 5)
    assert numbers.shape == (2, 3, 5)
    np.testing.assert_array_equal(random_numbers([second], 0, 1, 5)[0, 0], numbers[1, 0])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"temperature": 0.7, "num_beams": 3}, "--num-beams 3 and --temperature 0.7 exclude each other"),
        ({"top_p": 0.9}, "--top-p 0.9: has no effect without sampling; add --temperature"),
        ({"num_captions": 4}, "--num-captions 4: has no effect without sampling"),
        ({"seed": 7}, "--seed 7: has no effect without sampling"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        resolve(ModelConfig.model_validate({"name": "fake", **settings}))


def run(source: Path, out: Path, **model: Any) -> int:
    return pipeline.run(caption_config(source, out, model={"name": "fake", **model}))


def test_a_table_has_all_captions_of_an_image_and_copies_have_the_same(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 6)
    first = next((tmp_path / "images").glob("*.png"))
    (tmp_path / "images" / "copy.png").write_bytes(first.read_bytes())
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")

    assert run(tmp_path / "images", tmp_path / "out", temperature=1.0, num_captions=3) == 0

    rows = {row["image_id"]: row for row in rows_of(tmp_path / "out")}
    assert rows["broken.png"]["captions"] is None
    assert rows["copy.png"]["captions"] == rows[first.name]["captions"]
    good = [row for row in rows.values() if row["status"] == "ok"]
    assert all(len(set(row["captions"])) == 3 and row["caption"] == row["captions"][0] for row in good)


def test_a_table_is_bound_to_its_sampling(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 3)
    sampled, out = {"temperature": 1.0, "num_captions": 2}, tmp_path / "out"
    assert run(tmp_path / "images", out, **sampled) == 0
    assert run(tmp_path / "images", out, **sampled) == 0

    for change, reason in (
        ({"seed": 1}, "--seed 0 instead of 1"),
        ({"top_p": 0.5}, "--top-p 1.0 instead of 0.5"),
        ({"num_captions": 3}, "made with --num-captions 2, not 3"),
    ):
        with pytest.raises(FingerprintError, match=reason):
            run(tmp_path / "images", out, **sampled | change)
    assert run(tmp_path / "images", tmp_path / "greedy") == 0
    with pytest.raises(FingerprintError, match=r"--temperature 0\.0 instead of 1\.0"):
        run(tmp_path / "images", tmp_path / "greedy", temperature=1.0)
    assert "captions" not in rows_of(tmp_path / "greedy")[0]
