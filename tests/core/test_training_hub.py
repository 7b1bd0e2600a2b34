"""The upload of a trained model to the hub, and the command that does all of the transformers guide."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from captioner.errors import OutputError
from captioner.store.directory import Directory
from captioner.testing import make_folder, make_tiny_model
from captioner.training.hub import push_to_hub
from captioner.training.local import LocalTrainEngine
from ray_jobs.cli import app
from ray_jobs.options import settings_of_call
from ray_jobs.train import run

pytestmark = pytest.mark.usefixtures("one_thread")


class Hub:
    """Stands in for huggingface_hub.HfApi: records its calls."""

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


def test_an_error_of_the_upload_says_where_the_model_is_and_hides_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(Hub):
        def create_repo(self, *_: object, **__: object) -> str:
            raise PermissionError("401 Client Error:\nUnauthorized: Bearer hf_secret")

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(OutputError, match=r"401 Client Error: Unauthorized: Bearer \*\*\*; the model is in .*/model"):
        push_to_hub(Directory(str(tmp_path)), "someone/model", Refusing())


def test_one_command_does_all_that_the_guide_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command at the end of docs/from-the-transformers-guide.md, with a tiny model, data and hub, on a CPU."""
    guide = (Path(__file__).parents[2] / "docs" / "from-the-transformers-guide.md").read_text()
    (line,) = re.findall(r"^captioner (train .*--push-to-hub.*)$", guide, re.MULTILINE)
    data = make_folder(tmp_path / "data", 12, seed=5)
    replaced = {
        "lambdalabs/pokemon-blip-captions": str(data),
        "git-base-pokemon": str(tmp_path / "out"),
        "microsoft/git-base": str(make_tiny_model("git", tmp_path / "model")),
        "pokemon.png": str(data / "000003.png"),
    }
    words = [replaced.get(word, word) for word in shlex.split(line) if word != "--fp16"]
    words[words.index("--num-train-epochs") + 1] = "2"
    command = typer.main.get_command(app).commands["train"]
    config, *_ = settings_of_call(command.callback, command.make_context("train", words[1:]).params)
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)

    assert run(config, LocalTrainEngine()) == 0

    captured = capsys.readouterr()
    assert hub.created == [("me/git-base-pokemon", True, True)]
    assert {"model.safetensors", "README.md", "config.json"} < set(hub.files)
    assert "12 images: 11 train, 1 eval" in captured.err
    assert "WER" in captured.err
    assert "000003.png" in captured.out
    assert "data:image/jpeg" in (tmp_path / "out" / "report.html").read_text()
