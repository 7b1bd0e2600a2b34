"""--set, --print-config and --log-format, which every command made from settings has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from captioner.config import CaptionConfig, load_config
from captioner.errors import UsageError
from ray_jobs.cli import main
from ray_jobs.options import parse_set


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print-config"])
    assert ended.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_a_flag_wins_over_set_and_both_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: from-file, num_beams: 2, max_new_tokens: 11}\n")
    given = [
        "--config",
        str(file),
        "--set",
        "model.num_beams=3",
        "--set",
        "model.max_new_tokens=12",
        "--num-beams",
        "4",
    ]

    model = shown(capsys, "caption", "a", "b", *given)["model"]

    assert (model["name"], model["max_new_tokens"], model["num_beams"]) == ("from-file", 12, 4)


def test_what_print_config_shows_is_read_back_as_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "caption",
        "a b",
        "out",
        "--model",
        "m",
        "--num-workers",
        "1:8",
        "--include",
        "*.jpg",
        "--max-failed",
        "0.1",
    ]
    with pytest.raises(SystemExit):
        main([*words, "--print-config"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)

    config = load_config(CaptionConfig, str(tmp_path / "run.yaml"), {})

    assert config.source.path == "a b"
    assert config.source.include == ["*.jpg"]
    assert config.cluster.num_workers == "1:8"
    assert config.output.max_failed == 0.1


@pytest.mark.parametrize("text", ["1:8", "12:30"])
def test_a_range_in_yaml_is_no_number_to_base_sixty(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(f"cluster:\n  num_workers: {text}\n")

    assert load_config(CaptionConfig, str(tmp_path / "run.yaml"), {}).cluster.num_workers == text
    assert parse_set(CaptionConfig, f"cluster.num_workers={text}")[2] == text


@pytest.mark.parametrize(
    ("text", "message"),
    [("model.beams=3", "model.num_beams"), ("num_beams", "GROUP.KEY=VALUE"), ("model.prompt=[", "not YAML")],
)
def test_a_set_that_means_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_set(CaptionConfig, text)


@pytest.mark.parametrize("value", ["8:", "0:4", "many"])
def test_a_range_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], value: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["caption", "a", "b", "--num-workers", value])

    assert ended.value.code == 1
    assert "--num-workers" in capsys.readouterr().err


def test_json_logs_are_one_object_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setattr(sys, "stderr", sys.stderr)  # put back at the end
    with pytest.raises(SystemExit):
        main(
            [
                "caption",
                str(tmp_path / "gone"),
                str(tmp_path / "out"),
                "--model",
                "fake",
                "--local",
                "--log-format",
                "json",
            ]
        )

    (entry,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert entry["level"] == "error"
    assert "gone" in entry["message"]
    assert set(entry) == {"time", "level", "message"}
