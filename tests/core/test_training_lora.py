"""Training of LoRA adapters."""

from pathlib import Path

import pytest
import torch

from captioner.config import ModelConfig, TrainModelConfig
from captioner.models import resolve
from captioner.testing import make_tiny_model
from captioner.testing.tiny_models import TINY_SIDE
from captioner.training.loop import make_collate
from captioner.training.loss import CaptionLoss
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
