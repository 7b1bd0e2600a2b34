"""What `--help` shows: it fits narrow terminals, has examples, names every flag; and the file that `init` writes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from captioner.config import CaptionConfig, load_config
from captioner.data import STATUS_OK
from captioner.errors import UsageError
from captioner.store.read import read_parts
from captioner.store.table import open_table
from captioner.testing import make_folder, make_tar
from ray_jobs.cli import app, main
from ray_jobs.help import COMMAND_GROUPS, EVERYDAY, EXAMPLES
from ray_jobs.usage_errors import ALIKE, OTHER_NAMES, WITHOUT_A_FLAG, suggestions

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands
PATHS = ["", *COMMANDS, "demo train", "demo server", "models convert"]


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    return int(str(ended.value.code))


def flags_of(path: str) -> Iterator[str]:
    command = COMMANDS[path]
    for param in command.params:
        yield from (option for option in param.opts if option.startswith("--"))


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("path", PATHS)
def test_help_fits_the_terminal(
    path: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    has_all = path in COMMANDS and "--help-all" in flags_of(path)
    for flag in ("--help", "--help-all")[: 1 + has_all]:
        assert run(*path.split(), flag) == 0

    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > width] == []


@pytest.mark.parametrize("path", PATHS)
def test_help_begins_with_examples(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*path.split(), "--help") == 0

    shown = capsys.readouterr().out
    assert EXAMPLES[path]
    assert all(example in shown for example in EXAMPLES[path])
    assert shown.index("Examples:") < shown.index("Options:")


@pytest.mark.parametrize("path", ["caption", "train", "export"])
def test_all_flags_are_in_help_all_and_the_everyday_ones_in_help(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(path, "--help")
    everyday = set(re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE))
    run(path, "--help-all")
    every = set(re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE))

    assert every == {*flags_of(path), "--help"}
    assert everyday == every & set(EVERYDAY)


def test_every_command_is_in_one_group_and_every_everyday_flag_is_one() -> None:
    listed = [name for names in COMMAND_GROUPS.values() for name in names]

    assert sorted(listed) == sorted(COMMANDS)
    assert set(EVERYDAY) <= {flag for path in COMMANDS for flag in flags_of(path)} | {"--help"}


def test_init_writes_a_file_that_caption_takes_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images", 5)

    assert run("init", "images") == 0
    assert "5 images, such as '000000.png'; 5 of them with known captions" in capsys.readouterr().out
    assert load_config(CaptionConfig, "run.yaml", {}).model.name == "starter"
    assert run("caption", "--config", "run.yaml", "--local", "--model", "fake") == 0

    [rows] = read_parts(open_table("captions"), ["status"])
    assert rows["status"].to_pylist() == [STATUS_OK] * 5


def test_init_says_what_the_source_was_taken_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_tar(tmp_path / "a.tar", 2)

    assert run("init", "a.tar", "tar.yaml", "--model", "x/y", "--out", "OUT") == 0

    text = (tmp_path / "tar.yaml").read_text()
    config = load_config(CaptionConfig, "tar.yaml", {})
    assert "# a.tar is taken for WebDataset, 1 tar: its name says so" in text
    assert (config.source.path, config.model.name, config.output.path) == ("a.tar", "x/y", "OUT")
    assert max(map(len, text.splitlines())) <= 120


def test_init_names_a_command_that_a_shell_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images", 1)

    assert run("init", "images", "my run.yaml") == 0

    command = "captioner caption --config 'my run.yaml'"
    assert capsys.readouterr().out.endswith(f"wrote my run.yaml; next: {command}\n")
    assert (tmp_path / "my run.yaml").read_text().startswith(f"# Settings of a run: {command}\n")


def test_every_setting_that_init_shows_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images", 1)
    run("init", "images")

    text = re.sub(r"^  # (\w+): ", r"  \1: ", (tmp_path / "run.yaml").read_text(), flags=re.MULTILINE)
    (tmp_path / "all.yaml").write_text(text)

    config = load_config(CaptionConfig, "all.yaml", {})
    assert sum(map(len, yaml.safe_load(text).values())) > 15
    assert (config.source.limit, config.source.keep_columns, config.cluster.local) == (100, ["title"], True)
    (tmp_path / "all.yaml").write_text(text.replace("num_beams:", "beams:"))
    with pytest.raises(UsageError, match=r"unknown key 'model.beams'"):
        load_config(CaptionConfig, "all.yaml", {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["images", "taken.yaml"], "taken.yaml exists already"),
        (["nowhere"], "no such file or directory"),
        (["empty"], "no images found"),
        (["images", "no/folder.yaml"], "cannot be written"),
        (["images", "new.yaml", "--out", "\udcff"], "is not UTF-8"),
    ],
)
def test_init_refuses_in_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.yaml").write_text("mine")

    assert run("init", *words) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "taken.yaml").read_text() == "mine"
    assert not (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize("path", COMMANDS)
def test_a_flag_without_one_of_its_letters_is_suggested_whole(path: str) -> None:
    flags = [*flags_of(path)]
    for flag in flags:
        name = flag.removeprefix("--")
        typos = {f"--{name[:at]}{name[at + 1 :]}" for at in range(1, len(name))} - {*flags}
        for typo in typos if len(name) > 3 else ():
            suggested = suggestions(typo, flags)
            likeness = max(difflib.SequenceMatcher(None, suggestion, flag).ratio() for suggestion in suggested)
            assert likeness >= ALIKE, typo  # cpus and gpus are alike


def test_suggestions_are_near_or_none() -> None:
    flags = [*flags_of("caption")]

    assert suggestions("--workers", flags) == ["--num-workers"]
    assert suggestions("--column", flags) == ["--id-column", "--image-column", "--reference-column"]
    assert [suggestions(option, flags) for option in ("--verbose", "--foo", "--max", "--quiet")] == [[]] * 4
    of_any = {flag for path in COMMANDS for flag in flags_of(path)}
    assert {*OTHER_NAMES.values()} <= of_any, "each is a flag of some command"
    assert of_any.isdisjoint(WITHOUT_A_FLAG) or {"--out"} == of_any & {*WITHOUT_A_FLAG}


def test_init_says_what_to_change_where_its_model_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    make_folder(tmp_path / "images", 1)

    assert run("init", "images", "hub.yaml", "--model", "nobody/nothing") == 0
    assert "first set model.name in it, since --model nobody/nothing: neither a directory" in capsys.readouterr().out
    assert "  # CHANGE name: --model nobody/nothing" in (tmp_path / "hub.yaml").read_text()
    assert run("init", "images", "starter.yaml", "--model", "starter") == 0
    assert "wrote starter.yaml; next:" in capsys.readouterr().out
    assert "CHANGE" not in (tmp_path / "starter.yaml").read_text()
