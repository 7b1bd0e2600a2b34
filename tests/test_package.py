"""What is installed: the files of the package that are no modules, and the distributions that its modules import."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = ("captioner", "ray_jobs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = ("heif", "lora")
IMPORTING_OPTIONAL = {  # the modules that say what to install where it is missing
    "pillow-heif": {"captioner/imaging/formats.py"},
    "peft": {"captioner/models/adapters.py", "captioner/training/lora.py"},
    "triton": {"captioner/models/git/triton_kernels.py"},
}
IMPORTED_BY_TRANSFORMERS = {"accelerate"}  # where a Trainer is made; transformers itself does not require it
LEFT_BEHIND = {".py", ".pyc"}


def test_files_that_are_no_modules_are_installed_with_the_package() -> None:
    package = ROOT / "captioner"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["captioner"]
    installed = {file for pattern in patterns for file in package.glob(pattern)}
    there = {file for file in package.rglob("*") if file.is_file() and file.suffix not in LEFT_BEHIND}

    assert package / "report/page.html" in there
    assert there - installed == set()


def test_dependencies_are_the_distributions_that_are_imported() -> None:
    required = declared(PROJECT["dependencies"])
    optional = {name for extra in EXTRAS for name in declared(PROJECT["optional-dependencies"][extra])}
    importing = defaultdict(set)
    for file in (file for package in OWN for file in (ROOT / package).rglob("*.py")):
        for package in imported_packages(file):
            importing[distribution_of(package)].add(str(file.relative_to(ROOT)))

    assert required | optional == importing.keys() | IMPORTED_BY_TRANSFORMERS
    assert not required & optional
    for name in optional:
        assert importing[name] == IMPORTING_OPTIONAL[name]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make setup` reads, and a uv that writes down what it is asked for."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    uv = tmp_path / "uv"
    uv.write_text("""#!/bin/sh
echo "$@" >> uv.log
[ "$1" = pip ] || { mkdir -p .venv/bin; ln -s /bin/echo .venv/bin/python; }
""")
    uv.chmod(0o755)
    return tmp_path


def test_make_takes_uv_where_there_is_one(checkout: Path) -> None:
    done = subprocess.run(
        ["make", "setup", f"UV={checkout / 'uv'}", "PYTHON="], cwd=checkout, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    venv, install = (checkout / "uv.log").read_text().splitlines()
    assert venv == "venv --quiet --python >=3.11,<3.15 .venv"
    assert install == "pip install --quiet --python .venv/bin/python -c constraints.txt -e .[dev]"
    assert "in .venv, packages by uv" in done.stdout


def test_make_says_what_to_install_where_there_is_neither_uv_nor_python(checkout: Path) -> None:
    done = subprocess.run(["make", "setup", "UV=", "PYTHON="], cwd=checkout, capture_output=True, text=True)

    assert done.returncode != 0
    assert "found neither uv nor Python 3.11 to 3.14 with venv; install one" in done.stderr


def test_the_versions_of_python_are_the_same_everywhere() -> None:
    versions = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]

    assert versions == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["requires-python"] == ">=3.11,<3.15"
    assert {f"python{version}" for version in versions} <= set((ROOT / "Makefile").read_text().split())


def declared(requirements: Iterable[str]) -> set[str]:
    return {normalised(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}


def distribution_of(package: str) -> str:
    """The distribution that a top-level package comes from; its own name where it is not installed."""
    return normalised(installed().get(package, [package])[0])


installed = cache(packages_distributions)


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imported_packages(file: Path) -> set[str]:
    """Top-level packages that a module imports anywhere, but for ours and Python's."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {module.split(".")[0] for module in modules} - {*OWN, *sys.stdlib_module_names}
