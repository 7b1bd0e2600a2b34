"""`--batch-size auto` measures increasing sizes, caches the result, and never exceeds the memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captioner.config import ModelConfig
from captioner.models import load, resolve
from captioner.models.batch_size import FIRST_SIZE, MIN_SPEEDUP, SIZES, TIME_LIMIT_S, choose_batch_size, fastest_size
from captioner.models.ref import ModelRef
from captioner.testing import SmallGpu


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "captioner" / "batch_sizes.json"


@pytest.fixture
def ref() -> ModelRef:
    return resolve(ModelConfig(name="starter"))


@pytest.mark.parametrize(
    ("room", "each", "expected"),
    [
        (10_000, 0.0, 512),  # larger sizes are faster
        (100, 0.0, 64),  # 128 do not fit
        (10_000, 1.0, 64),  # no further size is tried after so long
        (10_000, 0.01, 512),
        (40, 0.0, 32),  # 64 do not fit
        (3, 0.0, 16),  # halved later
    ],
)
def test_the_largest_size_that_fits_and_is_faster_is_chosen(ref, room, each, expected) -> None:
    gpu = SmallGpu(ref, room, each=each)

    choose_batch_size(gpu, 16, gpu.clock)

    assert gpu.batch_size == expected


@pytest.mark.parametrize("room", [10_000, 100, 40, 3])
def test_what_a_batch_took_that_did_not_fit_is_free_afterwards(ref, room) -> None:
    """For another worker on the same GPU."""
    gpu = SmallGpu(ref, room)

    choose_batch_size(gpu, 16, gpu.clock)

    assert gpu.reserved == 0


def test_the_result_is_cached_by_model_and_device(ref, cache) -> None:
    first, second, other = SmallGpu(ref, 100), SmallGpu(ref, 100), SmallGpu(ref, 40)
    other.device_name = "another GPU, 2 GiB"
    for gpu in (first, second, other):
        choose_batch_size(gpu, 16, gpu.clock)

    assert (first.batch_size, second.batch_size, other.batch_size) == (64, 64, 32)
    assert second.tried == []
    assert other.tried != []
    more_beams = SmallGpu(resolve(ModelConfig(name="starter", num_beams=3)), 100)
    choose_batch_size(more_beams, 16, more_beams.clock)
    assert more_beams.tried != []
    assert len(json.loads(cache.read_text())) == 3


@pytest.mark.parametrize("content", ["", "[]", '{"x": "many"}', '{"x": null}', "\x00"])
def test_a_damaged_cache_is_replaced(ref, cache, content) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    gpu = SmallGpu(ref, 100)

    choose_batch_size(gpu, 16, gpu.clock)

    assert gpu.batch_size == 64
    assert list(json.loads(cache.read_text()).values()) == [64]


def test_a_cache_that_cannot_be_written_is_no_error(ref, cache) -> None:
    cache.parent.write_text("a file where the directory should be")
    gpu = SmallGpu(ref, 100)

    choose_batch_size(gpu, 16, gpu.clock)

    assert gpu.batch_size == 64


@given(st.lists(st.floats(0.01, 100), min_size=len(SIZES), max_size=len(SIZES)), st.integers(0, len(SIZES)))
def test_the_chosen_size_fits_and_is_no_slower_than_smaller_ones(seconds, fitting) -> None:
    def time_of(size: int) -> float:
        if SIZES.index(size) >= fitting:
            raise torch.OutOfMemoryError("no memory")
        return seconds[SIZES.index(size)]

    chosen = SIZES.index(fastest_size(time_of))

    rates = [size / spent for size, spent in zip(SIZES, seconds, strict=True)]
    assert chosen < max(fitting, 1)
    start = SIZES.index(FIRST_SIZE)
    assert chosen >= min(start, max(fitting - 1, 0))
    assert all(rates[index + 1] >= MIN_SPEEDUP * rates[index] for index in range(start, chosen))


def test_the_user_is_notified_before_and_after(ref) -> None:
    gpu, lines = SmallGpu(ref, 100), list[tuple[str, int]]()

    for _ in range(2):
        choose_batch_size(gpu, 16, gpu.clock, lambda line: lines.append((line, len(gpu.tried))))

    (before, none_tried), (after, all_tried) = lines
    assert "trying out batch sizes on small GPU" in before
    assert none_tried == 0
    assert after == "batch size 64, tried out in 1.0 s"
    assert all_tried == len(gpu.tried)


def test_fast_batches_are_repeated_and_slow_ones_are_not(ref) -> None:
    fast, slow = SmallGpu(ref, 64, start=0.05), SmallGpu(ref, 64, start=3.0)
    for gpu in (fast, slow):
        gpu.device_name = f"GPU {id(gpu)}"
        choose_batch_size(gpu, 16, gpu.clock)

    assert fast.tried.count(64) == 3
    assert slow.tried.count(64) == 1


def test_measuring_ends_after_the_time_limit(ref) -> None:
    gpu = SmallGpu(ref, 10_000, start=0.9 * TIME_LIMIT_S)

    choose_batch_size(gpu, 16, gpu.clock)

    assert gpu.tried == [64, 128]
    assert gpu.batch_size == 128


def test_nothing_is_measured_on_a_cpu(ref, cache) -> None:
    assert load(ref, device="cpu").batch_size == 64  # a small model
    assert not cache.exists()
