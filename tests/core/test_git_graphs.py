"""The search with captured steps, tested with a stand-in for CUDA graphs on fixed memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captioner.config import ModelConfig
from captioner.models import load, resolve
from captioner.models.git import graphs
from captioner.starter.scenes import make_scenes


class FakeGraph:
    """Calls the step that was captured."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step, self.replays = step, 0

    def replay(self) -> None:
        self.replays += 1
        self.step()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.stack([np.asarray(scene.render(32)) for scene in make_scenes(59, seed=5)])


@pytest.fixture
def captured(monkeypatch) -> list[FakeGraph]:
    """Replace the capture of a step by one that calls it as often as the real one, and return the captures."""
    captures: list[FakeGraph] = []

    def capture(device: torch.device, begin: Callable[[], None], step: Callable[[], None]) -> FakeGraph:
        for _ in range(graphs.WARM_UP_STEPS):
            begin()
            step()
        captures.append(FakeGraph(step))
        return captures[-1]

    monkeypatch.setattr(graphs, "capture", capture)
    return captures


def open_captioner(directory: Path, num_beams: int, with_graphs: bool, **settings: Any):
    config = ModelConfig(**{"name": str(directory), "num_beams": num_beams, "max_new_tokens": 12} | settings)
    captioner = load(resolve(config), device="cpu", batch_size=16)
    captioner._fast.stepper.graphs = with_graphs
    return captioner


SAMPLED = {"temperature": 0.8, "num_captions": 3}


@pytest.mark.parametrize(("num_beams", "settings"), [(1, {}), (3, {}), (1, SAMPLED)])
def test_captured_steps_give_the_same_captions_every_time(tiny, pixels, captured, num_beams, settings) -> None:
    expected = open_captioner(tiny, num_beams, with_graphs=False, **settings).caption(pixels)
    captioner = open_captioner(tiny, num_beams, with_graphs=True, **settings)

    first, second = captioner.caption(pixels), captioner.caption(pixels)

    assert len(set(expected.texts)) > len(pixels) / 2
    assert first.texts == second.texts == expected.texts
    np.testing.assert_allclose(second.logprob_mean, expected.logprob_mean, atol=1e-5)
    assert any(graph.replays for graph in captured)


@pytest.mark.parametrize(("prompt", "limit"), [(None, 1), (None, 2), ("a red", 12)])
@pytest.mark.parametrize(("num_beams", "settings"), [(1, {}), (3, {}), (1, SAMPLED)])
def test_a_capture_stays_within_a_short_text_and_one_after_a_prompt(
    tiny, pixels, captured, prompt, limit, num_beams, settings
) -> None:
    settings = settings | {"prompt": prompt, "max_new_tokens": limit}
    expected = open_captioner(tiny, num_beams, with_graphs=False, **settings).caption(pixels[:32])

    captions = open_captioner(tiny, num_beams, with_graphs=True, **settings).caption(pixels[:32])

    assert captured
    assert (captions.texts, captions.samples) == (expected.texts, expected.samples)


def test_only_searches_for_full_batches_and_their_halves_are_cached(tiny, pixels, captured) -> None:
    captioner = open_captioner(tiny, 1, with_graphs=True)

    for count in (59, 45, 39, 30):  # the last batches are of 11, 13, 7 and 14 images
        captioner.caption(pixels[:count])

    sizes = set(captioner._fast.stepper._cache)
    assert 16 in sizes
    assert sizes <= {16, 8, 4, 2, 1}


def test_where_steps_cannot_be_captured_the_search_continues_without(tiny, pixels, monkeypatch) -> None:
    def refuse(device: torch.device, begin: Callable[[], None], step: Callable[[], None]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", refuse)
    expected = open_captioner(tiny, 3, with_graphs=False).caption(pixels)
    captioner = open_captioner(tiny, 3, with_graphs=True)

    assert captioner.caption(pixels).texts == expected.texts
    assert not captioner._fast.stepper.graphs


def test_a_batch_is_halved_where_the_memory_is_too_small_for_a_capture(tiny, pixels, captured, monkeypatch) -> None:
    capture = graphs.Stepper._capture

    def capture_small(stepper: graphs.Stepper, cached: graphs._CachedSearch) -> None:
        if len(cached.search.state.tokens) > 8:
            raise torch.OutOfMemoryError("out of memory")
        capture(stepper, cached)

    monkeypatch.setattr(graphs.Stepper, "_capture", capture_small)
    expected = open_captioner(tiny, 1, with_graphs=False).caption(pixels)
    captioner = open_captioner(tiny, 1, with_graphs=True)

    assert captioner.caption(pixels).texts == expected.texts
    assert captioner.batch_size == 8
    assert captioner._fast.stepper.graphs
