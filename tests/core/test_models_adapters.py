"""A LoRA adapter as --model: its base model is found, both are hashed, and they caption as the merged model does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captioner.config import ModelConfig
from captioner.errors import ModelError
from captioner.models import load, resolve
from captioner.models.adapters import merge
from captioner.models.pretrained import open_model
from captioner.models.ref import ModelRef
from captioner.models.resolving import ensure_local
from captioner.testing import make_tiny_model

peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter of it as peft saves one, and the two merged by peft."""
    home = tmp_path_factory.mktemp("models")
    base = make_tiny_model("git", home / "base")
    torch.manual_seed(0)
    targets = ["query", "value", "q_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=64, target_modules=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(open_model(str(base), torch.float32, "cpu"), config)
    wrapped.save_pretrained(home / "adapter")
    shutil.copytree(base, home / "merged")
    wrapped.merge_and_unload().save_pretrained(home / "merged")
    return home


@pytest.fixture
def adapter(home: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(home / "adapter", tmp_path / "adapter"))


def resolved(path: Path, **settings: Any) -> ModelRef:
    return resolve(ModelConfig(name=str(path), max_new_tokens=8, **settings))


def captions(ref: ModelRef) -> list[str]:
    pixels = np.random.default_rng(0).integers(0, 256, (8, ref.spec.height, ref.spec.width, 3), np.uint8)
    return load(ref, "cpu", 4).caption(pixels).texts


def edit_config(adapter: Path, **changes: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_adapter_of_the_output_layer_leaves_the_embeddings_that_share_its_weights_alone(tmp_path: Path) -> None:
    base = str(make_tiny_model("blip", tmp_path / "base"))
    config = peft.LoraConfig(r=2, target_modules=["decoder"], init_lora_weights=False)
    wrapped = peft.get_peft_model(open_model(base, torch.float32, "cpu"), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    before = open_model(base, torch.float32, "cpu").text_decoder
    embeddings = before.get_input_embeddings().weight
    assert embeddings is before.get_output_embeddings().weight

    merged = merge(open_model(base, torch.float32, "cpu"), str(tmp_path / "adapter")).text_decoder

    adapted = wrapped.base_model.model.text_decoder.get_output_embeddings()
    product = adapted.get_delta_weight("default")
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)
    torch.testing.assert_close(merged.get_output_embeddings().weight, embeddings + product)


def test_an_adapter_captions_as_the_merged_model(home: Path) -> None:
    ref = resolved(home / "adapter")

    assert (ref.family, ref.path, ref.adapter) == ("git", str(home / "base"), str(home / "adapter"))
    assert f"with a LoRA adapter merged into {home / 'base'}" in ref.summary
    assert captions(ref) == captions(resolved(home / "merged")) != captions(resolved(home / "base"))


def test_the_fingerprint_covers_both_and_not_their_places(home: Path, adapter: Path, tmp_path: Path) -> None:
    ref = resolved(home / "adapter")
    base = shutil.copytree(home / "base", tmp_path / "elsewhere")
    edit_config(adapter, base_model_name_or_path=str(base))
    assert resolved(adapter).fingerprint == ref.fingerprint != resolved(home / "base").fingerprint

    other = make_tiny_model("git", tmp_path / "other", seed=1)
    edit_config(adapter, base_model_name_or_path=str(other))
    assert resolved(adapter).fingerprint != ref.fingerprint

    edit_config(adapter, base_model_name_or_path=str(base), lora_alpha=8)
    assert resolved(adapter).fingerprint != ref.fingerprint


def test_a_revision_that_peft_wrote_beside_a_local_base_is_ignored(home: Path, adapter: Path) -> None:
    edit_config(adapter, revision="main")

    assert captions(resolved(adapter)) == captions(resolved(home / "adapter"))


def test_a_worker_refuses_an_adapter_that_changed_since_the_start(home: Path, adapter: Path) -> None:
    ref = resolved(adapter)
    assert ensure_local(ref) == ref

    edit_config(adapter, lora_alpha=8)
    with pytest.raises(ModelError, match=rf"{adapter}: not the files that the run started with"):
        ensure_local(ref)
    shutil.rmtree(adapter)
    with pytest.raises(ModelError, match=r"adapter: not on machine"):
        ensure_local(ref)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "gone/away"}, r"a LoRA adapter of gone/away, which is not here .*set base_model"),
        ({"base_model_name_or_path": "/gone"}, r"a LoRA adapter of /gone, which is not here .*set base_model"),
        ({"base_model_name_or_path": None}, r"names no base model"),
        ({"peft_type": "LOHA"}, r"adapter of type LOHA; only LoRA is supported"),
    ],
)
def test_what_is_missing_is_named_with_the_way_out(adapter: Path, changes: dict[str, object], message: str) -> None:
    edit_config(adapter, **changes)

    with pytest.raises(ModelError, match=message) as caught:
        resolved(adapter)
    assert str(caught.value).startswith(str(adapter))
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_or_of_another_model_are_named(home: Path, adapter: Path, tmp_path: Path) -> None:
    other = make_tiny_model("blip", tmp_path / "blip")
    edit_config(adapter, base_model_name_or_path=str(other))
    with pytest.raises(ModelError, match=r"does not fit its base model"):
        load(resolved(adapter), "cpu", 1)

    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"a LoRA adapter without adapter_model.safetensors"):
        resolved(adapter)
