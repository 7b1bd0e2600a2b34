"""What `captioner submit` sends, known before any cluster is reached."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml
from pydantic import ValidationError

from captioner.config import Settings, settings_of
from captioner.errors import UsageError
from ray_jobs import submit
from ray_jobs.cli import app
from ray_jobs.options import SettingsFlags, settings_of_call
from ray_jobs.submit import JOBS, PATHS, Submission, _current_id, package_directories, runtime_env

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands
URI = "s3://bucket/a b"
# Of these and of its choices each setting is given those that it accepts.
VALUES = [
    True,
    1,
    3,
    100,
    0.25,
    1e-7,
    "",
    " ",
    "-1",
    "--x",
    "a 'b' \"c\"",
    "null",
    "0x1",
    "{a}",
    "é\n😀",
    "1:8",
    "5MB",
    "en",
]
VALUES += [[""], ["a"], ["a,b", "c"], ["c", " d", "--x"], ["1", "null"]]


def make_submission(words: list[str], **options: Any) -> Submission:
    return submit.make_submission(COMMANDS, words, **options)


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


@pytest.mark.parametrize("working_dir", [None, "."])
def test_the_image_to_caption_after_training_is_a_path_as_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, working_dir: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()

    sent = make_submission(["train", "s3://a", "s3://b", "--caption-image", "a.png"], working_dir=working_dir).arguments

    assert sent[-1] == ("a.png" if working_dir else str(tmp_path / "a.png"))


def test_what_lies_in_the_working_dir_stays_relative_and_out_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()

    sent = make_submission(["caption", "images", "out", "--model", "m"], working_dir=".").arguments

    assert sent[1:3] == ["images", str(tmp_path / "out")]


def test_the_home_of_this_machine_is_meant_not_that_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "run.yaml").write_text("source: {path: ~/images}\noutput: {path: ~/out}\nmodel: {name: ~/model}\n")

    sent = make_submission(["caption", "--config", str(tmp_path / "run.yaml")]).arguments

    assert sent == ["caption", f"{tmp_path}/images", f"{tmp_path}/out", "--model", "~/model"]


def test_a_model_on_servers_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen").mkdir()
    words = ["s3://a", "s3://b", "--model", "qwen"]

    assert make_submission(["caption", *words]).arguments[4] == str(tmp_path / "qwen")
    assert "qwen" in make_submission(["caption", *words, "--endpoint", "http://server/v1"]).arguments


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


def values_of_settings(name: str) -> dict[str, dict[str, list[Any]]]:
    """Values of every setting of a command, by group and key. Paths are URIs, which mean the same on a cluster."""
    flags: SettingsFlags = COMMANDS[name].callback.flags
    values: dict[str, dict[str, list[Any]]] = {group: {} for group in flags.kind.model_fields if group in flags.groups}
    for setting in settings_of(flags.kind):
        if setting.group in values and setting.flag not in ("--address", "--local"):  # which submit refuses
            is_path = setting.argument or setting.flag in PATHS
            tried = [URI] if is_path else [*choices_in(setting.info.annotation), *VALUES]
            values[setting.group][setting.field] = [
                value for value in tried if is_accepted(flags.kind, setting.group, setting.field, value)
            ]
    return values


def choices_in(annotation: Any) -> list[str]:
    if isinstance(annotation, str):
        return [annotation]
    return [choice for part in get_args(annotation) for choice in choices_in(part)]


def is_accepted(kind: type[Settings], group: str, field: str, value: Any) -> bool:
    try:
        kind.model_validate({group: {field: value}})
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("name", JOBS)
def test_a_job_runs_with_the_settings_that_its_command_has_here(name: str, tmp_path: Path) -> None:
    values, file = values_of_settings(name), tmp_path / "run.yaml"
    words = [name, *(["s3://bucket/out"] if name in ("check", "judge") else []), "--config", str(file)]
    assert [f"{group}.{field}" for group in values for field in values[group] if not values[group][field]] == []

    for index in range(max(len(of_field) for fields in values.values() for of_field in fields.values())):
        tree = {
            group: {field: of_field[index % len(of_field)] for field, of_field in fields.items()}
            for group, fields in values.items()
        }
        file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")

        sent = make_submission(words).arguments

        assert settings_at_start(sent) == settings_at_start(words)


def settings_at_start(words: list[str]) -> Any:
    """Return the settings that a command runs with, and its own values."""
    command = COMMANDS[words[0]]
    return settings_of_call(command.callback, command.make_context(words[0], words[1:]).params)


def test_a_list_that_is_set_on_the_command_line_is_also_that_of_the_job() -> None:
    words = ["--set", "source.include=['*.jpg', '*.png']", "--set", "source.keep_columns=['a,b', c]"]

    sent = make_submission(["caption", "s3://a", "s3://b", *words]).arguments

    assert sent[3:] == [
        "--include",
        "*.jpg",
        "--include",
        "*.png",
        "--set",
        "source.keep_columns=['a,b', c]",
    ]


def test_an_empty_text_stays_the_value_of_its_flag() -> None:
    words = ["caption", "s3://a", "s3://b", "--prompt", "", "--plan-only"]

    assert make_submission(words).arguments == words


def test_a_price_of_0_is_sent_too() -> None:
    sent = make_submission(["estimate", "s3://a", "--price-per-gpu-hour", "0"]).arguments

    assert sent[sent.index("--price-per-gpu-hour") + 1] == "0.0"


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
@pytest.mark.parametrize("name", JOBS)
def test_the_help_of_a_command_starts_no_job(name: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        make_submission([name, flag])

    assert f"captioner {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "out"], "cannot run as a job"),
        (["caption", "a", "b", "--print-config"], "--print-config starts nothing"),
        (["caption", "", "b", "--model", "m"], r"no SOURCE given, only OUT \(.*/b\)"),
        (["train", "--set", "output.path=b"], r"no DATA given, only OUT \(.*/b\)"),
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
