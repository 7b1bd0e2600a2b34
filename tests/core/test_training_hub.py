"""The upload of a trained model to the hub."""

from pathlib import Path

import pytest

from captioner.errors import OutputError
from captioner.store.directory import Directory
from captioner.training.hub import push_to_hub


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


def test_an_error_of_the_upload_says_where_the_model_is(tmp_path: Path) -> None:
    class Refusing(Hub):
        def create_repo(self, *_: object, **__: object) -> str:
            raise PermissionError("401 Client Error:\nUnauthorized")

    with pytest.raises(OutputError, match=r"401 Client Error: Unauthorized; the model is in .*/model"):
        push_to_hub(Directory(str(tmp_path)), "someone/model", Refusing())
