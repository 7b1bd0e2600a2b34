"""What a caption worker raises travels as a block, and is raised by the worker that commits."""

from __future__ import annotations

import pyarrow as pa
import pytest

from captioner.errors import ModelError
from ray_jobs.metrics import DeviceMetrics
from ray_jobs.stages import error_block, raise_error


class UnpicklableError(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ModelError("model: gone"), ModelError, "model: gone"),
        (ValueError("a block holds rows of 2 chunks"), ValueError, "a block holds rows of 2 chunks"),
        (UnpicklableError(7, "no device"), RuntimeError, r"UnpicklableError: no device \(7\)"),
    ],
)
def test_an_error_survives_the_way_to_the_committer(error, kind, message) -> None:
    with pytest.raises(kind, match=f"^{message}$"):
        raise_error(error_block(error))


def test_rows_are_no_error() -> None:
    raise_error(pa.table({"image_id": ["a"]}))


def test_chunks_captioned_at_once_are_busy_time_once() -> None:
    now = 10.0
    metrics = DeviceMetrics(clock=lambda: now)
    now = 13.0
    first = metrics.add(2.0, batch_size=16)  # from 11 to 13
    now = 14.0
    second = metrics.add(3.0, batch_size=16)  # from 11 to 14
    now = 20.0

    assert (first, second) == (2.0, 1.0)
    assert metrics.add(1.0, batch_size=16) == 1.0
