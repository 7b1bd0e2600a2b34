"""Names and captions of other people's files, on a terminal: no control character of theirs reaches it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from captioner.testing import make_folder

HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202egpj.\rfake line\n"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("archive") / f"images {HOSTILE.strip()}", 3)
    image = (root / "000000.png").read_bytes()
    (root / f"{HOSTILE}.png").write_bytes(image)
    (root / f"bad {HOSTILE}.png").write_bytes(f"no image {HOSTILE}".encode())
    return root


@pytest.fixture(scope="module")
def out(archive: Path) -> str:
    return str(archive.parent / f"out {HOSTILE.strip()}")


@pytest.fixture(scope="module")
def captioned(archive: Path, out: str) -> subprocess.CompletedProcess[str]:
    """What `caption` showed, and its table."""
    return run(["caption", str(archive), out, "--model", "fake", "--local"])


@pytest.mark.parametrize("command", ["caption", "status", "verify", "try", "missing", "usage"])
def test_nothing_of_theirs_controls_the_terminal(
    archive: Path, out: str, captioned: subprocess.CompletedProcess[str], command: str
) -> None:
    commands = {
        "status": ["status", out],
        "verify": ["verify", out],
        "try": ["try", *map(str, sorted(archive.glob("*.png"))), "--model", "starter"],
        "missing": ["caption", f"{archive}/{HOSTILE}-not-there", out, "--model", "fake", "--local"],
        "usage": ["caption", str(archive), out, "--model", HOSTILE],
    }

    done = captioned if command == "caption" else run(commands[command])

    assert done.returncode == (1 if command in ("missing", "usage") else 0), done.stderr
    assert CONTROLS.findall(done.stdout + done.stderr) == []
    assert "\nfake line" not in done.stdout + done.stderr


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLORTERM")}
    return subprocess.run(
        [sys.executable, "-m", "ray_jobs.cli", *words],
        capture_output=True,
        text=True,
        env=environment | {"TERM": "dumb"},
    )
