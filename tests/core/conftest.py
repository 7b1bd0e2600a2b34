"""Shared by the tests of one process."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from captioner.imaging.sandbox import decoder
from captioner.imaging.sandbox.child import Slots
from captioner.imaging.sandbox.decoder import Child
from captioner.report import page_images
from captioner.store.lease import Lease
from captioner.testing import make_folder, make_tiny_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 images with captions, to train on."""
    return make_folder(tmp_path_factory.mktemp("data"), 30, seed=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GIT model directory with random weights."""
    return make_tiny_model("git", tmp_path_factory.mktemp("tiny"))


class KeptChild:
    """A decoder's child process that outlives its decoder, for the next one with the same settings and environment.

    A process that has just been started imports torch, which takes seconds; most tests need a decoder.
    """

    kept: ClassVar[dict[str, Child]] = {}  # those that no decoder uses, the oldest first

    def __init__(self, settings: dict[str, Any], slots: Slots) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self._key = json.dumps([settings, environment], sort_keys=True)
        self._child = self.kept.pop(self._key, None) or Child(settings, Slots(settings["max_bytes"]))
        self.fork, self.receive, self.has_sent = self._child.fork, self._child.receive, self._child.has_sent
        self.is_alive = self._child.is_alive

    def close(self) -> None:
        if self.is_alive() and self._key not in self.kept:
            self.kept[self._key] = self._child
        else:
            self._child.close()
        while len(self.kept) > 4:
            self.kept.pop(next(iter(self.kept))).close()


@pytest.fixture(autouse=True, scope="session")
def kept_children() -> Iterator[None]:
    """Modules whose subject are these processes override this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "Child", KeptChild)
        yield
    for child in KeptChild.kept.values():
        child.close()


@pytest.fixture(autouse=True, scope="module")
def no_flushing() -> Iterator[None]:
    """Let no write wait for the disk: tests write many thousands of files, and none of them cuts the power.

    Those in which flushing fails replace it themselves.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def tiny_thumbnails() -> Iterator[None]:
    """For tests of many runs, each of which makes a report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_images, "SIDE", 16)
        yield


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table on an object store need not wait for others that start in the same second."""
    monkeypatch.setattr(Lease, "sleep", lambda self, seconds: None)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny models: threads would wait for each other more than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
