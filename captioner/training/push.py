"""OUT/model to the Hugging Face hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from captioner.errors import OutputError
from captioner.store.directory import Directory


def push_to_hub(out: Directory, repository: str, api: Any = None) -> str:
    """Upload OUT/model to a repository of its own, private where it is new; returns its address.

    `api`: the hub's client. Raises OutputError where the hub refuses.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    with tempfile.TemporaryDirectory(prefix="captioner-push-") as folder:
        for name in out.list_names("model"):
            (Path(folder) / name).write_bytes(out.read_bytes(f"model/{name}"))
        try:
            address = api.create_repo(repository, private=True, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add the trained model")
        except Exception as error:  # whatever the HTTP client of the day raises
            reason = " ".join(str(error).split())[:300]
            raise OutputError(
                f"--hub-model-id {repository}: the upload failed: {reason}; the model is in {out.shown('model')}, the "
                "same command tries again"
            ) from None
    return str(address)
