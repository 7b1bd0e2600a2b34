"""Training of LoRA adapters."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import train_config, training_losses

from captioner.config import ModelConfig, TrainModelConfig
from captioner.errors import ModelError
from captioner.models import load, resolve
from captioner.models.placement import weights_in_memory
from captioner.models.quantized import stored_bytes
from captioner.testing import make_folder, make_tiny_model
from captioner.testing.tiny_models import TINY_SIDE
from captioner.training import job
from captioner.training.evaluate import make_collate
from captioner.training.local import LocalTrainEngine
from captioner.training.loss import CaptionLoss
from captioner.training.pairs import TRAINABLE
from captioner.training.trainable import ADAPTERS, open_trainable


def open_with_adapters(path: Path, checkpoint: Path | None = None):
    config = TrainModelConfig(lora_rank=2)
    ref = resolve(ModelConfig(name=str(path), max_new_tokens=8))
    return open_trainable(ref, config, torch.device("cpu"), 4, checkpoint)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", ["git", "blip", "vision-encoder-decoder"])
def test_adapters_are_trained_restored_and_merged_into_a_plain_model(tmp_path: Path, family: str) -> None:
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    from captioner.training.lora import adapter_weights, merge_adapters, save_adapters

    torch.manual_seed(0)  # adapters start with random weights
    captioner = open_with_adapters(make_tiny_model(family, tmp_path / "model"))
    loss, texts = CaptionLoss(captioner), make_collate(captioner).texts(["a ring", "a red cross"])
    loss.eval()
    pixels = torch.randint(0, 256, (2, TINY_SIDE, TINY_SIDE, 3), dtype=torch.uint8)
    trained = [weight for weight in loss.parameters() if weight.requires_grad]
    texts["pixels"] = pixels
    before = loss(**texts).item()
    optimiser = torch.optim.Adam(trained, lr=1e-3)
    for _ in range(3):
        optimiser.zero_grad()
        loss(**texts).backward()
        optimiser.step()
    after = loss(**texts).item()
    assert after < before
    assert all("lora" in name for name, weight in captioner.model.named_parameters() if weight.requires_grad)

    save_adapters(adapter_weights(captioner.model), tmp_path / "checkpoint" / ADAPTERS)
    restored = open_with_adapters(tmp_path / "model", tmp_path / "checkpoint")
    assert CaptionLoss(restored).eval()(**texts).item() == pytest.approx(after, rel=1e-5)

    merge_adapters(restored.model)
    assert not any("lora" in name for name in restored.model.state_dict())
    assert CaptionLoss(restored).eval()(**texts).item() == pytest.approx(after, rel=1e-3)
    assert (tmp_path / "checkpoint" / ADAPTERS).is_dir()


@pytest.mark.parametrize("family", TRAINABLE)
def test_weights_of_embeddings_and_of_the_output_layer_get_no_adapter(tmp_path: Path, family: str) -> None:
    """They are often the same weights: an adapter that is merged into one would change the other."""
    from captioner.training.lora import target_layers

    model = make_tiny_model(family, tmp_path / "model")
    network = open_trainable(
        resolve(ModelConfig(name=str(model))), TrainModelConfig(), torch.device("cpu"), 4, None
    ).model
    vocabulary = network.config.get_text_config(decoder=True).vocab_size

    layers = [network.get_submodule(name) for name in target_layers(network, None, [])]

    words = {id(part.weight) for part in network.modules() if isinstance(part, torch.nn.Embedding)}
    assert layers
    assert not [layer for layer in layers if id(layer.weight) in words or vocabulary in layer.weight.shape]


@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_the_layers_of_a_gpt2_decoder_get_adapters_that_are_merged_as_they_compute(tmp_path: Path) -> None:
    """They are Conv1D, whose weights are the transposed ones of a Linear."""
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    from captioner.training.lora import adapter_weights, merge_adapters, save_peft

    path = make_tiny_model("vision-encoder-decoder", tmp_path / "model")
    captioner = open_with_adapters(path)
    network = captioner.model
    adapted = {name.partition(".lora_")[0] for name in adapter_weights(network)}
    blocks = {"attn": ("c_attn", "c_proj"), "crossattention": ("c_attn", "q_attn", "c_proj"), "mlp": ("c_fc", "c_proj")}
    decoder = {f"decoder.transformer.h.{n}.{b}.{name}" for n in (0, 1) for b, names in blocks.items() for name in names}
    assert {name for name in adapted if name.startswith("decoder")} == decoder
    torch.manual_seed(0)
    with torch.no_grad():  # new adapters add nothing
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    loss, texts = CaptionLoss(captioner).eval(), make_collate(captioner).texts(["a ring", "a red cross"])
    texts["pixels"] = torch.randint(0, 256, (2, TINY_SIDE, TINY_SIDE, 3), dtype=torch.uint8)
    unmerged = loss(**texts).item()
    shutil.copytree(path, tmp_path / "kept")
    (tmp_path / "kept" / "model.safetensors").unlink()
    save_peft(network, tmp_path / "kept", str(path), None)

    merge_adapters(network)

    assert loss(**texts).item() == pytest.approx(unmerged, rel=1e-5)
    plain = open_trainable(resolve(ModelConfig(name=str(path))), TrainModelConfig(), torch.device("cpu"), 4, None)
    assert CaptionLoss(plain).eval()(**texts).item() != pytest.approx(unmerged, rel=1e-3)
    kept = open_trainable(
        resolve(ModelConfig(name=str(tmp_path / "kept"))), TrainModelConfig(), torch.device("cpu"), 4, None
    )
    assert CaptionLoss(kept).eval()(**texts).item() == pytest.approx(unmerged, rel=1e-5)


def test_adapters_without_a_layer_to_adapt_are_refused() -> None:
    from captioner.training.lora import target_layers

    network = torch.nn.Sequential(torch.nn.Linear(2, 2))

    with pytest.raises(ModelError, match=r"--lora-rank: no linear layer is left .*--freeze-vision") as caught:
        target_layers(network, network, [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["blip", "vision-encoder-decoder"])
def test_adapters_learn_beside_weights_of_4_bits_and_are_merged_with_whole_ones(tmp_path: Path, family: str) -> None:
    for package in ("peft", "bitsandbytes"):
        pytest.importorskip(package, reason="the extras `lora` and `quantize` are not installed")
    data, model = make_folder(tmp_path / "data", 10, seed=5), make_tiny_model(family, tmp_path / "model")
    lora = {"model": {"lora_rank": 4, "quantize": "int4"}}
    config = train_config(data, tmp_path / "out", model, lora, 8, learning_rate=1e-2, max_steps=6)
    whole = resolve(ModelConfig(name=str(model)))

    job.run(config, LocalTrainEngine("cpu"))

    losses = training_losses(tmp_path / "out")
    assert losses[-1] < losses[0]
    trained = resolve(ModelConfig(name=str(tmp_path / "out" / "model"), max_new_tokens=8))
    assert weights_in_memory(trained) == weights_in_memory(whole)
    assert load(trained, device="cpu").caption(np.zeros((1, TINY_SIDE, TINY_SIDE, 3), np.uint8)).texts
    opened = open_trainable(replace(whole, quantize="int4"), config.model, torch.device("cpu"), 4, None).model
    adapters = sum(weight.nbytes for weight in opened.parameters() if weight.requires_grad)
    assert stored_bytes(opened) - adapters < 0.6 * weights_in_memory(whole)
