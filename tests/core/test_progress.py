"""Progress: one line that tells where a run is, in a log and on a terminal; the summary at its end."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from captioner.config import CaptionConfig, ModelConfig
from captioner.console.phases import HEARTBEAT, INTERVAL_S, Heartbeat, phase
from captioner.console.progress import Progress, duration
from captioner.console.summary import print_summary
from captioner.console.text import counted, printable
from captioner.data import ERROR_CODES, Receipt
from captioner.models import adapters, resolve
from captioner.run.job import plan_images
from captioner.sources.root import Root


@pytest.fixture(autouse=True)
def lines_about_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print them as a command does; other tests do without."""
    monkeypatch.setattr("captioner.console.phases.INTERVAL_S", INTERVAL_S)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class SignallingLog(io.StringIO):
    """Says when a first line has been written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def write(self, text: str) -> int:
        length = super().write(text)
        self.written.set()
        return length


class Ticks(threading.Event):
    """An event whose first waits last as long on a clock as they may, without waiting; `over` is set after them."""

    def __init__(self, clock: Clock, num_ticks: int) -> None:
        super().__init__()
        self.clock, self.num_ticks, self.over = clock, num_ticks, threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        if self.num_ticks == 0:
            self.over.set()
            return super().wait()
        self.num_ticks -= 1
        self.clock.now += timeout or 0.0
        return False


def receipt(num_rows: int, num_failed: int = 0) -> Receipt:
    return Receipt("g000-00000-0000", num_rows, num_rows - num_failed, {"truncated": num_failed} if num_failed else {})


def quiet(clock: Clock, total: int = 10_000, already: int = 0) -> Progress:
    return Progress(total, already, stream=io.StringIO(), clock=clock, interval=3600)


def test_line_tells_count_rate_failures_and_time_left() -> None:
    clock = Clock()
    progress = quiet(clock)
    for _ in range(4):
        clock.now += 2
        progress.update(receipt(400, num_failed=1))

    assert progress.line() == "captioned 1,600/10,000 (16%)  200 img/s  failed 4  ETA 00:42"


def test_start_up_does_not_count_once_two_chunks_are_committed() -> None:
    clock = Clock()
    progress = quiet(clock)
    clock.now += 100
    progress.update(receipt(500))
    clock.now += 1
    progress.update(receipt(500))

    assert "  500 img/s  " in progress.line()


def test_before_the_first_chunk_the_line_says_starting() -> None:
    clock = Clock()
    progress = quiet(clock, already=100)
    clock.now += 12

    assert progress.line() == "captioned 100/10,000 (1%)  starting, 00:12 so far"


def test_what_was_committed_before_counts_as_done_but_not_as_rate() -> None:
    clock = Clock()
    progress = quiet(clock, already=9_000)
    clock.now += 10
    progress.update(receipt(100))

    assert progress.line() == "captioned 9,100/10,000 (91%)  10 img/s  failed 0  ETA 01:30"


def test_the_rate_is_that_of_the_last_minute() -> None:
    clock = Clock()
    progress = quiet(clock, total=1_000_000)
    for rows in [1000] * 100 + [100] * 100:
        clock.now += 1
        progress.update(receipt(rows))

    assert "  100 img/s  " in progress.line()


def test_a_stall_shows_in_the_line() -> None:
    clock = Clock()
    progress = quiet(clock)
    for _ in range(2):
        clock.now += 1
        progress.update(receipt(100))
    clock.now += 45

    assert progress.line().endswith("last commit 00:45 ago")


def test_percent_is_100_only_when_all_is_done() -> None:
    progress = quiet(Clock(), total=1000, already=999)

    assert "(99%)" in progress.line()


def test_an_empty_run_is_whole() -> None:
    assert quiet(Clock(), total=0).line().startswith("captioned 0/0 (100%)")


@example(total=10_000_000, share=1.0, seconds=0.0625, failed=1_000)
@given(
    total=st.integers(1, 99_999_999),
    share=st.floats(0, 1),
    seconds=st.floats(0.01, 90_000),
    failed=st.integers(0, 99_999),
)
def test_the_line_of_a_narrow_terminal_is_short(total: int, share: float, seconds: float, failed: int) -> None:
    clock = Clock()
    progress = quiet(clock, total=total)
    assert len(progress.short_line()) <= 60
    clock.now += seconds
    progress.update(receipt(max(1, int(share * total)), num_failed=min(failed, max(1, int(share * total)))))

    assert len(progress.short_line()) <= 60


NARROW = """
from captioner.console.progress import Progress
from captioner.data import Receipt
with Progress(20_000_000, 12_000_000) as progress:
    for number in range(3):
        progress.update(Receipt(f"g000-00000-{number:04}", 512, 500, {"truncated": 12}))
