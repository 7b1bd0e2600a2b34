"""From a ModelRef to a captioner. torch and transformers are imported here, when called."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from captioner.data import Captioner
from captioner.models.devices import auto_dtype, pick_device, set_wait_policy
from captioner.models.fake import FakeCaptioner
from captioner.models.ref import ModelRef
from captioner.models.resolving import ensure_local

if TYPE_CHECKING:
    from captioner.models.base import TransformersCaptioner

# Below this, one operation takes less time than waking the threads that would share it: one thread captions faster
# than four on an idle machine, and many times faster on a busy one.
SMALL_MODEL_BYTES = 20_000_000
_CHAT = "chat", "ChatCaptioner"
CLASSES = {
    "git": ("git", "GitCaptioner"),
    "blip": ("blip", "BlipCaptioner"),
    "blip-2": ("blip2", "Blip2Captioner"),
    "vision-encoder-decoder": ("vision_encoder_decoder", "VisionEncoderDecoderCaptioner"),
    "florence2": ("florence2", "Florence2Captioner"),
    "idefics3": _CHAT,
    "smolvlm": _CHAT,
    "qwen2_vl": _CHAT,
    "qwen2_5_vl": _CHAT,
}


def load(
    ref: ModelRef,
    device: str = "auto",
    batch_size: int | Literal["auto"] = "auto",
    num_threads: int | None = None,
    notify: Callable[[str], None] | None = None,
) -> Captioner:
    """The captioner of `ref`, its weights on `device` (see `captioner.models.devices.pick_device`).

    `batch_size`: pictures for each forward pass; "auto" tries out on a GPU what is fastest. `num_threads`: CPU threads
    of torch, where the environment's OMP_NUM_THREADS is not what is wanted; a small model gets one. `notify`: called
    with a line about what takes long. A model that is not on this machine is fetched again; one whose weights are no
    longer those of `ref` is refused. Raises ModelError where the model or the device cannot be used.
    """
    if ref.family == "fake":
        return FakeCaptioner(prompt=ref.prompt)
    notify, started = notify or (lambda line: None), time.perf_counter()
    with ThreadPoolExecutor(2) as threads:
        here = threads.submit(ensure_local, ref)  # which hashes the weights
        torch_device = pick_device(device)
        import torch

        threads.submit(lambda: torch.empty(1, device=torch_device))  # a GPU takes a second to start
        family = _import_family(ref.family)
        ref = here.result()
    imported = time.perf_counter()
    notify(f"torch and transformers imported in {imported - started:.1f} s")
    from captioner.models.batch_size import CPU_SIZE, SMALL_CPU_SIZE, choose_batch_size

    if torch_device.type == "cpu" and is_small(ref):
        num_threads = 1
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    captioner = family(ref, torch_device, 1 if batch_size == "auto" else batch_size)
    notify(f"weights on {captioner.device_name} in {time.perf_counter() - imported:.1f} s")
    if batch_size == "auto":
        choose_batch_size(captioner, SMALL_CPU_SIZE if is_small(ref) else CPU_SIZE, notify=notify)
    return captioner


def resolve_dtype(ref: ModelRef, dtype: str, device: str) -> ModelRef:
    """Return `ref` in the dtype that a value of --dtype stands for on a kind of device."""
    return replace(ref, dtype=auto_dtype(device) if dtype == "auto" else dtype)


def is_small(ref: ModelRef) -> bool:
    """Whether a model captions on one thread of a CPU."""
    return weights_bytes(ref) <= SMALL_MODEL_BYTES


def weights_bytes(ref: ModelRef) -> int:
    """Size of the safetensors files of a model that is on this machine; 0 for the fake."""
    return sum(file.stat().st_size for file in Path(ref.path).glob("*.safetensors")) if ref.path else 0


def _import_family(family: str) -> type[TransformersCaptioner]:
    """The class of a family. Its module is imported when called: each imports its own part of transformers."""
    set_wait_policy()
    module, name = CLASSES[family]
    found: type[TransformersCaptioner] = getattr(import_module(f"captioner.models.{module}"), name)
    return found
