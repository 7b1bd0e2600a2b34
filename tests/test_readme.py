"""What the README names is there: flags, commands, files, tests, exit codes, columns."""

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from captioner.data import CAPTIONS_SCHEMA, ERROR_CODES
from captioner.errors import EXIT_CODES
from ray_jobs.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text()
NAMING_FILES = ("CONTRIBUTING.md", "docs/promises.md", "docs/security.md")
FOR_PEOPLE = README + "".join((ROOT / name).read_text() for name in NAMING_FILES)
OTHERS_FLAGS = {"--address", "--working-dir", "--generate", "--shm-size", "--local-dir"}  # of ray, docker and hf
OTHERS_FLAGS |= {  # of model servers
    "--context-length",
    "--enable-prefix-caching",
    "--generation-config",
    "--host",
    "--limit-mm-per-prompt",
    "--max-batch-size",
    "--max-model-len",
    "--max-num-seqs",
    "--max-running-requests",
    "--mm-processor-kwargs",
    "--model-path",
    "--reasoning-parser",
    "--session-len",
}


def help_of(*command: str) -> str:
    done = [CliRunner().invoke(app, [*command, flag]) for flag in ("--help-all", "--help")]
    assert done[1].exit_code == 0, done[1].output
    return done[0].stdout + done[1].stdout


@pytest.fixture(scope="module")
def commands() -> set[str]:
    return set(typer.main.get_command(app).commands)


@pytest.fixture(scope="module")
def flags(commands: set[str]) -> set[str]:
    of_commands = {flag for command in commands for flag in re.findall(r"--[a-z][a-z-]*", help_of(command))}
    benchmarks = "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
    return of_commands | set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', benchmarks))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_and_command_is_real(document: Path, flags: set[str], commands: set[str]) -> None:
    text = document.read_text()
    lines = [line for line in text.splitlines() if "pip install" not in line]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(lines)))
    called = set(re.findall(r"^captioner ([a-z][a-z-]*)|`captioner ([a-z][a-z-]*)", text, re.MULTILINE))

    assert named - OTHERS_FLAGS <= flags
    assert {first or second for first, second in called} <= commands


def test_every_file_is_there() -> None:
    suffixes = "py|md|yaml|toml|txt|png"
    named = set(re.findall(rf"[`(]((?:[\w.-]+/)*[\w-]+\.(?:{suffixes}))[`):]", FOR_PEOPLE))
    named |= set(re.findall(r"`((?:captioner|ray_jobs|tests|docs|benchmarks)/[\w/]*)`", FOR_PEOPLE))
    named -= {"run.yaml"}

    assert len(named) > 15
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_promise_has_its_test() -> None:
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("promises.md", "faults.md"))
    promised = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", pages)

    assert len(promised) >= 80
    missing = [f"{file}::{test}" for file, test in promised if f"def {test}(" not in (ROOT / file).read_text()]
    assert missing == []


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1200


def test_the_exit_codes_are_those_of_the_program() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", README, re.MULTILINE))

    assert rows == {str(code): meaning for code, meaning in EXIT_CODES.items()}


def test_every_column_and_error_code_is_named() -> None:
    named = set(re.findall(r"`(\w+)`", README)) | set(re.findall(r"\| (\w+) (?=\|)", README))

    assert set(CAPTIONS_SCHEMA.names) <= named
    assert set(ERROR_CODES) <= named


def test_the_example_of_the_python_api_runs_as_written() -> None:
    (code,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)

    compile(code, "README.md", "exec")
    assert "CaptionBatches" in code
