"""An image that crashes its decoder, or never lets it return, is one failed row: in one process and on Ray alike."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from helpers import caption_config, rows_of
from PIL import Image

from captioner import CaptionBatches, pipeline
from captioner.config import ModelConfig
from captioner.console.trying import try_images
from captioner.data import PixelSpec
from captioner.imaging import decode, squeeze
from captioner.imaging.sandbox import decoder as decoder_module
from captioner.imaging.sandbox.decoder import Child, GuardedDecoder
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import ABORT_MARKER, HANG_MARKER, decoder_faults, make_folder

SPEC = PixelSpec(height=32, width=32)
SIDE = 16  # needs no torch: a child process starts in a fifth of the time
NO_LIMIT = 300_000_000


@pytest.fixture(autouse=True)
def kept_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is kept: they are the subject here."""
    monkeypatch.setattr(decoder_module, "Child", Child)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in decoder_faults().items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def png(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (make_folder(tmp_path_factory.mktemp("one"), 1) / "000000.png").read_bytes()


@pytest.fixture
def decoder() -> Iterator[GuardedDecoder]:
    with GuardedDecoder(SIDE, NO_LIMIT, timeout=30.0) as decoder:
        yield decoder


def another_png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (number, 0, 255 - number)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_guarded_decoder_returns_what_decode_returns(png: bytes) -> None:
    images = [png, b"no image", png[:200], b"", *(another_png(number) for number in range(40))]
    with GuardedDecoder(SPEC, NO_LIMIT, timeout=30.0) as decoder:
        decoded = list(decoder(images))

    for data, guarded in zip(images, decoded, strict=True):
        direct = decode(data, SPEC, NO_LIMIT)
        assert (guarded.error_code, guarded.error_message) == (direct.error_code, direct.error_message)
        assert (guarded.width, guarded.height, guarded.format) == (direct.width, direct.height, direct.format)
        assert (guarded.pixels is None) == (direct.pixels is None)
        assert direct.pixels is None or (guarded.pixels == direct.pixels).all()


@pytest.mark.parametrize("spec", [SPEC, SIDE])
def test_workers_are_forked_from_a_process_with_one_thread(
    monkeypatch: pytest.MonkeyPatch, png: bytes, spec: PixelSpec | int
) -> None:
    """Else a lock that another thread held is locked for ever in the worker; Python 3.12 warns of it."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "4")
    before = set(psutil.Process().children())  # other tests of this process may have left helpers of multiprocessing

    with GuardedDecoder(spec, NO_LIMIT, timeout=30.0) as decoder:
        assert [image.error_code for image in decoder([png])] == [""]
        (child,) = set(psutil.Process().children()) - before
        assert child.children()
        assert [thread.id for thread in child.threads()] == [child.pid]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize(("preprocess", "has_torch"), [("fast", True), ("processor", False)])
def test_a_decoder_imports_torch_only_where_torch_resizes(png: bytes, preprocess: str, has_torch: bool) -> None:
    before = set(psutil.Process().children())

    with GuardedDecoder(replace(SPEC, preprocess=preprocess), NO_LIMIT, timeout=30.0) as decoder:
        assert [image.error_code for image in decoder([png])] == [""]
        (child,) = set(psutil.Process().children()) - before
        assert ("libtorch" in Path(f"/proc/{child.pid}/maps").read_text()) == has_torch


@pytest.mark.usefixtures("faults")
def test_crashes_and_hangs_are_reasons_and_their_neighbours_are_fine(png: bytes) -> None:
    images = [another_png(number) for number in range(60)]
    for index in (0, 7, 8, 9, 30, 59):
        images[index] += ABORT_MARKER
    images[20] += HANG_MARKER
    with GuardedDecoder(SIDE, NO_LIMIT, timeout=15.0) as decoder:
        decoded = list(decoder(images))

    crashed, hanging = decoded[7], decoded[20]
    assert (crashed.error_code, crashed.pixels) == ("decoder_crashed", None)
    assert "died 2 times, by signal SIGABRT" in crashed.error_message
    assert (hanging.error_code, hanging.pixels) == ("timeout", None)
    assert "5 s (decode_timeout)" in hanging.error_message
    assert [index for index, image in enumerate(decoded) if image.error_code] == [0, 7, 8, 9, 20, 30, 59]
    for number, image in enumerate(decoded):
        expected = squeeze(another_png(number), SIDE, NO_LIMIT).pixels
        assert image.pixels is None or (image.pixels == expected).all()


@pytest.mark.usefixtures("faults")
def test_a_chunk_full_of_hanging_images_loses_little_time_to_each(monkeypatch: pytest.MonkeyPatch, png: bytes) -> None:
    monkeypatch.setattr("captioner.imaging.sandbox.decoder.HANGS_AT_FULL_TIME", 2)
    monkeypatch.setattr("captioner.imaging.sandbox.decoder.SHORT_TIMEOUT_S", 0.05)
    with GuardedDecoder(SIDE, NO_LIMIT, timeout=0.5) as decoder:
        first = [image.error_message for image in decoder([png + HANG_MARKER] * 12)]
        second = next(decoder([png + HANG_MARKER])).error_message

    assert first == [f"not decoded within {time} s (decode_timeout)" for time in [0.5] * 2 + [0.05] * 10]
    assert second == first[0]  # each chunk has its own


@pytest.mark.usefixtures("faults")
def test_a_chunk_full_of_images_that_crash_their_decoder(decoder: GuardedDecoder, png: bytes) -> None:
    assert {image.error_code for image in decoder([png + ABORT_MARKER] * 100)} == {"decoder_crashed"}


def test_decoders_ignore_the_markers_by_default(decoder: GuardedDecoder, png: bytes) -> None:
    assert next(decoder([png + ABORT_MARKER + HANG_MARKER])).error_code == ""


def child_and_worker() -> tuple[psutil.Process, psutil.Process]:
    """The processes of the newest decoder: other tests left some dead, and training keeps its own."""
    alive = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    decoders = [p for p in alive if "captioner.imaging.sandbox.child" in p.cmdline()]
    child = max(decoders, key=lambda process: process.create_time())
    (worker,) = child.children()
    return child, worker


@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
def test_a_decoder_killed_from_outside_costs_no_image(decoder: GuardedDecoder, png: bytes, victims: list) -> None:
    assert next(decoder([png])).error_code == ""
    processes = child_and_worker()
    for victim in victims:
        processes[victim].kill()
        psutil.wait_procs([processes[victim]], timeout=60)

    assert [image.error_code for image in decoder([png] * 3)] == [""] * 3


def test_a_chunk_that_is_given_up_leaves_nothing_for_the_next(decoder: GuardedDecoder) -> None:
    given_up = decoder(another_png(number) for number in range(60))
    next(given_up)
    given_up.close()

    assert (next(decoder([another_png(99)])).pixels == squeeze(another_png(99), SIDE, NO_LIMIT).pixels).all()


@pytest.mark.usefixtures("faults")
def test_a_large_image_behind_one_that_hangs_waits_for_nothing(png: bytes) -> None:
    with GuardedDecoder(SIDE, NO_LIMIT, timeout=15.0) as decoder:
        error_codes = [image.error_code for image in decoder([png + HANG_MARKER, png + bytes(5_000_000)])]

    assert error_codes == ["timeout", ""]


def test_no_process_is_left(png: bytes) -> None:
    with GuardedDecoder(SIDE, NO_LIMIT, timeout=30.0) as decoder:
        next(decoder([png]))
        processes = child_and_worker()

    assert not any(process.is_running() for process in processes)


def test_what_a_codec_prints_does_not_reach_the_terminal(decoder: GuardedDecoder, capfd: pytest.CaptureFixture) -> None:
    """libtiff prints to standard error, and may quote the file."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "TIFF", compression="tiff_lzw")
    broken = bytearray(buffer.getvalue())
    broken[8:18] = b"\xff" * 10
    squeeze(bytes(broken), SIDE, NO_LIMIT)
    assert capfd.readouterr().err

    assert next(decoder([bytes(broken)])).error_code == "decode_error"
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("faults")
def test_a_run_in_one_process_continues_after_crashes_and_hangs(tmp_path: Path) -> None:
    archive, out = make_folder(tmp_path / "archive", 20), tmp_path / "out"
    for name, marker in (("000005x.png", ABORT_MARKER), ("000011x.png", HANG_MARKER)):
        (archive / name).write_bytes((archive / "000005.png").read_bytes() + marker)
    config = caption_config(archive, out, source={"decode_timeout": 15})

    assert pipeline.run(config) == 0

    rows = rows_of(out)
    failed = {row["image_id"]: row["error_code"] for row in rows if row["status"] == "failed"}
    assert failed == {"000005x.png": "decoder_crashed", "000011x.png": "timeout"}
    assert len(rows) == 22
    assert verify(open_table(str(out))).proven


@pytest.mark.usefixtures("faults")
def test_a_crashing_image_does_not_end_try_or_caption_batches(
    tmp_path: Path, png: bytes, capsys: pytest.CaptureFixture
) -> None:
    images = {"fine.png": png, "crashing.png": png + ABORT_MARKER}
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)

    code = try_images([str(tmp_path / name) for name in images], [ModelConfig(name="fake")])
    batch = CaptionBatches("fake")({"bytes": list(images.values())})

    output = capsys.readouterr()
    assert code == 0
    assert "fine.png: " in output.out
    assert "crashing.png: decoder_crashed" in output.err
    assert list(batch["error_code"]) == ["", "decoder_crashed"]
    assert [caption is None for caption in batch["caption"]] == [False, True]
