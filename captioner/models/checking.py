"""Do the weights of a model directory fit its config.json? Names and shapes are compared, no tensor is read."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import captioner
from captioner.errors import ModelError
from captioner.models.cache import cache_dir
from captioner.models.ref import ModelRef


def check(ref: ModelRef) -> None:
    """Raise ModelError naming the tensors that are missing, unexpected or of a wrong shape.

    Imports torch and transformers, which takes seconds, unless these very files passed before.
    """
    if ref.path and not _marker(ref).exists():
        check_directory(ref.path)
        _remember(ref)


def check_directory(path: str) -> None:
    """`check` for a directory, always done."""
    import torch

    from captioner.models.base import open_model

    open_model(path, torch.float32, "meta")


class PendingCheck:
    """A check that runs in a process of its own, so that the caller imports nothing heavy and need not wait yet."""

    def __init__(self, ref: ModelRef, process: subprocess.Popen[str] | None) -> None:
        self._ref, self._process = ref, process

    def result(self) -> None:
        """Wait for the end of the check; raise ModelError if the model failed it."""
        if self._process is None:
            return
        out, err = self._process.communicate()
        if self._process.returncode == 0:
            _remember(self._ref)
            self._process = None
            return
        # The error's own line is the last on stdout; anything else is a crash, whose last words are on stderr.
        lines = (out.strip() or err.strip() or f"exit code {self._process.returncode}").splitlines()
        raise ModelError(lines[-1] if out.strip() else f"{self._ref.path}: the check of its tensors failed: {lines[-1]}")

    def cancel(self) -> None:
        """Stop a check whose result is not wanted any more."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def check_in_subprocess(ref: ModelRef) -> PendingCheck:
    """Start `check` in another process; nothing is started for the fake or for files that passed before."""
    if not ref.path or _marker(ref).exists():
        return PendingCheck(ref, None)
    root = str(Path(captioner.__file__).parent.parent)
    search_path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": search_path}
    command = [sys.executable, "-m", "captioner.models", ref.path]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    )
    return PendingCheck(ref, process)


def _marker(ref: ModelRef) -> Path:
    """An empty file that is there once these weights and settings passed under this version of transformers."""
    key = f"{ref.sha256} {ref.settings_sha256} {version('transformers')}"
    return cache_dir() / "checked" / hashlib.sha256(key.encode()).hexdigest()


def _remember(ref: ModelRef) -> None:
    marker = _marker(ref)
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:
        return  # a read-only home: the next start checks again
