"""Host work overlaps with the device: batches are copied ahead, and captions are decoded meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.config import ModelConfig
from captioner.data import Captions
from captioner.models import load, resolve
from captioner.models.base import TransformersCaptioner
from captioner.models.uploads import Uploads
from captioner.starter.scenes import make_scenes
from captioner.testing import make_tiny_model

WAIT_S = 600  # seconds, for an event that must happen


class SlowCopy:
    """A copy that is made when it is waited for, or at its second query."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._source, self._target, self._queries, self._copied = source, target, 0, False
        self._lock = threading.Lock()  # two threads may wait for one copy

    def query(self) -> bool:
        self._queries += 1
        if self._queries > 1:
            self.synchronize()
        return self._copied

    def synchronize(self) -> None:
        with self._lock:
            if not self._copied:
                self._target.copy_(self._source)
                self._copied = True


class SlowStream:
    """Stands in for a CUDA copy stream; fails the test if a buffer changes before its copy has ended."""

    def __init__(self) -> None:
        self.allocated: list[int] = []

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self.allocated.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    def start(self, values: torch.Tensor) -> tuple[torch.Tensor, SlowCopy]:
        copied = torch.zeros_like(values)
        return copied, SlowCopy(values, copied)

    def wait(self, values: torch.Tensor, event: SlowCopy) -> None:
        event.synchronize()


def images(count: int) -> np.ndarray:
    pixels = np.arange(count * 12).astype(np.uint8).reshape(count, 2, 2, 3)
    pixels.flags.writeable = False  # as Arrow's memory is
    return pixels


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 25), st.booleans())
def test_every_image_arrives_once_and_in_order(counts, size, staged) -> None:
    uploads = Uploads(torch.device("cpu"), SlowStream() if staged else None)
    for count in counts:
        pixels = images(count)

        with uploads.batches(pixels, size) as arriving:
            batches = list(arriving)

        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        assert np.array_equal(torch.cat(batches).numpy(), pixels)


def test_buffers_are_reused() -> None:
    stream = SlowStream()
    uploads = Uploads(torch.device("cpu"), stream)

    for _ in range(10):
        with uploads.batches(images(40), 8) as arriving:
            assert len(list(arriving)) == 5

    assert len(stream.allocated) <= 3
    with uploads.batches(images(40), 16) as arriving:  # larger batches need larger buffers
        assert np.array_equal(torch.cat(list(arriving)).numpy(), images(40))


def test_the_first_batch_is_copied_before_it_is_requested() -> None:
    started = threading.Event()

    class Watched(SlowStream):
        def start(self, values: torch.Tensor) -> tuple[torch.Tensor, SlowCopy]:
            started.set()
            return super().start(values)

    with Uploads(torch.device("cpu"), Watched()).batches(images(8), 4) as arriving:
        assert started.wait(WAIT_S)
        assert len(list(arriving)) == 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_model("git", tmp_path_factory.mktemp("git"))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.stack([np.asarray(scene.render(32)) for scene in make_scenes(20, seed=5)])


@pytest.fixture
def captioner(directory) -> TransformersCaptioner:
    opened = load(resolve(ModelConfig(name=str(directory), max_new_tokens=8)), device="cpu", batch_size=5)
    assert isinstance(opened, TransformersCaptioner)
    return opened


def test_a_batch_is_decoded_while_the_next_is_searched(captioner, pixels, monkeypatch) -> None:
    expected = captioner.caption(pixels)
    decoded, searched = threading.Semaphore(0), iter(range(4))
    to_captions, search = captioner.to_captions, captioner.search

    def watched_to_captions(*result: torch.Tensor) -> Captions:
        decoded.release()
        return to_captions(*result)

    def waiting_search(values: torch.Tensor, *numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if next(searched) > 0:
            assert decoded.acquire(timeout=WAIT_S)
        return search(values, *numbers)

    monkeypatch.setattr(captioner, "to_captions", watched_to_captions)
    monkeypatch.setattr(captioner, "search", waiting_search)

    assert captioner.caption(pixels) == expected
    assert len(set(expected.texts)) > len(pixels) / 2


def test_concurrent_calls_give_the_results_of_separate_calls(captioner, pixels) -> None:
    halves = [pixels[:11], pixels[11:]]
    expected = [captioner.caption(half) for half in halves]
    captioner.uploads = Uploads(captioner.device, SlowStream())

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(captioner.caption, halves * 5))

    assert results == expected * 5


def test_a_call_uploads_while_another_is_searched(captioner, pixels, monkeypatch) -> None:
    uploading = threading.Semaphore(0)
    batches, search = captioner.uploads.batches, captioner.search

    def watched_batches(values: np.ndarray, size: int):
        uploading.release()
        return batches(values, size)

    def waiting_search(values: torch.Tensor, *numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(next(calls_to_wait_for, 0)):
            assert uploading.acquire(timeout=WAIT_S)
        return search(values, *numbers)

    calls_to_wait_for = iter([2])  # the first search waits for its own call and for the other
    expected = captioner.caption(pixels)
    monkeypatch.setattr(captioner.uploads, "batches", watched_batches)
    monkeypatch.setattr(captioner, "search", waiting_search)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(captioner.caption, [pixels, pixels])) == [expected, expected]


def test_an_error_in_a_batch_is_raised_and_the_next_call_succeeds(captioner, pixels, monkeypatch) -> None:
    expected = captioner.caption(pixels)
    search = captioner.search
    outcomes: Iterator[bool] = iter([True, True, False])

    def failing_search(values: torch.Tensor, *numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not next(outcomes, True):
            raise RuntimeError("CUDA error")
        return search(values, *numbers)

    monkeypatch.setattr(captioner, "search", failing_search)

    with pytest.raises(RuntimeError, match="CUDA error"):
        captioner.caption(pixels)
    assert captioner.caption(pixels) == expected
