"""--gpus-per-worker from 2 on: weights spread over several devices caption as on one; what cannot be spread is refused.

Without GPUs the devices are a CPU and a disk: the layers are placed, and inputs moved between them, by the same code.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from captioner.config import ClusterConfig, ModelConfig
from captioner.errors import ModelError, UsageError
from captioner.models import load, resolve, weights_bytes
from captioner.models.devices import pick_devices
from captioner.models.loading import import_family
from captioner.models.placement import USABLE, cache_bytes, check_fits, check_spread, weights_in_memory
from captioner.models.pretrained import check_placed
from captioner.models.weights import SINGLE_FILE
from captioner.testing import make_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
TWO = ClusterConfig(gpus_per_worker=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    def resolved(family: str):
        path = make_tiny_model(family, tmp_path_factory.mktemp(family))
        return resolve(ModelConfig(name=str(path), max_new_tokens=8))

    return cache(resolved)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "blip-2"])
def test_weights_on_several_devices_caption_as_on_one(tiny, family: str) -> None:
    ref = tiny(family)
    size = ref.spec.trial_size if ref.spec.variable_size else (ref.spec.height, ref.spec.width)
    images = np.random.default_rng(0).integers(0, 256, (12, *size, 3), np.uint8)
    on_one = load(ref, "cpu", 8).caption(images).texts

    spread = import_family(family)(ref, torch.device("cpu"), 8, {"cpu": int(0.8 * weights_in_memory(ref))})

    assert set(map(str, spread.model.hf_device_map.values())) == {"cpu", "disk"}
    assert spread.caption(images).texts == on_one
    assert len(set(on_one)) > 6


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("git", {}, "is a git model, which fits one GPU; give 1"),
        ("blip", {}, "is a blip model, which fits one GPU; give 1"),
        ("qwen2_5_vl", {"adapter": "lora"}, "is a LoRA adapter, which is merged on one GPU; merge it with peft"),
        ("qwen2_5_vl", {"endpoint": SimpleNamespace()}, "an --endpoint holds the model; leave it out"),
    ],
)
def test_what_is_not_spread_is_refused_with_what_to_do(tiny, family: str, change, message: str) -> None:
    ref = replace(tiny(family), **change)

    with pytest.raises(UsageError, match=f"--gpus-per-worker 2: .*{message}"):
        check_spread(ref, TWO)
    check_spread(ref, ClusterConfig(gpus_per_worker=1))
    check_spread(ref, ClusterConfig())


def test_models_of_large_families_are_spread(tiny) -> None:
    check_spread(tiny("qwen2_5_vl"), TWO)
    check_spread(tiny("blip-2"), TWO)
    check_spread(replace(tiny("qwen2_5_vl"), family="not_in_the_table"), TWO)


def test_the_memory_of_all_gpus_counts_and_the_number_that_would_do_is_named(tiny) -> None:
    ref = tiny("qwen2_5_vl")
    needed = weights_in_memory(ref) + cache_bytes(ref)
    check_fits(ref, [needed // 2 + 1] * 2, "H100")

    with pytest.raises(ModelError, match=r"and H100 has .*--gpus-per-worker 3, a smaller model"):
        check_fits(ref, [int(needed / USABLE / 3) + 1], "H100")
    with pytest.raises(ModelError, match=r"and 2 x H100 have together .*--gpus-per-worker 6, a smaller model"):
        check_fits(ref, [int(needed / USABLE / 6) + 1] * 2, "H100")


def test_weights_beside_those_that_are_loaded_take_no_memory(tiny, tmp_path: Path) -> None:
    ref = tiny("qwen2_5_vl")
    model = Path(shutil.copytree(ref.path, tmp_path / "model"))
    weights = (model / SINGLE_FILE).read_bytes()
    for name in ("consolidated.safetensors", "model-00001-of-00002.safetensors"):  # of Mistral, of an earlier upload
        (model / name).write_bytes(weights)
    crowded = replace(ref, path=str(model))

    assert weights_in_memory(crowded) == weights_in_memory(ref)
    assert weights_bytes(crowded) == len(weights)


def test_layers_that_fit_no_gpu_are_an_error_and_are_not_moved_to_the_cpu() -> None:
    model = SimpleNamespace(hf_device_map={"vision": 0, "text": 1, "head": "disk"})

    with pytest.raises(ModelError, match=r"m: 1 layer \(head\) of it fit none of 2 GPUs, of which 3.0 GB"):
        check_placed("m", model, {0: 10**9, 1: 2 * 10**9})
    check_placed("m", SimpleNamespace(hf_device_map={"vision": 0, "text": 1}), {0: 1, 1: 1})


def test_a_worker_that_sees_fewer_gpus_says_so() -> None:
    cpu = torch.device("cpu")

    assert pick_devices(cpu, 2) == [cpu]
    assert pick_devices(torch.device("cuda"), 1) == [torch.device("cuda")]
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match=r"--gpus-per-worker 2: a worker on node .* sees 0 GPUs"):
            pick_devices(torch.device("cuda"), 2)


def test_a_model_that_is_not_on_this_node_is_an_error_of_one_line(tiny, tmp_path: Path) -> None:
    gone = replace(tiny("git"), path=str(tmp_path / "gone"))

    assert weights_bytes(gone) == 0
    with pytest.raises(ModelError, match=r"gone: no such directory; copy the model to this place on every node$"):
        check_fits(gone, [1 << 30], "H100")
