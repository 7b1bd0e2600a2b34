"""The search over captured steps, with a stand-in for CUDA graphs: fixed memory, overwritten at every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from captioner.config import ModelConfig
from captioner.models import load, resolve
from captioner.models.git_fast import graphs
from captioner.models.git_fast.network import GitNetwork, State
from captioner.starter.scenes import make_scenes
from captioner.testing import make_tiny_model


class Replayed:
    """Steps through one state, and writes to one place."""

    def __init__(self, network: GitNetwork, state: State, logits: torch.Tensor) -> None:
        self.network, self.state, self.logits, self.replays = network, state, logits, 0

    def replay(self) -> None:
        self.replays += 1
        self.logits.copy_(self.network.step(self.state))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model("git", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.stack([np.asarray(scene.render(32)) for scene in make_scenes(59, seed=5)])


@pytest.fixture
def captured(monkeypatch) -> list[Replayed]:
    """Every capture of a step, as a real one steps through the state on its way."""
    made: list[Replayed] = []

    def capture(network: GitNetwork, state: State) -> tuple[Replayed, torch.Tensor]:
        logits = network.step(state)
        made.append(Replayed(network, state, logits))
        return made[-1], logits

    monkeypatch.setattr(graphs, "capture_step", capture)
    return made


def opened(directory: Path, num_beams: int, with_graphs: bool):
    config = ModelConfig(name=str(directory), num_beams=num_beams, max_new_tokens=12)
    captioner = load(resolve(config), device="cpu", batch_size=16)
    captioner._fast.stepper.graphs = with_graphs
    return captioner


@pytest.mark.parametrize("num_beams", [1, 3])
def test_captured_steps_give_the_same_captions_again_and_again(tiny, pixels, captured, num_beams) -> None:
    expected = opened(tiny, num_beams, with_graphs=False).caption(pixels)
    captioner = opened(tiny, num_beams, with_graphs=True)

    first, second = captioner.caption(pixels), captioner.caption(pixels)

    assert len(set(expected.texts)) > len(pixels) / 2
    assert first.texts == second.texts == expected.texts
    np.testing.assert_allclose(second.logprob_mean, expected.logprob_mean, atol=1e-5)
    assert any(graph.replays for graph in captured)


def test_only_full_batches_and_their_halves_are_kept(tiny, pixels, captured) -> None:
    captioner = opened(tiny, 1, with_graphs=True)

    for count in (59, 45, 39, 30):  # the last batches are of 11, 13, 7 and 14 pictures
        captioner.caption(pixels[:count])

    sizes = {pictures for pictures, _, _ in captioner._fast.stepper._kept}
    assert 16 in sizes
    assert sizes <= {16, 8, 4, 2, 1}


def test_where_steps_cannot_be_captured_the_search_goes_on_without(tiny, pixels, monkeypatch) -> None:
    def refuse(network: GitNetwork, state: State) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture_step", refuse)
    expected = opened(tiny, 3, with_graphs=False).caption(pixels)
    captioner = opened(tiny, 3, with_graphs=True)

    assert captioner.caption(pixels).texts == expected.texts
    assert not captioner._fast.stepper.graphs


def test_no_memory_for_a_capture_halves_the_batch(tiny, pixels, captured, monkeypatch) -> None:
    capture = graphs.capture_step

    def capture_small(network: GitNetwork, state: State) -> tuple[Replayed, torch.Tensor]:
        if len(state.tokens) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return capture(network, state)

    monkeypatch.setattr(graphs, "capture_step", capture_small)
    expected = opened(tiny, 1, with_graphs=False).caption(pixels)
    captioner = opened(tiny, 1, with_graphs=True)

    assert captioner.caption(pixels).texts == expected.texts
    assert captioner.batch_size == 8
    assert captioner._fast.stepper.graphs
