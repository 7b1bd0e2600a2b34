"""A real head: `captioner submit`, follow, submit twice, stop, resume, exit codes; wrong ports, versions and tokens."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import socket
import subprocess
import termios
import threading
import time
from pathlib import Path

import pytest
import ray
from helpers import caption_config

from captioner import pipeline
from captioner.errors import ClusterError
from captioner.scoring.judgements import judge_name
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import GATE_MARKER, decoder_faults, make_folder, num_committed_chunks
from captioner.testing.tiny_clip import make_tiny_clip
from ray_jobs.address import check_dashboard, check_gcs
from ray_jobs.follow import Follower

DEADLINE_S = 600.0
IMAGES = 160


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Where the last image of the archive waits, once, until `open` is there: a job that gets to it does not end."""
    (tmp_path / "gate").mkdir()
    return tmp_path / "gate"


@pytest.fixture
def archive(tmp_path: Path, gate: Path) -> Path:
    root = make_folder(tmp_path / "archive", IMAGES, width=32)
    with (root / f"{IMAGES - 1:06d}.png").open("ab") as last:
        last.write(GATE_MARKER + str(gate).encode())
    return root


class Proxy:
    """Passes TCP connections on to the head, and can cut those that are open."""

    def __init__(self, url: str) -> None:
        self._target = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.close()

    def cut(self) -> None:
        assert self._open
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, far = self._server.accept()[0], socket.create_connection(self._target)
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def caption(archive: Path, out: Path, *more: str) -> list[str]:
    words = ["--", "caption", str(archive), str(out), "--model", "fake", "--rows-per-file", "32", *more]
    words += ["--preprocess", "processor"]  # decoders that need not import torch start in a tenth of the time
    words += ["--device", "cpu", "--gpus-per-worker", "1", "--num-workers", "1"]
    return ["--env", f"PYTHONPATH={decoder_faults()['PYTHONPATH']}", *words, "--decode-timeout", "600"]


def job_ids(head, prefix: str = "captioner-") -> list[str]:
    return sorted(job.submission_id for job in head.client().list_jobs() if job.submission_id.startswith(prefix))


def job_id_of(job: subprocess.Popen[str], announcement: str) -> str:
    """The id of what `captioner submit` has "submitted" or "already submitted"; what it waited for may stand before."""
    lines = []
    for line in job.stdout:
        if line.startswith(f"captioner: {announcement}: "):
            return line.split(": ")[2].strip()
        lines.append(line)
    raise AssertionError(f"ended with {job.wait()}: {''.join(lines)}")


def wait_until_half_way(out: Path, gate: Path) -> None:
    """Some chunks are committed, and one waits."""
    deadline = time.monotonic() + DEADLINE_S
    while not ((gate / "pid").exists() and num_committed_chunks(out)):
        assert time.monotonic() < deadline, "no chunk was committed"
        time.sleep(0.01)


def test_stopped_half_way_and_submitted_again_ends_whole(head, archive: Path, gate: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Proxy(head.url) as proxy:
        first = head.captioner("submit", "--address", proxy.url, *caption(archive, out))
        job_id = job_id_of(first, "submitted")
        wait_until_half_way(out, gate)
        _stop_half_way(head, proxy, first, job_id, archive, out)

    (gate / "open").touch()
    third = head.submit(*caption(archive, out))
    log, _ = third.communicate()
    assert third.returncode == 0, log
    assert f"captioner: submitted: {job_id}-2\n" in log
    assert "committed before this start" in log
    assert verify(open_table(str(out))).proven


def _stop_half_way(head, proxy: Proxy, first, job_id: str, archive: Path, out: Path) -> None:
    proxy.cut()

    second = head.submit(*caption(archive, out))
    assert job_id_of(second, "already submitted") == job_id
    assert job_ids(head, job_id) == [job_id]

    head.client().stop_job(job_id)
    logs = [first.communicate()[0], second.communicate()[0]]
    assert (first.returncode, second.returncode) == (143, 143), logs
    table = open_table(str(out))
    assert table.directory.read_json("run.json")["state"].startswith("stopped")
    assert not verify(table).proven
    assert logs[0].count(f"planned {IMAGES} images") == 1  # followed over two connections, each line once


def test_the_exit_code_is_that_of_the_command(head, tmp_path: Path) -> None:
    images, out = make_folder(tmp_path / "images", 10, width=32), tmp_path / "captioned"
    assert pipeline.run(caption_config(images, out, model={"preprocess": "processor"})) == 0

    job = head.submit("--", "check", str(out), "--max-wer", "0.01")
    log, _ = job.communicate()

    assert job.returncode == 2, log
    assert "is above --max-wer 0.01" in log
    (job_id,) = re.findall(r"submitted: (\S+)", log)
    sent = head.client().get_job_info(job_id).runtime_env
    assert len(sent["py_modules"]) == 2
    assert "working_dir" not in sent  # nothing but the two packages was uploaded


def test_captions_are_judged_by_a_job(head, tmp_path: Path) -> None:
    images, out = make_folder(tmp_path / "images", 10, width=32), tmp_path / "captioned"
    assert pipeline.run(caption_config(images, out, model={"preprocess": "processor"})) == 0
    clip = make_tiny_clip(tmp_path / "clip")

    words = ("--model", str(clip), "--device", "cpu", "--gpus-per-worker", "0", "--num-workers", "1")
    log, _ = (job := head.submit("--", "judge", str(out), *words)).communicate()

    assert job.returncode == 0, log
    assert "CLIPScore" in log
    assert open_table(str(out)).directory.exists(judge_name(0))


def test_a_job_that_cannot_start_is_named_with_what_it_waits_for(head, tmp_path: Path) -> None:
    flags = ("--pending-timeout", "1", "--entrypoint-num-gpus", "1000")
    job = head.submit(*flags, *caption(tmp_path, tmp_path / "out"))
    log, _ = job.communicate()

    assert job.returncode == 1
    assert "has waited 1 s for 1000 GPUs (--entrypoint-num-gpus)" in log


def test_without_the_token_the_message_says_so(head, tmp_path: Path) -> None:
    environment = {name: value for name, value in head.environment.items() if not name.startswith("RAY_AUTH")}
    words = ["submit", "--address", head.url, *caption(tmp_path, tmp_path / "out")]
    job = head.captioner(*words, env=environment)
    log, _ = job.communicate()

    assert job.returncode == 1
    assert "RAY_AUTH_TOKEN" in log
    assert "Traceback" not in log


def test_ports_given_for_each_other(head) -> None:
    with pytest.raises(ClusterError, match="is a Ray dashboard; give the port of the GCS"):
        check_gcs(head.url.removeprefix("http://"))
    with pytest.raises(ClusterError, match="is not the dashboard but Ray's own port"):
        check_dashboard(f"http://{head.gcs}")


def test_the_port_of_ray_client(head) -> None:
    with pytest.raises(ClusterError, match="is not the port of Ray's GCS"):
        check_gcs(head.client_server)


def test_tokens(head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ClusterError, match="needs a token; set RAY_AUTH_MODE=token"):
        check_gcs(head.gcs)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 32)
    with pytest.raises(ClusterError, match="refuses this token"):
        check_gcs(head.gcs)
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    check_gcs(head.gcs)


