"""Check that the tensors of a model directory fit its config.json, by name and shape, without reading them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from captioner.errors import ModelError
from captioner.files import cache_dir
from captioner.models.ref import ModelRef


def check(ref: ModelRef) -> None:
    """Raise ModelError naming the tensors that are missing, unexpected or of a wrong shape.

    Imports torch and transformers, which takes seconds, unless the same files have passed before.
    """
    if ref.path and not _passed(ref):
        check_directory(ref.path)
        _remember(ref)


def check_directory(path: str) -> None:
    """Check a directory, whether or not it has passed before."""
    import torch

    from captioner.models.pretrained import open_model

    open_model(path, torch.float32, "meta")


class PendingCheck:
    """A check that runs in another process, so that the caller imports nothing heavy and can wait for it later."""

    def __init__(self, ref: ModelRef, process: subprocess.Popen[str] | None) -> None:
        self._ref, self._process = ref, process
        self._error: ModelError | None = None

    def result(self) -> None:
        """Wait for the end of the check; raise ModelError if the model failed it."""
        if self._process is not None:
            self._error = self._finish(self._process)
            self._process = None
        if self._error is not None:
            raise self._error

    def _finish(self, process: subprocess.Popen[str]) -> ModelError | None:
        try:
            result_of(process, f"{self._ref.path}: the check of its tensors")
        except ModelError as error:
            return error
        _remember(self._ref)
        return None

    def cancel(self) -> None:
        """Stop the check; `result` then returns at once."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def check_in_subprocess(ref: ModelRef) -> PendingCheck:
    """Start `check` in another process, unless the model is the fake or its files have passed before."""
    if not ref.path or _passed(ref):
        return PendingCheck(ref, None)
    return PendingCheck(ref, start_module("captioner.models", ref.path))


def start_module(module: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a module of this package in another Python, without network. See `result_of`."""
    root = str(Path(__file__).parents[2])
    search_path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": search_path}
    command = [sys.executable, "-P", "-m", module, *arguments]  # -P: nothing in the current folder is imported
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    )


def result_of(process: subprocess.Popen[str], work: str) -> str:
    """Wait for a module and return the last line of its output: transformers may have printed others before it.

    `work`: what it does, for the error of a crash. Raises ModelError with that line where the module failed.
    """
    out, err = process.communicate()
    line = (out.strip().splitlines() or [""])[-1]
    if process.returncode:
        crash = (err.strip() or f"exit code {process.returncode}").splitlines()[-1]
        raise ModelError(line or f"{work} did not finish: {crash}")
    return line


def _passed(ref: ModelRef) -> bool:
    return os.path.exists(_marker(ref))  # False where the cache cannot be read


def _marker(ref: ModelRef) -> Path:
    """Return the path of the empty file that records that the files passed with this version of transformers."""
    key = f"{ref.sha256} {ref.settings_sha256} {version('transformers')}"
    return cache_dir() / "checked" / hashlib.sha256(key.encode()).hexdigest()


def _remember(ref: ModelRef) -> None:
    marker = _marker(ref)
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:
        return  # a read-only home directory: the next start checks again
