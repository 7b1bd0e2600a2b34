"""From the best checkpoint to OUT/model: what it takes from the base model, and where it finds it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import caption_config, train_config
from safetensors.torch import load_file, save_file

from captioner import pipeline
from captioner.config import ModelConfig, TrainModelConfig
from captioner.models import resolve
from captioner.models.pretrained import open_model
from captioner.models.weights import TRAINING_IMAGES
from captioner.scoring.eligible_rows import trained_images
from captioner.store.table import open_table
from captioner.testing import make_folder, make_tiny_model
from captioner.training import job
from captioner.training.finish import finish
from captioner.training.local import LocalTrainEngine
from captioner.training.trainable import open_trainable
from captioner.training.worker import FinishInputs

pytestmark = pytest.mark.usefixtures("one_thread")


def shas(directory: Path) -> set[str]:
    return set(pq.read_table(directory / TRAINING_IMAGES)["sha256"].to_pylist())


def pairs(out: Path) -> set[str]:
    return {
        sha for name in ("train", "eval") for sha in pq.read_table(out / f"pairs/{name}.parquet")["sha256"].to_pylist()
    }


def edit_json(file: Path, **changes: Any) -> None:
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | changes))


def test_the_training_images_of_a_base_model_and_its_adapter_are_not_forgotten(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    base = make_tiny_model("git", tmp_path / "base")
    earlier = {"sha256": ["ab" * 32], "image_id": ["of the base"], "split": ["train"]}
    pq.write_table(pa.table(earlier), base / TRAINING_IMAGES)
    first, second = (make_folder(tmp_path / name, 6, seed=seed) for name, seed in (("first", 1), ("second", 2)))
    lora = {"model": {"lora_rank": 2, "keep_adapter": True}}
    job.run(train_config(first, tmp_path / "adapter", base, lora, 8, max_steps=1), LocalTrainEngine("cpu"))
    adapter = tmp_path / "adapter" / "model"
    assert shas(adapter) == {"ab" * 32} | pairs(tmp_path / "adapter")

    pipeline.run(caption_config(first, tmp_path / "captions", model={"name": str(adapter), "max_new_tokens": 8}))
    assert trained_images(open_table(str(tmp_path / "captions"))) == shas(adapter)

    job.run(train_config(second, tmp_path / "again", adapter, None, 8, max_steps=1), LocalTrainEngine("cpu"))
    assert shas(tmp_path / "again" / "model") == shas(adapter) | pairs(tmp_path / "again")
    assert pairs(tmp_path / "again").isdisjoint(shas(adapter))


class FinishElsewhere(LocalTrainEngine):
    """Makes OUT/model like a machine that has the package in another place than the one that resolved the model."""

    def finish(self, checkpoint: Any, inputs: FinishInputs) -> dict[str, Any]:
        return super().finish(checkpoint, replace(inputs, model=replace(inputs.model, path="/gone")))


def test_a_model_is_made_where_the_directory_of_the_base_model_is_another(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data", 6)

    job.run(train_config(data, tmp_path / "out", max_steps=1), FinishElsewhere("cpu"))

    names = {file.name for file in (tmp_path / "out" / "model").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "training_run.json"} < names
    assert names & {"preprocessor_config.json", "processor_config.json"}


def test_the_model_keeps_the_generation_settings_of_its_base_model(tmp_path: Path) -> None:
    """Also settings of beams, of sampling and of a minimum, which training itself does not use."""
    data, base = make_folder(tmp_path / "data", 6), make_tiny_model("git", tmp_path / "base")
    settings = {"length_penalty": 2.0, "num_beams": 3, "early_stopping": True, "temperature": 0.5, "min_new_tokens": 10}
    edit_json(base / "generation_config.json", no_repeat_ngram_size=3, **settings)

    job.run(train_config(data, tmp_path / "out", base, None, 8, max_steps=1), LocalTrainEngine("cpu"))

    saved = json.loads((tmp_path / "out" / "model" / "generation_config.json").read_text())
    before = json.loads((base / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in before if name != "transformers_version"} == {
        name: value for name, value in before.items() if name != "transformers_version"
    }
    assert saved["max_new_tokens"] == 10  # --max-new-tokens 8 could not reach the minimum
    assert not saved.get("return_dict_in_generate")


def test_a_model_with_fewer_text_positions_than_the_usual_limit_is_finished(tmp_path: Path) -> None:
    data, base = make_folder(tmp_path / "data", 6), make_tiny_model("git", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    name = "git.embeddings.position_embeddings.weight"
    weights[name] = weights[name][:32].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    edit_json(base / "config.json", max_position_embeddings=32)

    job.run(train_config(data, tmp_path / "out", base, None, 16, max_steps=1), LocalTrainEngine("cpu"))

    assert (tmp_path / "out" / "model" / "training_run.json").is_file()


class FinishOnGpu(LocalTrainEngine):
    """Makes OUT/model on a machine whose GPU has no memory left: to put anything on it is an error."""

    def finish(self, checkpoint: Any, inputs: FinishInputs) -> dict[str, Any]:
        return finish(checkpoint, inputs, torch.device("cuda:99"))


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2}])
def test_without_a_test_set_the_model_is_made_without_memory_of_a_gpu(tmp_path: Path, lora: dict[str, Any]) -> None:
    if lora:
        pytest.importorskip("peft", reason="the extra `lora` is not installed")
    data = make_folder(tmp_path / "data", 6)

    job.run(train_config(data, tmp_path / "out", groups={"model": lora}, max_steps=1), FinishOnGpu("cpu"))

    assert (tmp_path / "out" / "model" / "training_run.json").is_file()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Return the device and the --quantize of each network that training opens from now on, in order."""
    networks: list[tuple[str, str | None]] = []

    def noting_open(path: str, dtype: torch.dtype, device: Any, *settings: Any) -> Any:
        networks.append((str(device), settings[2] if len(settings) > 2 else None))
        return open_model(path, dtype, device, *settings)

    for module in ("captioner.models.base", "captioner.training.trainable"):
        monkeypatch.setattr(f"{module}.open_model", noting_open)
    return networks


def test_a_checkpoint_is_read_on_the_cpu_beside_the_network_on_its_device(
    tmp_path: Path, opened: list[tuple[str, str | None]]
) -> None:
    base = make_tiny_model("git", tmp_path / "base")
    ref, device = resolve(ModelConfig(name=str(base))), torch.device("cpu:0")

    open_trainable(ref, TrainModelConfig(), device, 4, base)

    assert opened == [("cpu:0", None), ("cpu", None)]


def test_quantised_weights_score_the_test_set_and_whole_ones_are_merged_on_the_cpu(
    tmp_path: Path, opened: list[tuple[str, str | None]]
) -> None:
    for package in ("peft", "bitsandbytes"):
        pytest.importorskip(package, reason="the extras `lora` and `quantize` are not installed")
    data, base = make_folder(tmp_path / "data", 12), make_tiny_model("blip", tmp_path / "base")
    groups = {"model": {"lora_rank": 2, "quantize": "int4"}, "data": {"test_fraction": 0.3}}

    job.run(train_config(data, tmp_path / "out", base, groups, 8, max_steps=1), LocalTrainEngine("cpu"))

    assert opened == [("cpu", "int4"), ("cpu", "int4"), ("cpu", None)]
    record = json.loads((tmp_path / "out" / "model" / "training_run.json").read_text())
    assert record["measured"]["test"]["num_pictures"] > 0
    assert "- `quantize`: int4" in (tmp_path / "out" / "model" / "README.md").read_text()
