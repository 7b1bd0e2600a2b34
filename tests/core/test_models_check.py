"""Tensors are compared with config.json without reading them, in this process or another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import chats_to_test
from safetensors.torch import load_file, save_file

from captioner.config import ModelConfig
from captioner.errors import ModelError
from captioner.models import FAMILIES, check, check_in_subprocess, load, resolve
from captioner.testing import make_tiny_model
from captioner.testing.tiny_chat_models import TINY_CHATS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path) -> Path:
    return make_tiny_model("git", tmp_path / "model")


def resolved(directory):
    return resolve(ModelConfig(name=str(directory)))


def change_tensors(directory, change) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


CHECKED = [family for family in FAMILIES if family not in TINY_CHATS or family in chats_to_test()]
BIAS = "git.encoder.layer.0.output.dense.bias"
DAMAGES = {
    "removed": (lambda tensors: tensors.pop(BIAS), f"1 missing: {BIAS}"),
    "reshaped": (
        lambda tensors: tensors.update({BIAS: torch.zeros(33)}),
        rf"1 misshapen: {BIAS} is \[33\], not \[32\]",
    ),
    "added": (lambda tensors: tensors.update({"git.extra.weight": torch.zeros(2)}), "1 unexpected: git.extra.weight"),
}


@pytest.mark.parametrize("family", CHECKED)
def test_a_complete_model_passes(family, tmp_path) -> None:
    check(resolved(make_tiny_model(family, tmp_path / family)))


@pytest.mark.parametrize("family", CHECKED)
def test_a_missing_and_an_extra_tensor_of_any_family_are_named(family, tmp_path) -> None:
    model = make_tiny_model(family, tmp_path / family)
    lost = []

    def change(tensors) -> None:
        lost.append(min(name for name in tensors if name.endswith("norm.weight") or name.endswith(".bias")))
        tensors.pop(lost[0])
        tensors["extra.weight"] = torch.zeros(2)

    change_tensors(model, change)

    with pytest.raises(ModelError, match=r"1 missing: .*; 1 unexpected: extra\.weight") as raised:
        check(resolved(model))

    assert lost[0].rpartition(".")[0].rpartition(".")[2] in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_tensor_that_does_not_fit_is_named(damage, model) -> None:
    change, message = DAMAGES[damage]
    change_tensors(model, change)

    for use in (check, lambda ref: load(ref, device="cpu")):
        with pytest.raises(ModelError, match=message) as raised:
            use(resolved(model))

        assert str(model) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_many_missing_tensors_stay_one_line(model) -> None:
    change_tensors(model, lambda tensors: [tensors.pop(name) for name in list(tensors) if "encoder.layer.1" in name])

    with pytest.raises(ModelError, match=r"missing: .*, \.\.\.; save the model again") as raised:
        check(resolved(model))

    assert len(str(raised.value)) < 500


def test_constants_of_older_checkpoints_are_accepted(model) -> None:
    constants = {
        "git.embeddings.position_ids": torch.arange(64)[None],
        "git.image_encoder.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    change_tensors(model, lambda tensors: tensors.update(constants))

    check(resolved(model))


def test_constants_of_old_gpt2_decoders_are_accepted(tmp_path) -> None:
    model = make_tiny_model("vision-encoder-decoder", tmp_path / "ved")
    block = "decoder.transformer.h.0"
    constants = {f"{block}.attn.bias": torch.ones(1, 1, 64, 64), f"{block}.attn.masked_bias": torch.tensor(-1e4)}
    change_tensors(model, lambda tensors: tensors.update(constants))

    check(resolved(model))


def test_weights_tied_to_the_embeddings_need_not_be_stored(tmp_path) -> None:
    model = make_tiny_model("vision-encoder-decoder", tmp_path / "ved")

    assert "decoder.lm_head.weight" not in load_file(model / "model.safetensors")
    check(resolved(model))


def test_a_check_in_another_process_raises_the_same_error(model) -> None:
    change_tensors(model, DAMAGES["removed"][0])

    pending = check_in_subprocess(resolved(model))

    for _ in range(2):
        with pytest.raises(ModelError, match=DAMAGES["removed"][1]):
            pending.result()


def test_files_that_passed_are_not_checked_again(model, cache) -> None:
    check(resolved(model))

    assert len(list((cache / "captioner" / "checked").iterdir())) == 1
    code = f"""
import sys
from captioner.config import ModelConfig
from captioner.models import check, resolve
check(resolve(ModelConfig(name={str(model)!r}), notify=str))
print("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"

    change_tensors(model, DAMAGES["removed"][0])
    with pytest.raises(ModelError, match="missing"):
        check(resolved(model))


def test_a_cache_that_cannot_be_written_is_no_error(model, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    check(resolved(model))


def test_a_check_can_be_cancelled(model) -> None:
    pending = check_in_subprocess(resolved(model))

    pending.cancel()
    pending.cancel()

    pending.result()


def test_the_fake_needs_no_check() -> None:
    check(resolve(ModelConfig(name="fake")))
    check_in_subprocess(resolve(ModelConfig(name="fake"))).result()
