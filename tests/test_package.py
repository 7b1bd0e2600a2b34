"""What is installed: every file of the package that is no module has to be named in pyproject.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_BEHIND = {".py", ".pyc"}


def test_files_that_are_no_modules_are_installed_with_the_package() -> None:
    package = ROOT / "captioner"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["captioner"]
    installed = {file for pattern in patterns for file in package.glob(pattern)}
    there = {file for file in package.rglob("*") if file.is_file() and file.suffix not in LEFT_BEHIND}

    assert package / "report/page.html" in there
    assert there - installed == set()
