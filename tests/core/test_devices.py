"""Which device is taken, and what is said where it cannot be."""

from __future__ import annotations

import pickle
import platform
from dataclasses import replace

import pytest
import torch

from captioner.config import ModelConfig
from captioner.errors import ModelError
from captioner.models import devices, resolve, resolve_dtype
from captioner.models.devices import auto_dtype, check_build, cpu_only_build, pick_device
from captioner.models.placement import check_fits
from captioner.training.record import UNBOUND_SETTINGS


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch):
    """Sets what torch finds on this machine: a name, or None."""

    def set_to(name: str | None) -> None:
        device = None if name is None else torch.device(name)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: device)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return set_to


@pytest.mark.parametrize(("name", "device"), [("cuda", "cuda"), ("mps", "mps"), ("xpu", "xpu"), (None, "cpu")])
def test_auto_is_the_accelerator_that_torch_has(accelerator, name: str | None, device: str) -> None:
    accelerator(name)

    assert pick_device("auto").type == device
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(("visible", "reserved"), [("0", True), ("GPU-8a3b", True), ("", False), ("-1", False)])
def test_cuda_visible_devices_reserves_a_gpu(
    accelerator, monkeypatch: pytest.MonkeyPatch, visible: str, reserved: bool
) -> None:
    accelerator(None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch, "empty", _no_driver)

    if reserved:
        with pytest.raises(ModelError, match="the GPU that was reserved cannot be used"):
            pick_device("auto")
        assert pick_device("auto", has_gpu=False).type == "cpu"
    else:
        assert pick_device("auto").type == "cpu"
        with pytest.raises(ModelError, match="the GPU that was reserved cannot be used"):
            pick_device("auto", has_gpu=True)


def _no_driver(*_: object, **__: object) -> None:
    raise RuntimeError("Found no NVIDIA driver on your system. Please check.\nSecond line.")


def test_the_error_is_one_line_with_node_reason_and_both_ways_out(accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator(None)
    monkeypatch.setattr(torch, "empty", _no_driver)

    with pytest.raises(ModelError) as fault:
        pick_device("auto", has_gpu=True, node="10.0.0.7")
    assert str(fault.value) == (
        f"the GPU that was reserved cannot be used on node 10.0.0.7 (torch {torch.__version__}: Found no NVIDIA driver"
        " on your system. Please check); install torch with CUDA there, or give --device cpu"
    )
    assert pickle.loads(pickle.dumps(fault.value)).args == fault.value.args
    with pytest.raises(ModelError, match=rf"--device xpu cannot be used on node {platform.node()} .* torch with XPU"):
        pick_device("xpu")


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("auto", "2.13.0+cpu", r"the GPU that was reserved cannot be used on node n \(torch 2.13.0\+cpu has no CUDA\)"),
        ("cuda", "2.13.0+cpu", r"--device cuda cannot be used on node n \(torch 2.13.0\+cpu has no CUDA\)"),
        ("xpu", "2.13.0+cpu", r"--device xpu cannot be used on node n \(torch 2.13.0\+cpu has no XPU\)"),
        ("cpu", "2.13.0+cpu", None),
        ("auto", "", None),
    ],
)
def test_a_build_for_cpus_is_told_without_importing_torch(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str, message: str | None
) -> None:
    monkeypatch.setattr(devices, "cpu_only_build", lambda: version)

    if message is None:
        check_build(name, "n")
    else:
        with pytest.raises(ModelError, match=message):
            check_build(name, "n")


def test_the_installed_build_is_read_as_torch_itself_tells_it() -> None:
    has_gpu = torch.version.cuda or torch.version.hip or torch.version.xpu

    assert cpu_only_build() == ("" if has_gpu else torch.__version__)


def test_auto_dtype_is_bfloat16_with_cuda_alone_and_a_dtype_that_was_given_stays() -> None:
    ref = resolve(ModelConfig(name="fake"))

    assert [auto_dtype(device) for device in ("cuda", "cpu", "mps", "xpu")] == ["bfloat16", *["float32"] * 3]
    assert resolve_dtype(ref, "auto", "cuda").dtype == "bfloat16"
    assert resolve_dtype(ref, "float16", "cuda").dtype == "float16"


def test_a_model_that_does_not_fit_says_how_much_is_missing_and_what_would() -> None:
    starter = resolve(ModelConfig(name="starter"))  # 1.3 million parameters
    check_fits(replace(starter, dtype="float32"), [9_000_000], "a GPU")

    with pytest.raises(ModelError, match=r"a GPU has 0.0 GB free; give --dtype bfloat16 \(0.0 GB\), a smaller model"):
        check_fits(replace(starter, dtype="float32"), [5_000_000], "a GPU")
    with pytest.raises(ModelError, match=r"give a smaller model .* or a GPU with more memory"):
        check_fits(replace(starter, dtype="bfloat16"), [2_000_000], "a GPU")


def test_a_training_run_may_go_on_on_another_device() -> None:
    assert "device" in UNBOUND_SETTINGS["model"]
