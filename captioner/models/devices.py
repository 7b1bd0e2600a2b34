"""Choose the device torch computes on. torch is imported when a function that needs it is called."""

from __future__ import annotations

import os
import platform
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.console.text import counted
from captioner.errors import ModelError

if TYPE_CHECKING:
    import torch

GPUS = ("cuda", "xpu")  # kinds of devices of which a machine may have several
# The name of the build of torch that each kind of device needs.
BUILDS = {"cuda": "CUDA", "xpu": "XPU", "mps": "MPS"}


def pick_device(name: str = "auto", has_gpu: bool | None = None, node: str = "") -> torch.device:
    """Return the device that `name` (a value of --device, or a device with an index) means in this process.

    "auto" is the accelerator that torch can use, else the CPU where no GPU was reserved. `has_gpu`: whether a GPU was
    reserved for this process; None: whether CUDA_VISIBLE_DEVICES names one. `node`: the name of this machine in errors.
    Raises ModelError where the device, or the GPU that was reserved, cannot be used.
    """
    set_wait_policy()
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None:
            return accelerator
        reserved = os.environ.get("CUDA_VISIBLE_DEVICES", "") not in ("", "-1") if has_gpu is None else has_gpu
        if not reserved:
            return torch.device("cpu")
    try:
        device = torch.device("cuda" if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise _unusable(name, f"torch {torch.__version__}: {reason}", node) from None
    return device


def pick_devices(device: torch.device, num_gpus: int) -> list[torch.device]:
    """Return the devices that share a model's weights: `num_gpus` GPUs from `device` on, or a CPU alone.

    Raises ModelError where this process does not see as many.
    """
    if num_gpus == 1 or device.type not in GPUS:
        return [device]
    import torch

    first, visible = device.index or 0, torch.get_device_module(device).device_count()
    if first + num_gpus > visible:
        raise ModelError(
            f"--gpus-per-worker {num_gpus}: a worker on node {platform.node()} sees {counted(visible, 'GPU')}; give"
            " that number or a lower one"
        )
    return [torch.device(device.type, first + number) for number in range(num_gpus)]


def device_name(devices: Sequence[torch.device]) -> str:
    """Return "cpu", "mps", or a GPU's name and memory, with the number of GPUs where there are several."""
    import torch

    kind = devices[0].type
    if kind not in GPUS:
        return kind
    properties = torch.get_device_module(kind).get_device_properties(devices[0])
    several = f"{len(devices)} x " if len(devices) > 1 else ""
    return f"{several}{properties.name}, {properties.total_memory >> 30} GiB"


@contextmanager
def gpu_failures(devices: Sequence[torch.device], name: str) -> Iterator[None]:
    """Raise ModelError where an error leaves `devices`, called `name`, unusable; raise any other error as it is.

    After a fault of the hardware or an illegal access, every later call of CUDA in this process fails: the error is not
    that of one image. Its class does not tell: Triton and cuBLAS raise a plain RuntimeError for the same.
    """
    try:
        yield
    except RuntimeError as error:
        if all(map(is_usable, devices)):
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ModelError(
            f"the GPU of a worker on node {platform.node()} failed ({name}: {reason}); run the same command again, "
            "without that GPU if it fails again"
        ) from error


def is_usable(device: torch.device) -> bool:
    """Return whether a device still computes, after an error."""
    import torch

    if device.type == "cpu":
        return True
    try:
        torch.accelerator.synchronize(device)
    except RuntimeError:
        return False
    return True


def set_wait_policy() -> None:
    """Let torch's threads sleep while they wait for each other. Has no effect once torch is imported.

    Where other work such as decoding shares the CPUs, spinning made captioning up to a hundred times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def check_build(name: str, node: str = "") -> None:
    """Raise ModelError where torch was built for CPUs only and `name` asks for, or may mean, a GPU.

    Reads one small file of torch, which is not imported.
    """
    version = cpu_only_build()
    if version and name != "cpu":
        build = BUILDS.get(name, "CUDA")
        raise _unusable(name, f"torch {version} has no {build}", node)


def cpu_only_build() -> str:
    """Return the version of the installed torch where it was built without any GPU, else ""."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if sys.platform == "darwin" or file is None or not file.is_file():  # on a Mac every build has MPS
        return ""
    build = runpy.run_path(str(file))
    return "" if any(build.get(name) for name in ("cuda", "hip", "xpu")) else str(build["__version__"])


def auto_dtype(device: str) -> str:
    """Return the dtype that --dtype auto means on a kind of device.

    On CUDA bfloat16 was measured to take half the memory and to be several times as fast. mps and xpu were not
    measured, and use float32, which gives the same results on every device.
    """
    return "bfloat16" if device == "cuda" else "float32"


def _unusable(name: str, reason: str, node: str) -> ModelError:
    device = "the GPU that was reserved" if name == "auto" else f"--device {name}"
    build = BUILDS.get(name.split(":")[0], "CUDA")
    return ModelError(
        f"{device} cannot be used on node {node or platform.node()} ({reason}); install torch with {build} there, "
        "or give --device cpu"
    )
