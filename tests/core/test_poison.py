"""A picture that crashes its decoder, or never lets it return, is one failed row: in one process and on Ray alike."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from captioner import pipeline
from captioner.config import CaptionConfig
from captioner.data import PixelSpec
from captioner.imaging import decode
from captioner.imaging.guarded import GuardedDecoder
from captioner.store.read import read_parts
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import ABORT_MARKER, HANG_MARKER, make_folder

SPEC = PixelSpec(height=32, width=32)
NO_LIMIT = 300_000_000


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTIONER_TEST_POISON", "1")


@pytest.fixture(scope="module")
def png(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (make_folder(tmp_path_factory.mktemp("one"), 1) / "000000.png").read_bytes()


@pytest.fixture
def decoder() -> Iterator[GuardedDecoder]:
    with GuardedDecoder(SPEC, NO_LIMIT, timeout=30.0) as decoder:
        yield decoder


def test_a_guarded_decoder_says_what_decode_says(decoder: GuardedDecoder, png: bytes) -> None:
    for data in (png, b"no picture", png[:200], b""):
        here, there = decode(data, SPEC, NO_LIMIT), decoder(data)
        assert (there.error_code, there.error_message) == (here.error_code, here.error_message)
        assert (there.width, there.height, there.format) == (here.width, here.height, here.format)
        assert (there.pixels is None) == (here.pixels is None)
        assert here.pixels is None or (there.pixels == here.pixels).all()


@pytest.mark.usefixtures("poison")
def test_a_crash_and_a_hang_are_reasons_and_the_next_picture_is_fine(png: bytes) -> None:
    with GuardedDecoder(SPEC, NO_LIMIT, timeout=2.0) as decoder:
        crashed = decoder(png + ABORT_MARKER)
        hanging = decoder(png + HANG_MARKER)

        assert (crashed.error_code, crashed.pixels) == ("decoder_crashed", None)
        assert "died 2 times, by signal SIGABRT" in crashed.error_message
        assert (hanging.error_code, hanging.pixels) == ("timeout", None)
        assert "2 s (decode_timeout)" in hanging.error_message
        assert decoder(png).error_code == ""


def test_the_markers_mean_nothing_unless_asked(decoder: GuardedDecoder, png: bytes) -> None:
    assert decoder(png + ABORT_MARKER + HANG_MARKER).error_code == ""


def only_decoder() -> psutil.Process:
    """The one decoder process of this one; what other tests left dead is passed over."""
    alive = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    (decoder,) = [p for p in alive if "captioner.imaging.child" in p.cmdline()]
    return decoder


def test_a_decoder_killed_from_outside_costs_no_picture(decoder: GuardedDecoder, png: bytes) -> None:
    assert decoder(png).error_code == ""
    child = only_decoder()
    os.kill(child.pid, signal.SIGKILL)

    assert decoder(png).error_code == ""


def test_no_process_is_left(png: bytes) -> None:
    with GuardedDecoder(SPEC, NO_LIMIT, timeout=30.0) as decoder:
        decoder(png)
        child = only_decoder()

    assert not child.is_running()


@pytest.mark.usefixtures("poison")
def test_a_run_in_one_process_goes_on_past_poison(tmp_path: Path) -> None:
    archive, out = make_folder(tmp_path / "archive", 20), tmp_path / "out"
    for name, marker in (("000005x.png", ABORT_MARKER), ("000011x.png", HANG_MARKER)):
        (archive / name).write_bytes((archive / "000005.png").read_bytes() + marker)
    config = CaptionConfig.model_validate(
        {
            "source": {"path": str(archive), "decode_timeout": 2},
            "model": {"name": "fake"},
            "output": {"path": str(out)},
        }
    )

    assert pipeline.run(config) == 0

    rows = pa.concat_tables(read_parts(open_table(str(out)))).to_pylist()
    failed = {row["image_id"]: row["error_code"] for row in rows if row["status"] == "failed"}
    assert failed == {"000005x.png": "decoder_crashed", "000011x.png": "timeout"}
    assert len(rows) == 22
    assert verify(open_table(str(out))).proven
