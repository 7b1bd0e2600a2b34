"""`make docs` makes API pages of the docstrings; here the same command builds a few modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from captioner.errors import SourceError

ROOT = Path(__file__).parents[1]


def test_api_pages_are_built_of_docstrings(tmp_path: Path) -> None:
    (recipe,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "-m pdoc" in line]
    command = recipe.replace("$(DOCS_MODULES)", "captioner.errors captioner.data").replace("build/docs", str(tmp_path))
    arguments = command.split()
    assert arguments.pop(0) == "$(BIN)/python"

    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    page = (tmp_path / "captioner/errors.html").read_text()
    assert SourceError.__name__ in page
    assert (tmp_path / "captioner/data.html").exists()
