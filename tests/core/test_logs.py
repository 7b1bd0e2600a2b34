"""`--log-format json`: lines become objects, the heartbeat's figures their keys."""

from __future__ import annotations

import io
import json

import pytest

from captioner.console.logs import JsonLines
from captioner.console.progress import Progress
from captioner.data import Receipt
from captioner.training.progress import TrainProgress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_heartbeat_carries_its_figures_as_keys() -> None:
    log, clock = io.StringIO(), Clock()
    with Progress(1_000, already=100, stream=JsonLines(log), clock=clock, interval=3600) as progress:
        assert progress.fields()["images_per_second"] is progress.fields()["running_wer"] is None
        for _ in range(3):
            clock.now += 2
            progress.update(Receipt("g", 100, 99, {"truncated": 1}, scored=[(1, 10), (3, 10)]), note="WER 0.200 of 6")

    (entry,) = map(json.loads, log.getvalue().splitlines())
    figures = {key: entry[key] for key in entry if key not in ("time", "level", "message")}
    assert entry["message"].startswith("captioned 400/1,000 (40%)")
    assert figures == {
        "event": "progress",
        "done": 400,
        "total": 1_000,
        "failed": 3,
        "images_per_second": 50.0,
        "eta_seconds": 12,
        "elapsed_seconds": 6.0,
        "running_wer": 0.2,
        "running_wer_rows": 6,
    }


@pytest.mark.parametrize("pieces", [["one\ntwo\n"], ["on", "e\nt", "wo", "\n"], ["\n", "one\n\n", "two\n"]])
def test_lines_are_objects_however_they_are_written(pieces: list[str]) -> None:
    log = io.StringIO()
    stream = JsonLines(log)
    for piece in pieces:
        stream.write(piece)

    assert [json.loads(line)["message"] for line in log.getvalue().splitlines()] == ["one", "two"]


def test_errors_are_told_from_the_rest() -> None:
    log = io.StringIO()
    JsonLines(log).write("captioner: error: no such file\ncaptioner: planned 3 images\n")

    entries = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [(entry["level"], entry["message"]) for entry in entries] == [
        ("error", "no such file"),
        ("info", "planned 3 images"),
    ]


def test_the_heartbeat_of_training_carries_its_figures_too() -> None:
    log = io.StringIO()
    figures = {"step": 30, "total": 100, "loss": 1.25, "wer": None, "samples_per_second": 8.0}
    with TrainProgress(stream=JsonLines(log)) as progress:
        progress.set_total(100, samples_per_step=4)
        progress.watch(lambda: figures)

    (entry,) = map(json.loads, log.getvalue().splitlines())
    assert entry["message"].startswith("step 30/100  loss 1.2500")
    assert {key: entry[key] for key in figures} == figures
