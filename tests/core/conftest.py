"""Shared by the tests of one process."""

from functools import partial
from typing import Self

import pytest

from captioner.imaging import decode
from captioner.steps import Work


class DecoderHere:
    """Stands for the guarded decoder where a test makes dozens of runs: a child for each would take minutes."""

    def __init__(self, work: Work) -> None:
        self.decode = partial(decode, spec=work.model.spec, max_pixels=work.max_pixels)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, data: bytes):
        return self.decode(data)


@pytest.fixture
def decoding_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Work, "decoder", lambda work: DecoderHere(work))
