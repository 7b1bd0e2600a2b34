"""Shared by the tests of one process."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Self

import pytest

from captioner import steps
from captioner.data import PixelSpec
from captioner.imaging import decode, squeeze
from captioner.report import page_images
from captioner.store.lease import Lease
from captioner.testing import make_folder, make_tiny_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 images with captions, to train on."""
    return make_folder(tmp_path_factory.mktemp("data"), 30, seed=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GIT model directory with random weights."""
    return make_tiny_model("git", tmp_path_factory.mktemp("tiny"))


class DecoderHere:
    """Stands for the guarded decoder where a test makes dozens of runs: a child for each would take minutes."""

    def __init__(self, spec: PixelSpec | int, max_pixels: int, timeout: float) -> None:
        is_side = isinstance(spec, int)
        self.decode = partial(squeeze, side=spec) if is_side else partial(decode, spec=spec)
        self.max_pixels = max_pixels

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> None:
        pass

    def __call__(self, images: Iterable[bytes]):
        return (self.decode(data, max_pixels=self.max_pixels) for data in images)


@pytest.fixture
def decoding_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (steps, page_images):
        monkeypatch.setattr(module, "GuardedDecoder", DecoderHere)


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table on an object store need not wait for others that start in the same second."""
    monkeypatch.setattr(Lease, "sleep", lambda self, seconds: None)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny models: threads would wait for each other more than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
