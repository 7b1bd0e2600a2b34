"""What `captioner submit` sends, known before any cluster is reached."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from captioner.errors import UsageError
from ray_jobs import submit
from ray_jobs.cli import app
from ray_jobs.submit import Submission, _current_id, package_directories, runtime_env


def make_submission(words: list[str], **options: Any) -> Submission:
    return submit.make_submission(typer.main.get_command(app).commands, words, **options)


@dataclass
class Known:
    status: str


def test_the_same_command_has_the_same_id_and_another_has_another() -> None:
    words = ["caption", "s3://b/images", "s3://b/out", "--model", "m"]

    first, again, other = (
        make_submission(command).submission_id for command in (words, words, [*words, "--num-beams", "3"])
    )

    assert first == again != other
    assert first.startswith("captioner-caption-")


def test_the_order_of_flags_does_not_make_another_job() -> None:
    submission = make_submission(["caption", "s3://a", "s3://b", "--model", "m", "--num-beams", "3"])
    other = make_submission(["caption", "--num-beams=3", "s3://a", "--model", "m", "s3://b"])

    assert submission.submission_id == other.submission_id


def test_a_config_file_is_read_here_and_local_paths_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "run.yaml").write_text("model: {name: org/model, num_beams: 3}\n")

    sent = make_submission(["caption", "images", "out", "--config", "run.yaml"]).arguments

    here = str(tmp_path)
    assert sent == ["caption", f"{here}/images", f"{here}/out", "--model", "org/model", "--num-beams", "3"]


def test_what_lies_in_the_working_dir_stays_relative_and_out_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()

    sent = make_submission(["caption", "images", "out", "--model", "m"], working_dir=".").arguments

    assert sent[1:3] == ["images", str(tmp_path / "out")]


def test_only_the_two_packages_are_uploaded_by_default() -> None:
    submission = make_submission(["caption", "s3://a", "s3://b", "--model", "m"])

    sent = runtime_env(submission)

    assert set(sent) == {"py_modules", "env_vars"}
    assert sent["py_modules"] == package_directories()
    assert [os.path.basename(path) for path in sent["py_modules"]] == ["captioner", "ray_jobs"]


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        ({}, "id"),
        ({"id": "RUNNING"}, "id"),
        ({"id": "PENDING"}, "id"),
        ({"id": "FAILED"}, "id-2"),
        ({"id": "STOPPED", "id-2": "RUNNING"}, "id-2"),
        ({"id": "STOPPED", "id-2": "SUCCEEDED"}, "id-3"),
    ],
)
def test_an_ended_id_gives_way_to_the_next_suffix(jobs: dict[str, str], expected: str) -> None:
    assert _current_id("id", {name: Known(status) for name, status in jobs.items()}) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "out"], "cannot run as a job"),
        (["caption", "a", "b", "--model", "m", "--address", "h:1"], "--address belongs to submit"),
        (["caption", "a", "b", "--num-beams", "none"], "--num-beams 'none'"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused_before_anything_is_sent(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_submission(words)


def test_a_variable_without_value_takes_the_one_it_has_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    words = ["caption", "s3://a", "s3://b", "--model", "m"]

    submission = make_submission(words, env=["HF_TOKEN", "MODE=x=y"])

    assert submission.env == {"HF_TOKEN": "secret", "MODE": "x=y"}
    assert "secret" not in submission.entrypoint
    with pytest.raises(UsageError, match="NOT_SET_ANYWHERE"):
        make_submission(words, env=["NOT_SET_ANYWHERE"])
