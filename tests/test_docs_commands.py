"""Every command line that README and docs show is one that its command takes as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from ray_jobs.cli import app
from ray_jobs.help import EXAMPLES
from ray_jobs.options import settings_of_call
from ray_jobs.submit import resolve_arguments

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def shown_lines(document: Path) -> list[str]:
    """The lines of its code blocks, fenced or indented, without comments and redirections."""
    text = document.read_text(encoding="utf-8")
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    indented = "\n".join(re.findall(r"^    (\S.*)$", text, re.MULTILINE))
    lines = [re.sub(r"\s+(#|>).*$", "", line) for line in f"{fenced}\n{indented}".splitlines()]
    return [line for line in lines if not line.endswith("...")]


def commands_of(program: str) -> list[tuple[str, str]]:
    return [(file.name, line) for file in DOCUMENTS for line in shown_lines(file) if line.startswith(f"{program} ")]


HELP = [("--help", example.replace("\\\n", "")) for examples in EXAMPLES.values() for example in examples]


@pytest.mark.parametrize(("document", "line"), [*commands_of("captioner"), *HELP])
def test_the_command_line_takes_what_the_documents_show(
    document: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run.yaml", "train.yaml"):
        (tmp_path / name).write_text("model: {name: starter}\n")
    _, name, *words = shlex.split(line)
    commands = typer.main.get_command(app).commands
    if name == "submit":
        assert resolve_arguments(commands, words[words.index("--") + 1 :])
    command = commands[name]
    while words and words[0] in getattr(command, "commands", ()):
        command = command.commands[words.pop(0)]
    values = command.make_context(name, words).params
    settings = settings_of_call(command.callback, values)

    assert settings is None or settings[0]


def test_every_document_with_commands_is_looked_at() -> None:
    commands = commands_of("captioner")

    assert len(commands) > 30
    assert {"README.md", "aws.md", "first-10000.md", "quality.md", "train.md", "when-something-fails.md"} <= {
        document for document, _ in commands
    }


@pytest.mark.parametrize(("document", "line"), commands_of("ray"))
def test_commands_of_ray_are_there(document: str, line: str) -> None:
    from ray.scripts.scripts import cli

    _, name, *words = shlex.split(line)
    command = cli.commands[name]
    flags = {flag for option in command.params for flag in option.opts}
    files = [word for word in words if word.endswith(".yaml")]

    assert {word for word in words if word.startswith("--")} <= flags
    assert all((ROOT / file).exists() for file in files)
