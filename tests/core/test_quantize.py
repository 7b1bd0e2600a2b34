"""--quantize: weights of fewer bits take fewer bytes and caption; a table holds captions of one kind of weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import caption_config

from captioner import pipeline
from captioner.config import ModelConfig
from captioner.console.trying import try_images
from captioner.errors import OK, FingerprintError, ModelError, UsageError
from captioner.models import load, resolve
from captioner.models.adapters import CONFIG_FILE, WEIGHTS_FILE
from captioner.models.loading import import_family
from captioner.models.placement import cache_bytes, check_fits, weights_in_memory
from captioner.models.quantized import PACKAGES
from captioner.models.ref import ModelRef
from captioner.store.table import open_table
from captioner.testing import make_folder, make_tiny_model

for package in PACKAGES.values():
    pytest.importorskip(package, reason="the extra `quantize` is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = tuple(PACKAGES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return cache(lambda family: make_tiny_model(family, tmp_path_factory.mktemp(family)))


def resolved(path: Path, **settings) -> ModelRef:
    return resolve(ModelConfig(name=str(path), max_new_tokens=8, **settings))


def images(ref: ModelRef) -> np.ndarray:
    size = ref.spec.trial_size if ref.spec.variable_size else (ref.spec.height, ref.spec.width)
    return np.random.default_rng(0).integers(0, 256, (12, *size, 3), np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "blip"])
def test_quantised_weights_take_fewer_bytes_and_caption_in_any_batch_alike(tiny, family: str, kind: str) -> None:
    ref = resolved(tiny(family), quantize=kind)
    messages: list[str] = []
    captioner = load(ref, "cpu", 8, notify=messages.append)
    texts = captioner.caption(images(ref)).texts

    assert captioner.weights_bytes < 0.6 * weights_in_memory(replace(ref, quantize=None))
    assert len(set(texts)) > 6
    assert load(ref, "cpu", 1).caption(images(ref)).texts == texts
    assert any(line.startswith(f"--quantize {kind}: weights take ") for line in messages)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torchao would quantise on the GPU and keep layers on the CPU")
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_layers_that_fit_none_of_several_devices_are_an_error_with_what_to_do(tiny, kind: str) -> None:
    """A CPU and a disk, as in test_placement.py, where the quantisers leave no layers."""
    ref = resolved(tiny("qwen2_5_vl"), quantize=kind)
    room = {"cpu": int(0.8 * weights_in_memory(ref))}

    with pytest.raises(ModelError, match=r"--gpus-per-worker needs room for every layer on the GPUs: give more") as no:
        import_family(ref.family)(ref, torch.device("cpu"), 8, room)

    assert "\n" not in str(no.value)


def test_int8_changes_few_captions(tiny) -> None:
    texts = [
        load(ref, "cpu", 8).caption(images(ref)).texts
        for ref in (resolved(tiny("blip")), resolved(tiny("blip"), quantize="int8"))
    ]

    assert sum(text == int8_text for text, int8_text in zip(*texts, strict=True)) >= 6
    assert len(set(texts[0])) > 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_any_width_compute_in_the_dtype(tiny, tmp_path: Path, kind: str, dtype: str) -> None:
    """The vision encoders of some models have layers whose width is not a multiple of 32."""
    ref = replace(resolved(tiny("blip"), quantize=kind), dtype=dtype)
    captioner = load(ref, "cpu", 4)
    layer = captioner.model.text_decoder.bert.encoder.layer[0].intermediate.dense

    assert layer(torch.ones(3, layer.in_features, dtype=captioner.dtype)).dtype == captioner.dtype


def test_the_fingerprint_depends_on_it_and_that_of_other_tables_stays(tiny) -> None:
    plain, *quantised = (resolved(tiny("blip"), quantize=kind) for kind in (None, *KINDS))

    assert len({ref.fingerprint for ref in (plain, *quantised)}) == 3
    assert "quantize" not in plain.summary
    assert "weights of linear layers in int8" in quantised[0].summary


def test_a_resume_with_other_bits_is_refused(tiny, tmp_path: Path) -> None:
    archive = make_folder(tmp_path / "images", 6)

    def run(**model) -> int:
        settings = {"name": str(tiny("blip")), "device": "cpu", "max_new_tokens": 8, **model}
        return pipeline.run(caption_config(archive, tmp_path / "out", model=settings, cluster={"local": True}))

    assert run(quantize="int8") == OK
    assert open_table(str(tmp_path / "out")).info["model"]["quantize"] == "int8"
    assert run(quantize="int8") == OK
    with pytest.raises(FingerprintError, match="--quantize int8 instead of none"):
        run()
    with pytest.raises(FingerprintError, match="--quantize int8 instead of int4"):
        run(quantize="int4")


def test_try_compares_with_unquantised_weights(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(file) for file in make_folder(tmp_path / "images", 4).glob("*.*g")]
    directory = tiny("blip")
    model = ModelConfig(name=str(directory), device="cpu", quantize="int8", max_new_tokens=4)

    assert try_images(files, [model]) == OK

    *_, plain, quantised, share = capsys.readouterr().out.splitlines()
    assert f"{directory.name} " in plain
    assert f"{directory.name} int8" in quantised
    assert share.endswith("of 4 captions equal to those of unquantised weights")


def test_models_that_cannot_be_quantised_are_refused_before_they_are_loaded(tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--quantize int8: .* is a git model, .* leave it out"):
        resolved(tiny("git"), quantize="int8")
    (tmp_path / CONFIG_FILE).write_text(f'{{"peft_type": "LORA", "base_model_name_or_path": "{tiny("blip")}"}}')
    (tmp_path / WEIGHTS_FILE).write_bytes((tiny("blip") / "model.safetensors").read_bytes())
    pytest.importorskip("peft")
    with pytest.raises(UsageError, match=r"--quantize int4: .* is a LoRA adapter, .* merge it with peft"):
        resolved(tmp_path, quantize="int4")


def needs(ref: ModelRef) -> int:
    return weights_in_memory(ref) + cache_bytes(ref)


def test_what_would_make_a_model_fit_is_named_with_its_size(tiny) -> None:
    ref = replace(resolved(tiny("qwen2_5_vl")), name="big")
    whole, int8, int4 = (needs(replace(ref, quantize=kind)) for kind in (None, *KINDS))
    assert int4 < int8 < whole
    check_fits(ref, [whole], "a GPU")

    with pytest.raises(ModelError, match="in float32, its cache for --batch-size 16") as error:
        check_fits(ref, [whole - 1], "a GPU", batch_size=16)
    assert "--dtype bfloat16 (" in str(error.value)
    assert "--quantize int8 (" in str(error.value)
    with pytest.raises(ModelError, match=r"give .*--quantize int4 \(0.0 GB\), --gpus-per-worker 2, a smaller model"):
        check_fits(replace(ref, quantize="int8"), [int4], "a GPU")
    check_fits(replace(ref, quantize="int4"), [int4], "a GPU")
