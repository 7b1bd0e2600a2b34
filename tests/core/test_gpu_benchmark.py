"""`benchmarks/gpu.sh`: a step that fails or hangs never stops the next one, and the table has what was measured."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from benchmarks import gpu
from benchmarks.gpu import FORMS, STEPS, Setup, SkippedError, Step
from benchmarks.gpu_table import nvidia_smi, write_results


@pytest.fixture
def setup(tmp_path) -> Setup:
    options = argparse.Namespace(out=tmp_path, work=tmp_path, photos=None, peers=None, model=None, form="short")
    return Setup(options, FORMS["short"])


def run(setup: Setup, monkeypatch, code: str, limit: int = 60) -> dict:
    step = Step(limit, lambda _: [sys.executable, "-c", code])
    monkeypatch.setitem(STEPS, "step", step)
    return gpu.run_step("step", setup, time.monotonic() + 60)


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_the_figures_of_a_step_are_its_last_json_object(setup, monkeypatch) -> None:
    result = run(setup, monkeypatch, """print('{"a": 1}'); print('{"a": 2}'); print("{no")""")

    assert (result["status"], result["figures"]) == ("ok", {"a": 2})


def test_a_step_that_fails_keeps_its_figures_and_says_why(setup, monkeypatch) -> None:
    result = run(setup, monkeypatch, """print('{"equal": 0.5}', flush=True); raise SystemExit("half differ")""")

    assert (result["status"], result["message"], result["figures"]) == ("failed (1)", "half differ", {"equal": 0.5})


def test_a_step_that_hangs_ends_with_every_process_it_started(setup, monkeypatch, tmp_path) -> None:
    note, children = tmp_path / "pid", []
    os.mkfifo(note)
    code = (
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)"
    )

    def wait(process, _: float, original=gpu.wait) -> str:
        children.append(psutil.Process(int(note.read_text())))
        return original(process, 0)

    monkeypatch.setattr(gpu, "wait", wait)

    result = run(setup, monkeypatch, code)

    assert result["status"].startswith("cut off")
    while not has_ended(children[0]):  # SIGKILL is sent; the kernel takes its time
        time.sleep(0.01)


def test_without_time_left_a_step_is_named_and_not_started(setup, monkeypatch) -> None:
    monkeypatch.setitem(STEPS, "step", Step(60, lambda _: pytest.fail("started")))

    assert gpu.run_step("step", setup, time.monotonic() + 1) == {"status": "skipped", "message": "no time left"}


def test_a_peer_that_is_absent_is_a_line(setup) -> None:
    with pytest.raises(SkippedError, match=r"no ray_naive\.py in --peers"):
        gpu.ray_naive(setup)


@pytest.mark.parametrize(("cards", "step", "reason"), [(1, "two_gpus", "two GPUs"), (2, "quantized", "step families")])
def test_a_step_without_what_it_needs_is_skipped(setup, monkeypatch, cards: int, step: str, reason: str) -> None:
    monkeypatch.setattr(gpu, "nvidia_smi", lambda: ["H100"] * cards)

    with pytest.raises(SkippedError, match=f"needs .*{reason}"):
        STEPS[step].command(setup)


CARDS = """0, GPU-8a3b, NVIDIA H100 80GB HBM3, 570.1, 81559 MiB
1, GPU-9c4d, NVIDIA H100 80GB HBM3, 570.1, 81559 MiB"""


@pytest.mark.parametrize(
    ("text", "code", "visible", "count"),
    [
        (CARDS, 0, None, 2),
        (CARDS, 0, "1", 1),
        (CARDS, 0, "GPU-8a3b,GPU-9c4d", 2),
        (CARDS, 0, "", 0),
        (CARDS, 0, "-1", 0),
        (CARDS, 0, "MIG-7e5f", 1),
        ("NVIDIA-SMI has failed because it couldn't communicate with the driver.", 9, None, 0),
    ],
)
def test_cards_are_those_that_the_driver_names_and_this_process_sees(
    tmp_path, monkeypatch, text: str, code: int, visible: str | None, count: int
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert len(nvidia_smi()) == count


@pytest.mark.parametrize("form", FORMS)
def test_every_step_of_a_form_has_a_command(form, setup, monkeypatch, tmp_path) -> None:
    for script in ("hf_loader.py", "ray_naive.py"):
        (tmp_path / script).touch()
    setup.options.peers = tmp_path
    model = tmp_path / "families/qwen2_5_vl-published"
    model.mkdir(parents=True)
    (model / "config.json").touch()
    monkeypatch.setattr(gpu, "nvidia_smi", lambda: ["H100", "H100"])

    commands = [STEPS[name].command(replace(setup, form=FORMS[form])) for name in FORMS[form].steps]

    assert all(isinstance(word, str) for command in commands for word in command)


def test_the_table_has_ratios_between_steps_and_targets(setup) -> None:
    results = {
        "engine": {"status": "ok", "seconds": 1.0, "figures": {"greedy_images_per_second": 2000.0}},
        "job": {"status": "ok", "seconds": 2.0, "figures": {"images_per_second": 1000.0, "busy": {"device": 0.5}}},
        "kill": {"status": "failed (1)", "seconds": 3.0, "message": "2 captions differ"},
    }

    write_results(setup.options, {"card": "none"}, results)

    table = (Path(setup.options.out) / "gpu.md").read_text()
    assert "| job | of_engine | 0.5 | >= 0.9 |" in table
    assert "| job | busy: device | 0.5 |  |" in table
    assert "failed (1)" in table
    assert "2 captions differ" in table
    assert json.loads((Path(setup.options.out) / "gpu.json").read_text())["ratios"] == {"job": {"of_engine": 0.5}}
