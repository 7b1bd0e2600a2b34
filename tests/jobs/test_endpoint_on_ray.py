"""Model servers behind a run on Ray: no GPU is asked for, the key stays private, faults stop the run with one line."""

import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from helpers import caption_config, contents, rows_of

from captioner import pipeline
from captioner.config import CaptionConfig
from captioner.errors import EndpointError
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder
from captioner.testing.model_server import Answer, ModelServer, Request, saying
from ray_jobs import caption, doctor, estimate

KEY = "sk-secret-of-the-test"
pytestmark = pytest.mark.usefixtures("ray_instance")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTIONER_API_KEY", KEY)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("archive"), 60)


def settings(archive: Path, out: Path, server: ModelServer, **model) -> CaptionConfig:
    model = {"name": "tiny-vlm", "endpoint": [server.url], "concurrency": 8, **model}
    return caption_config(archive, out, model=model, cluster={"decode_cpus": 1})


def test_a_run_on_ray_makes_the_local_table_without_a_gpu_and_keeps_the_key(
    tmp_path: Path, archive: Path, ray_instance
) -> None:
    command_lines: set[str] = set()
    free_gpus: set[float] = set()

    def look(asked: Request) -> None:
        command_lines.update(every_command_line())
        free_gpus.add(ray_instance.available_resources()["GPU"])

    questions = tmp_path / "questions.yaml"
    questions.write_text(
        "caption: {prompt: 'What is in {image_id}?'}\n"
        "words: {prompt: And more, schema: {type: string, pattern: '[05]$'}}"
    )
    with ModelServer(key=KEY) as server:
        pipeline.run(settings(archive, tmp_path / "local", server, questions=str(questions)))
        server.rule = look
        assert caption.run(settings(archive, tmp_path / "out", server, questions=str(questions))) == 0

        before = rows_of(tmp_path / "out")
        assert contents(tmp_path / "out") == contents(tmp_path / "local")
        assert {row["words"] is None for row in rows_of(tmp_path / "out")} == {True, False}
        server.rule = lambda asked: saying("5")
        again = settings(archive, tmp_path / "out", server, questions=str(questions))
        retry = again.output.model_copy(update={"retry_failed": True})
        assert pipeline.run(again.model_copy(update={"output": retry})) == 0

    assert [row["caption"] for row in rows_of(tmp_path / "out")] == [row["caption"] for row in before]
    assert all(row["words"] in (old["words"], "5") for row, old in zip(rows_of(tmp_path / "out"), before, strict=True))
    assert free_gpus == {2}
    assert server.most_at_once <= 8
    assert command_lines
    assert not any(KEY in line for line in command_lines)
    files = [file for folder in (tmp_path, ray_session()) for file in folder.rglob("*") if is_text(file)]
    assert len(files) > 10
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []


def every_command_line() -> set[str]:
    own, lines = psutil.Process(), set()
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.Error):  # it has ended
            lines.add(" ".join(process.cmdline()))
    return lines


def ray_session() -> Path:
    import ray

    return Path(ray._private.worker._global_node.get_session_dir_path())


def is_text(file: Path) -> bool:
    return file.is_file() and not file.is_socket()


def test_a_model_that_changes_stops_a_run_on_ray_with_one_line_and_it_resumes(tmp_path: Path, archive: Path) -> None:
    with ModelServer(lambda asked: Answer(changes={"model": "other"}) if asked.number > 20 else None) as server:
        with pytest.raises(EndpointError, match=r"^[^\n]*the answers now come from model 'other'[^\n]*$"):
            caption.run(settings(archive, tmp_path / "out", server))
        server.rule = lambda asked: None
        assert pipeline.run(settings(archive, tmp_path / "out", server)) == 0

    assert verify(open_table(str(tmp_path / "out"))).proven


def test_estimate_predicts_tokens_and_money_and_doctor_names_what_a_server_serves(
    archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ModelServer(key=KEY) as server:
        config = settings(archive, Path(), server, price_in=100.0, price_out=1000.0)
        assert estimate.run(config, 16, 0, None) == 0
        assert re.findall(r"^(prompt tokens|answer tokens|cost) +(\S+)$", capsys.readouterr().out, re.MULTILINE) == [
            ("prompt tokens", "6,000"),
            ("answer tokens", "180"),
            ("cost", "0.78"),
        ]
        (finding,) = [finding for finding in doctor.findings(config, None) if finding.name == "endpoint"]
        assert finding.passed
        assert "serves tiny-vlm; tiny-vlm answers one image in" in finding.message
        server.key = "another"
        (finding,) = [finding for finding in doctor.findings(config, None) if finding.name == "endpoint"]
        assert finding.passed is False
        assert "the key is refused" in finding.message
        assert KEY not in finding.message


def test_a_driver_that_is_killed_loses_nothing_and_asks_again_about_the_chunks_under_way_only(
    tmp_path: Path, archive: Path
) -> None:
    """Chunks of 7 images, two under way; the server holds what it is asked from the 30th image on."""
    held = threading.Event()
    with ModelServer(lambda asked: Answer(held=held) if asked.number >= 30 else None, key=KEY) as server:
        command = [sys.executable, "-m", "ray_jobs.cli", "caption", str(archive), str(tmp_path / "out"), "--local"]
        command += ["--endpoint", server.url, "--concurrency", "7", "--max-side", "4096", "--max-failed", "0"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as driver:
            server.wait_for(36)
            driver.send_signal(signal.SIGKILL)
        before = len(server.asked)
        held.set()
        assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
        rows = rows_of(tmp_path / "out")

    assert verify(open_table(str(tmp_path / "out"))).proven
    assert len(rows) == len({row["caption"] for row in rows}) == 60
    asked_twice = len(server.asked) - 60
    assert before > 30
    assert 0 < asked_twice <= 3 * 8