def test_another_version_of_ray(head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    there = ray.__version__
    monkeypatch.setattr(ray, "__version__", "2.1.0")

    with pytest.raises(ClusterError, match=f"runs Ray {there}, this is Ray 2.1.0"):
        check_gcs(head.gcs)


class Terminal:
    """A person at a terminal: what the program writes, and keys pressed in answer."""

    def __init__(self, head, *words: str) -> None:
        self._keyboard, screen = pty.openpty()
        self._seen = ""
        self.process = head.captioner(
            "submit",
            "--address",
            head.url,
            *words,
            stdin=screen,
            stdout=screen,
            stderr=screen,
            text=False,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C is a signal from its own terminal
        )
        os.close(screen)

    def wait_for(self, words: str) -> str:
        """All that was written, once `words` are."""
        deadline = time.monotonic() + DEADLINE_S
        while words not in self._seen:
            assert time.monotonic() < deadline, self._seen
            ready, _, _ = select.select([self._keyboard], [], [], 1.0)
            if ready:
                self._seen += self._read()
        return self._seen

    def _read(self) -> str:
        try:
            return os.read(self._keyboard, 65536).decode()
        except OSError:  # nobody has the other end open any more
            raise AssertionError(f"ended with {self.process.wait()}: {self._seen}") from None

    def press(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())


CTRL_C = "\x03"


class PressedWhileItPrints(io.StringIO):
    """A standard error whose reader presses Ctrl-C before the write of the first line returns."""

    def write(self, text: str) -> int:
        pressed_before = bool(self.getvalue())
        length = super().write(text)
        if not pressed_before:
            raise KeyboardInterrupt
        return length


def test_ctrl_c_as_soon_as_the_job_is_announced_is_answered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = PressedWhileItPrints()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # no terminal: nobody can be asked
    follower = Follower(client=None, job_id="captioner-1", waits_for="nothing", pending_timeout=0)

    assert follower.run("submitted: captioner-1") == 130
    assert "detached: captioner-1 still runs" in screen.getvalue()


def test_ctrl_c_asks_whether_to_stop_or_to_detach(head, archive: Path, tmp_path: Path) -> None:
    job_id = "asked"
    words = ["--submission-id", job_id, *caption(archive, tmp_path / "out")]
    first = Terminal(head, *words)
    first.wait_for(f": submitted: {job_id}\r\n")
    first.press(CTRL_C)
    first.wait_for("Stop the job? [y/N] ")
    first.press("n\r")
    first.wait_for(f"detached: {job_id} still runs")
    assert first.process.wait() == 130
    assert str(head.client().get_job_status(job_id)) in ("PENDING", "RUNNING")

    second = Terminal(head, *words)
    seen = second.wait_for(f"already submitted: {job_id}\r\n")
    assert f"{job_id} keeps the --env and --working-dir that it was started with" in seen
    second.press(CTRL_C)
    second.wait_for("Stop the job? [y/N] ")
    second.press("y\r")
    second.wait_for(f"{job_id} is stopped; run the same command to continue")
    assert second.process.wait() == 130
    assert str(head.client().get_job_status(job_id)) == "STOPPED"
