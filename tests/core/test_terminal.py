"""Names and captions of other people's files, on a terminal: no control character of theirs reaches it."""

import re
from pathlib import Path

import pytest
from helpers import caption_config

from captioner import pipeline
from captioner.testing import make_folder
from ray_jobs.cli import main

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
    path = archive.parent / f"out {HOSTILE.strip()}"
    pipeline.run(caption_config(archive, path))
    return str(path)


@pytest.mark.parametrize("command", ["caption", "status", "verify", "try", "missing", "usage"])
def test_nothing_of_theirs_controls_the_terminal(
    archive: Path, out: str, command: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = {
        "caption": ["caption", str(archive), f"{out}2", "--model", "fake", "--local"],
        "status": ["status", out],
        "verify": ["verify", out],
        "try": ["try", *map(str, sorted(archive.glob("*.png"))), "--model", "starter"],
        "missing": ["caption", f"{archive}/{HOSTILE}-not-there", out, "--model", "fake", "--local"],
        "usage": ["caption", str(archive), out, "--model", HOSTILE],
    }
    for name in ("FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "dumb")

    with pytest.raises(SystemExit) as ended:
        main(commands[command])

    shown = "".join(capfd.readouterr())
    assert ended.value.code == (1 if command in ("missing", "usage") else 0), shown
    assert CONTROLS.findall(shown) == []
    assert "\nfake line" not in shown
