"""From a ModelRef to a captioner. torch and transformers are imported when `load` is called."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from captioner.console.phases import phase
from captioner.data import Captioner
from captioner.models.devices import (
    GPUS,
    auto_dtype,
    device_name,
    gpu_failures,
    pick_device,
    pick_devices,
    set_wait_policy,
)
from captioner.models.endpoint.api_key import ApiKey
from captioner.models.fake import FakeCaptioner
from captioner.models.placement import USABLE, check_fits, weights_in_memory
from captioner.models.ref import ModelRef
from captioner.models.resolving import ensure_local
from captioner.models.weights import weight_files

if TYPE_CHECKING:
    import torch

    from captioner.models.base import TransformersCaptioner

# Below this, an operation takes less time than waking the threads that would share it: one thread captions faster than
# four on an idle machine, and many times faster on a busy one.
SMALL_MODEL_BYTES = 20_000_000
CHAT_CLASS = "chat", "ChatCaptioner"
CLASSES = {  # of the families that are not CHAT_CLASS
    "git": ("git", "GitCaptioner"),
    "blip": ("blip", "BlipCaptioner"),
    "blip-2": ("blip2", "Blip2Captioner"),
    "vision-encoder-decoder": ("vision_encoder_decoder", "VisionEncoderDecoderCaptioner"),
    "florence2": ("florence2", "Florence2Captioner"),
    "paligemma": ("chat", "PrefixCaptioner"),
}

Notify = Callable[[str], None]


def load(
    ref: ModelRef,
    device: str = "auto",
    batch_size: int | Literal["auto"] = "auto",
    num_threads: int | None = None,
    notify: Notify | None = None,
    api_key: ApiKey | None = None,
    num_gpus: int = 1,
) -> Captioner:
    """Return the captioner of `ref` with its weights on `device` (see `captioner.models.devices.pick_device`).

    `batch_size`: images in a forward pass; "auto" measures on a GPU which is fastest. `num_threads`: CPU threads of
    torch, None for its default; a small model gets one. `notify`: called with a line about each step that takes long.
    `api_key`: of the model servers; None for that of the environment. `num_gpus`: that share the weights. A model that
    is not on this machine is downloaded again. Raises ModelError where the model or the device cannot be used, or where
    the weights differ from those of `ref`.
    """
    notify = notify or (lambda line: None)
    if ref.family == "fake":
        return FakeCaptioner(
            num_captions=ref.num_captions, seed=ref.seed if ref.temperature else None, questions=ref.questions
        )
    if ref.endpoint:
        from captioner.models.endpoint.captioning import EndpointCaptioner

        return EndpointCaptioner(ref, api_key or ApiKey.from_environment(), notify)
    size = 1 if batch_size == "auto" else batch_size
    ref, devices = _import_and_verify(ref, device, num_gpus, notify)
    num_threads = 1 if devices[0].type == "cpu" and is_small(ref) else num_threads
    with gpu_failures(devices, device_name(devices)):
        free = _free_memory(ref, devices, size)
        captioner = _load_weights(ref, devices, size, free, num_threads, notify)
        if batch_size == "auto":
            from captioner.models.batch_size import CPU_SIZE, SMALL_CPU_SIZE, choose_batch_size

            choose_batch_size(captioner, SMALL_CPU_SIZE if is_small(ref) else CPU_SIZE, notify=notify)
    return captioner


def _import_and_verify(
    ref: ModelRef, device: str, num_gpus: int, notify: Notify
) -> tuple[ModelRef, list[torch.device]]:
    """Import torch and the module of the family while the weights are hashed.

    Returns the model on this machine and the devices that share its weights.
    """
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as threads:
        local_ref = threads.submit(ensure_local, ref)  # hashes the weights
        with phase("importing torch and transformers", notify):
            devices = pick_devices(pick_device(device), num_gpus)
            import torch

            threads.submit(lambda: torch.empty(1, device=devices[0]))  # a GPU takes a second to start
            import_family(ref.family)
        with phase(f"reading the files of model {ref.name}", notify):
            ref = local_ref.result()
    notify(f"torch and transformers imported in {time.perf_counter() - started:.1f} s")
    return ref, devices


def _free_memory(ref: ModelRef, devices: list[torch.device], batch_size: int) -> dict[int | str, int]:
    """Return the free bytes of each GPU by its index; none of a CPU. Raises ModelError where the model does not fit."""
    if devices[0].type not in GPUS:
        return {}
    import torch

    backend = torch.get_device_module(devices[0])
    free: dict[int | str, int] = {device.index or 0: backend.mem_get_info(device)[0] for device in devices}
    check_fits(ref, list(free.values()), backend.get_device_name(devices[0]), batch_size)
    return free


def _load_weights(
    ref: ModelRef,
    devices: list[torch.device],
    batch_size: int,
    free: dict[int | str, int],
    num_threads: int | None,
    notify: Notify,
) -> TransformersCaptioner:
    """Return the captioner with its weights on the devices. `free`: bytes of each GPU by its index."""
    import torch

    from captioner.models.packed import pack_linears, replace_quick_gelus

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    started, family = time.perf_counter(), import_family(ref.family)
    with phase("loading weights", notify):
        if len(devices) > 1:
            usable = {index: int(USABLE * num_bytes) for index, num_bytes in free.items()}
            captioner = family(ref, devices[0], batch_size, usable)
        else:
            captioner = family(ref, devices[0], batch_size)
        # Here, because these layers cannot be trained.
        pack_linears(captioner.model)
        if captioner.device.type == "cpu":
            replace_quick_gelus(captioner.model)
    notify(f"weights on {captioner.device_name} in {time.perf_counter() - started:.1f} s")
    if ref.quantize:
        notify(_quantized_size(captioner.weights_bytes, ref))
    return captioner


def resolve_dtype(ref: ModelRef, dtype: str, device: str) -> ModelRef:
    """Return `ref` with the dtype that a value of --dtype means on a kind of device."""
    if ref.endpoint:
        return ref
    return replace(ref, dtype=auto_dtype(device) if dtype == "auto" else dtype)


def is_small(ref: ModelRef) -> bool:
    """Return whether a model captions on one thread of a CPU."""
    return weights_bytes(ref) <= SMALL_MODEL_BYTES


def weights_bytes(ref: ModelRef) -> int:
    """Return the size of the weights files of a model on this machine; 0 for the fake, and where they are gone."""
    if not (ref.path and Path(ref.path).is_dir()):
        return 0
    return sum(file.stat().st_size for file in weight_files(Path(ref.path)))


def _quantized_size(size: int, ref: ModelRef) -> str:
    sizes = size, weights_in_memory(replace(ref, quantize=None))
    now, before = (f"{each / 1e9:.2f} GB" if each >= 1e7 else f"{each / 1e3:.0f} kB" for each in sizes)
    return f"--quantize {ref.quantize}: weights take {now}, instead of {before} in {ref.dtype}"


def import_family(family: str) -> type[TransformersCaptioner]:
    """Return the class of a family, after importing its module and with it that family's part of transformers."""
    set_wait_policy()
    module, name = CLASSES.get(family, CHAT_CLASS)
    captioner_class: type[TransformersCaptioner] = getattr(import_module(f"captioner.models.{module}"), name)
    return captioner_class
