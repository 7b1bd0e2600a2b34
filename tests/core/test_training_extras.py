"""LoRA, and the upload to the hub."""

from pathlib import Path

import pytest
import torch

from captioner.config import ModelConfig, TrainModelConfig
from captioner.errors import OutputError
from captioner.models import resolve
from captioner.store.directory import Directory
from captioner.testing import make_tiny_model
from captioner.testing.tiny_models import TINY_SIDE
from captioner.training.hub import push_to_hub
from captioner.training.loop import make_collate
from captioner.training.loss import CaptionLoss
from captioner.training.trainable import ADAPTERS, open_trainable


def opened(path: Path, checkpoint: Path | None = None):
    config = TrainModelConfig(lora_rank=2)
    ref = resolve(ModelConfig(name=str(path), max_new_tokens=8))
    return open_trainable(ref, config, torch.device("cpu"), 4, checkpoint)


@pytest.mark.parametrize("family", ["git", "blip", "vision-encoder-decoder"])
def test_adapters_learn_are_restored_and_merge_into_a_plain_model(tmp_path: Path, family: str) -> None:
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    from captioner.training.lora import adapter_weights, merge_adapters, save_adapters

    captioner = opened(make_tiny_model(family, tmp_path / "model"))
    loss, texts = CaptionLoss(captioner), make_collate(captioner).texts(["a ring", "a red cross"])
    loss.eval()
    pixels = torch.randint(0, 256, (2, TINY_SIDE, TINY_SIDE, 3), dtype=torch.uint8)
    learning = [weight for weight in loss.parameters() if weight.requires_grad]
    before = loss(pixels, **texts).item()
    optimiser = torch.optim.Adam(learning, lr=1e-3)
    for _ in range(3):
        optimiser.zero_grad()
        loss(pixels, **texts).backward()
        optimiser.step()
    after = loss(pixels, **texts).item()
    assert after < before
    assert all("lora" in name for name, weight in captioner.model.named_parameters() if weight.requires_grad)

    save_adapters(adapter_weights(captioner.model), tmp_path / "checkpoint" / ADAPTERS)
    restored = opened(tmp_path / "model", tmp_path / "checkpoint")
    assert CaptionLoss(restored).eval()(pixels, **texts).item() == pytest.approx(after, rel=1e-5)

    merge_adapters(restored.model)
    assert not any("lora" in name for name in restored.model.state_dict())
    assert CaptionLoss(restored).eval()(pixels, **texts).item() == pytest.approx(after, rel=1e-3)
    assert (tmp_path / "checkpoint" / ADAPTERS).is_dir()


class Hub:
    """Stands in for huggingface_hub.HfApi: keeps what it is told."""

    def __init__(self) -> None:
        self.created: list[tuple] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        self.created.append((repo_id, private, exist_ok))
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        self.files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}


def test_the_model_is_uploaded_privately_and_whole(tmp_path: Path) -> None:
    out, hub = Directory(str(tmp_path)), Hub()
    out.write_bytes("model/config.json", b"{}")
    out.write_bytes("model/model.safetensors", b"weights")

    address = push_to_hub(out, "someone/model", hub)

    assert address == "https://hub.example/someone/model"
    assert hub.created == [("someone/model", True, True)]
    assert hub.files == {"config.json": b"{}", "model.safetensors": b"weights"}


def test_an_upload_that_fails_says_where_the_model_is(tmp_path: Path) -> None:
    class Refusing(Hub):
        def create_repo(self, *_: object, **__: object) -> str:
            raise PermissionError("401 Client Error:\nUnauthorized")

    with pytest.raises(OutputError, match=r"401 Client Error: Unauthorized; the model is in .*/model"):
        push_to_hub(Directory(str(tmp_path)), "someone/model", Refusing())
