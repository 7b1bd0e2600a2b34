"""A GPU that fails for good stops the run; an error after which it still computes costs one image."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import caption_config, rows_of

from captioner import pipeline
from captioner.config import ModelConfig
from captioner.errors import OK, ModelError
from captioner.models import batch_size, devices, load, loading, resolve
from captioner.models.devices import gpu_failures
from captioner.models.dual_encoder import open_encoder, resolve_judge
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder, num_committed_chunks, with_failing_gpu
from captioner.testing.tiny_clip import make_tiny_clip

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MESSAGE = r"^the GPU of a worker on node \S+ failed \(cpu: CUDA error: an illegal memory access [^\n]+\); [^\n]+$"


def test_a_run_whose_gpu_fails_stops_without_failed_rows_and_resumes(tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    settings = {"name": "starter", "device": "cpu", "batch_size": 8}
    config = caption_config(make_folder(tmp_path / "images", 30), out, model=settings)
    with monkeypatch.context() as patched:
        patched.setattr(devices, "is_usable", lambda device: False)
        patched.setattr(pipeline, "load", lambda *args, **named: with_failing_gpu(load(*args, **named), after=2))
        with pytest.raises(ModelError, match=MESSAGE):
            pipeline.run(config)
    assert num_committed_chunks(out) == 1  # of 16 images

    assert pipeline.run(config) == OK
    assert {row["status"] for row in rows_of(out)} == {"ok"}
    assert verify(open_table(str(out))).proven


@pytest.mark.parametrize(
    ("owner", "name"), [(loading, "_load_weights"), (batch_size, "choose_batch_size")], ids=["weights", "batch sizes"]
)
def test_a_gpu_that_fails_before_the_first_batch_is_one_line(owner: ModuleType, name: str, monkeypatch) -> None:
    function = getattr(owner, name)

    def fail(*args: Any, **named: Any) -> None:
        function(*args, **named)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr(devices, "is_usable", lambda device: False)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(ModelError, match=MESSAGE):
        load(resolve(ModelConfig(name="starter")), "cpu")


def test_a_judge_whose_gpu_fails_while_it_takes_the_weights_is_one_line(tmp_path: Path, monkeypatch) -> None:
    def fail(model: torch.nn.Module, *args: Any, **named: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    ref = resolve_judge(str(make_tiny_clip(tmp_path / "clip")), None)
    monkeypatch.setattr(devices, "is_usable", lambda device: False)
    monkeypatch.setattr(torch.nn.Module, "to", fail)
    with pytest.raises(ModelError, match=MESSAGE):
        open_encoder(ref, "cpu")


def test_an_error_after_which_the_device_still_computes_stays_that_of_the_image() -> None:
    with pytest.raises(torch.AcceleratorError, match="invalid configuration"), gpu_failures([CPU], "cpu"):
        raise torch.AcceleratorError("CUDA error: invalid configuration argument")


def test_every_gpu_of_a_worker_is_asked(monkeypatch) -> None:
    first, second = (torch.device("cuda", index) for index in range(2))

    def synchronize(device: torch.device) -> None:
        if device == second:
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    error = RuntimeError("Triton Error [CUDA]: uncorrectable ECC error encountered")

    with pytest.raises(RuntimeError, match="Triton"), gpu_failures([first], "1 GPU"):
        raise error
    with pytest.raises(ModelError, match="2 GPUs: Triton Error"), gpu_failures([first, second], "2 GPUs"):
        raise error