"""


def test_the_live_line_fits_a_terminal_of_60_columns() -> None:
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", NARROW], stdin=end, stdout=end, stderr=end, env=environment)
    os.close(end)
    text = ""
    with contextlib.suppress(OSError):  # the end, on Linux
        while data := os.read(terminal, 65_536):
            text += data.decode()
    os.close(terminal)

    lines = [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)) if line.strip()]
    assert done.returncode == 0, text
    assert "12,001,536/20,000,000" in lines[-1]
    assert "failed 36" in lines[-1]
    assert all(len(line) <= 60 for line in lines)


def test_a_log_gets_a_line_while_nothing_happens() -> None:
    log = SignallingLog()
    with Progress(10, stream=log, interval=0.01):
        assert log.written.wait(timeout=120)

    assert log.getvalue().startswith("captioned 0/10 (0%)  starting")


def test_a_log_gets_plain_lines_and_a_last_one() -> None:
    clock, log = Clock(), io.StringIO()
    with Progress(10, stream=log, clock=clock, interval=3600) as progress:
        progress.update(receipt(10, num_failed=2))
        clock.now += 65

    assert log.getvalue() == "captioned 10/10 (100%) in 01:05  failed 2\n"


def test_an_interrupted_run_still_gets_its_last_line_and_leaves_no_thread() -> None:
    log = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(10, stream=log, clock=Clock(), interval=3600):
        raise KeyboardInterrupt

    assert log.getvalue() == "captioned 0/10 (0%) in 00:00  failed 0\n"
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_terminal_gets_one_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    with Progress(10, stream=terminal, clock=Clock()) as progress:
        progress.update(receipt(10))

    last = terminal.getvalue().rsplit("\r", 1)[-1]
    assert "captioned 10/10 (100%)" in last
    assert "elapsed 00:00" in last


def test_a_phase_that_lasts_says_so_again_and_again() -> None:
    clock, lines = Clock(), []
    ticks = Ticks(clock, 3)
    heartbeat = Heartbeat(clock, lambda: ticks)
    with heartbeat.phase("listing images", lines.append) as listing:
        assert ticks.over.wait(timeout=120)
        listing.text = "listing images, 512 listed"
        assert heartbeat.line() == "listing images, 512 listed, 8 s so far"

    assert lines == ["listing images, 2 s so far", "listing images, 5 s so far", "listing images, 8 s so far"]
    assert heartbeat.line() == ""


def test_silence_counts_across_phases_and_ends_with_any_line() -> None:
    clock, lines = Clock(), []
    events = [Ticks(clock, 0), Ticks(clock, 1), Ticks(clock, 1)]
    heartbeat = Heartbeat(clock, iter(events).__next__)
    with heartbeat.phase("opening the source", lines.append):
        clock.now += 2
    with heartbeat.phase("listing images", lines.append):
        assert events[1].over.wait(timeout=120)
    assert lines == ["listing images, 0 s so far"], "2.5 s after the start, of which the first phase took 2"
    clock.now += 2
    heartbeat.line_printed()
    with heartbeat.phase("loading weights", lines.append):
        assert events[2].over.wait(timeout=120)

    assert lines[1:] == ["loading weights, 2 s so far"], "2.5 s after the line, rounded"


def test_a_phase_within_another_is_named_by_its_line() -> None:
    heartbeat = Heartbeat(Clock())
    with contextlib.suppress(ValueError), heartbeat.phase("trying out batch sizes"):
        with heartbeat.phase("capturing graphs"):
            assert heartbeat.line() == "capturing graphs, 0 s so far"
        assert heartbeat.line() == "trying out batch sizes, 0 s so far"
        raise ValueError

    assert heartbeat.line() == "", "a phase that fails is over, too"


def test_a_progress_display_shows_the_phase_and_nothing_else_is_printed() -> None:
    log, lines, clock = SignallingLog(), [], Clock()
    ticks = Ticks(clock, 2)
    heartbeat = Heartbeat(clock, lambda: ticks)
    heartbeat.num_displays += 1
    with heartbeat.phase("loading weights", lines.append):
        assert ticks.over.wait(timeout=120)
    with Progress(10, stream=log, interval=0.01) as progress, phase("loading weights", lines.append):
        assert HEARTBEAT.num_displays == 1
        assert re.fullmatch(r"captioned 0/10 \(0%\)  loading weights, \d+ s so far", progress.line())

    assert not lines
    assert HEARTBEAT.num_displays == 0


class Unblocks:
    """Collects lines; `wait` waits for the first that names what is blocked."""

    def __init__(self, text: str) -> None:
        self.text, self.lines, self._printed = text, [], threading.Event()

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        if self.text in line and line.endswith(" s so far"):
            self._printed.set()

    def wait(self) -> None:
        assert self._printed.wait(timeout=120), self.lines


def test_a_listing_that_is_stuck_in_a_folder_is_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captioner.console.phases.INTERVAL_S", 0.01)
    monkeypatch.setattr("captioner.console.phases.MIN_PHASE_S", 0.01)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    notify, scan = Unblocks("listing images"), Root.scan

    def slow_scan(root: Root, *arguments: bytes) -> object:
        if threading.current_thread().name.startswith("listing"):
            notify.wait()
        return scan(root, *arguments)

    monkeypatch.setattr(Root, "scan", slow_scan)
    config = {"source": {"path": str(tmp_path / "photos")}, "output": {"path": str(tmp_path / "out")}}
    plan_images(CaptionConfig.model_validate(config), notify)

    assert any(line.startswith("planned 1 image ") for line in notify.lines)


def test_weights_that_are_hashed_for_long_are_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captioner.console.phases.INTERVAL_S", 0.01)
    monkeypatch.setattr("captioner.console.phases.MIN_PHASE_S", 0.01)
    notify = Unblocks("reading the files of model starter")
    hashes = adapters.hashes
    monkeypatch.setattr(adapters, "hashes", lambda *directories: (notify.wait(), hashes(*directories))[1])

    assert resolve(ModelConfig(name="starter"), notify=notify).sha256


@pytest.mark.parametrize(("seconds", "shown"), [(0, "00:00"), (59.6, "01:00"), (3599, "59:59"), (360_000, "100:00:00")])
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@given(st.text(alphabet=st.characters()))
def test_printable_text_is_one_line_that_any_terminal_takes(text: str) -> None:
    shown = printable(text)

    assert len(shown.splitlines()) <= 1
    assert not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in shown)
    shown.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Straße 東京 👩‍👧 naïve", "Straße 東京 👩‍👧 naïve"),
        ("a\x1b[31mred\x07", "a[31mred"),
        ("two\r\nlines\tand tabs", "two lines and tabs"),
        ("exe\u202egpj", "exegpj"),
        ("caf\udce9.jpg", "caf\ufffd.jpg"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


RECORD = {
    "output": "/data/out/",
    "counts": {
        "planned": 12_000,
        "ok": 11_950,
        "failed": 50,
        "failed_by_reason": {"timeout": 10, "not_an_image": 40},
        "skipped": 512,
        "ignored": 3,
    },
    "seconds": {"startup": 8.2, "run": 70.0},
    "images_per_second": 212.4,
    "check": {"num_rows": 500, "wer": 0.04, "shuffled_wer": 0.8},
    "notes": ["the captions mean nothing\x1b[2J [bold]here[/bold]"],
    "settings": CaptionConfig.model_validate(
        {
            "source": {"path": "my photos", "include": ["*.jpg"]},
            "model": {"name": "starter"},
            "output": {"path": "/data/out/", "overwrite": True},
        }
    ).model_dump(),
}


def shown_summary(record: dict[str, object]) -> str:
    stream = io.StringIO()
    print_summary(record, stream)
    return stream.getvalue()


def test_summary_says_what_was_done_and_what_to_do_next() -> None:
    shown = shown_summary(RECORD)
    rows = [tuple(part.strip() for part in line.strip().rsplit("  ", 1)) for line in shown.splitlines()]

    assert ("planned", "12,000") in rows
    assert ("ok", "11,950") in rows
    assert rows.index(("not_an_image", "40")) == rows.index(("failed", "50")) + 1
    assert ("committed before this start", "512") in rows
    assert rows[rows.index(("time", "01:10")) :][:4] == [
        ("time", "01:10"),
        ("start-up", "00:08"),
        ("after start-up", "01:02"),
        ("images/s", "212.4"),
    ], "the rate stands below the time that it is of"
    assert "WER 0.040 against the references of 500 images (captions shuffled 0.800)" in shown
    assert "the table: /data/out/captions" in shown
    assert "alt texts" not in shown, "the run is not finished"
    assert "captioner caption 'my photos' /data/out/ --include '*.jpg' --model starter --retry-failed\n" in shown, (
        "the run's own settings, without --overwrite"
    )


def test_summary_of_a_finished_run_names_the_commands_for_alt_texts() -> None:
    shown = shown_summary(RECORD | {"state": "finished", "output": "my captions"})

    assert "to publish alt texts: captioner alt-text 'my captions', then captioner review 'my captions'\n" in shown


def test_summary_shows_text_from_data_as_it_is_but_for_control_characters() -> None:
    assert "note: the captions mean nothing[2J [bold]here[/bold]\n" in shown_summary(RECORD)


def test_summary_without_failures_speaks_of_no_retry() -> None:
    assert "--retry-failed" not in shown_summary({"counts": {"planned": 1, "ok": 1, "failed": 0}})


@pytest.mark.parametrize("code", ERROR_CODES)
def test_a_retry_is_offered_only_where_the_same_files_may_pass(code: str) -> None:
    counts = {"planned": 2, "ok": 1, "failed": 1, "failed_by_reason": {code: 1}}
    shown = shown_summary({"counts": counts})

    of_the_file = {"empty_file", "not_an_image", "truncated", "unsupported_format", "decode_error", "damaged"}
    of_a_limit = {"too_many_pixels", "too_large"}  # its message names the flag
    assert ("--retry-failed" not in shown) == (code in of_the_file | of_a_limit)
    assert ("which images failed and why: the report" in shown) == ("--retry-failed" not in shown)
    assert "--retry-failed" in shown_summary({"counts": counts | {"failed_by_reason": {"damaged": 1, "timeout": 1}}})


def test_summary_of_an_almost_empty_record() -> None:
    assert shown_summary({"counts": {}, "seconds": {}, "images_per_second": None, "model": None}).strip() == ""


def test_summary_of_one_image_is_singular() -> None:
    counts = {"planned": 1, "ok": 0, "failed": 1, "failed_by_reason": {"truncated": 1}}
    shown = shown_summary({"counts": counts, "check": {"num_rows": 1, "wer": 0.5}})

    assert "the references of 1 image\n" in shown
    assert not re.search(r"\b1 \w+s\b", shown)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 images"), (1, "1 image"), (1_200, "1,200 images"), (1.0, "1 image"), (0.5, "0.5 images")],
)
def test_a_number_has_its_noun(number: float, text: str) -> None:
    assert counted(number, "image") == text
