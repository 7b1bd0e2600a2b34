"""The summary names what a run waited for, and the flag to turn; memory that runs out halves the batch."""

from __future__ import annotations

import io
import threading

import numpy as np
import pyarrow as pa
import pytest
import torch

from captioner.config import ModelConfig
from captioner.console.summary import print_summary
from captioner.data import RawImage
from captioner.models import load, resolve
from captioner.run.bottleneck import bottleneck_line, busy_shares
from captioner.sources.reading import concurrency, read_all, reads_at_once
from captioner.sources.root import Root
from captioner.starter.scenes import make_scenes
from captioner.testing import make_tiny_model

SLOTS = {"decode": 2, "device": 1, "write": 1}


@pytest.mark.parametrize(
    ("seconds", "slowest", "flag"),
    [
        ({"read": 1, "decode": 17, "generate": 4, "commit": 0}, "decode", "--decode-cpus"),
        ({"read": 17, "decode": 1, "generate": 4, "commit": 0}, "decode", "--read-concurrency"),
        ({"read": 1, "decode": 7, "generate": 9, "commit": 0}, "device", "--num-workers"),
        ({"read": 1, "decode": 1, "generate": 2, "commit": 8}, "write", "OUT"),
    ],
)
def test_the_busiest_is_the_bottleneck(seconds, slowest, flag) -> None:
    shares = busy_shares(seconds, SLOTS, wall=10)

    line = bottleneck_line(shares, seconds)

    assert line is not None
    assert f"bottleneck: {slowest};" in line
    assert flag in line
    assert shares["device"] == seconds["generate"] / 10
    stream = io.StringIO()
    print_summary({"busy": shares, "seconds": {**seconds, "run": 10.0}}, stream)
    assert line in stream.getvalue()


def test_where_decoding_is_the_limit_it_says_with_how_many_cpus_it_would_not_be() -> None:
    """Two CPUs took 18 seconds in all to decode what a device captioned in 4: five of them would take less."""
    seconds, stream = {"read": 1, "decode": 17, "generate": 4, "commit": 0}, io.StringIO()
    shares = busy_shares(seconds, SLOTS, wall=10)

    print_summary({"busy": shares, "seconds": {**seconds, "run": 10.0}, "slots": SLOTS}, stream)

    assert "raise --decode-cpus (with 5 CPUs instead of 2 decoding is not the bottleneck)" in stream.getvalue()
    enough = SLOTS | {"decode": 5}
    assert max(busy_shares(seconds, enough, wall=4), key=busy_shares(seconds, enough, wall=4).get) == "device"


def test_a_run_that_was_mostly_start_up_gets_no_advice_about_its_stages() -> None:
    seconds = {"read": 0.1, "decode": 2, "generate": 0.5, "commit": 0.1, "run": 14.0, "startup": 12.0}
    line = bottleneck_line(busy_shares(seconds, SLOTS, wall=2), seconds)

    assert line is not None
    assert line.endswith("most of the 14 s was start-up (12 s), the same for any number of images")
    assert "--decode-cpus" not in line


def test_nothing_measured_says_nothing() -> None:
    assert busy_shares({"read": 0, "decode": 0, "generate": 0, "commit": 0}, SLOTS, wall=0) == {}
    assert bottleneck_line({}, {}) is None


def test_so_many_reads_are_under_way_as_were_asked_for() -> None:
    together = threading.Barrier(5, timeout=120)

    def read() -> RawImage:
        together.wait()  # passes only if five reads are in it at once
        return RawImage("a", "a", b"x")

    with reads_at_once(5):
        assert len(read_all([read] * 10, Root("/"))) == 10


def test_a_store_can_be_asked_so_many_times_at_once() -> None:
    """pyarrow's clients of stores open as many connections as it has threads for input and output."""
    with reads_at_once(pa.io_thread_count() + 3):
        assert pa.io_thread_count() == concurrency()


def test_a_batch_that_does_not_fit_is_halved_and_no_row_is_lost(tmp_path, monkeypatch) -> None:
    pixels = np.stack([np.asarray(scene.render(32)) for scene in make_scenes(23, seed=5)])
    ref = resolve(ModelConfig(name=str(make_tiny_model("git", tmp_path)), max_new_tokens=8))
    expected = load(ref, device="cpu", batch_size=23).caption(pixels)
    captioner = load(ref, device="cpu", batch_size=16)
    search = captioner.search

    def search_in_little_memory(values, *numbers):
        if len(values) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return search(values, *numbers)

    monkeypatch.setattr(captioner, "search", search_in_little_memory)

    captions = captioner.caption(pixels)

    assert (captions.texts, captions.num_tokens) == (expected.texts, expected.num_tokens)
    assert captioner.batch_size == 4
