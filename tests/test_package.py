"""What is installed: the files of the package that are no modules, and the distributions that its modules import."""

from __future__ import annotations

import ast
import json
import os
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

from captioner.testing import make_folder
from ray_jobs.cli import main

ROOT = Path(__file__).parents[1]
OWN = ("captioner", "ray_jobs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_DEVELOPERS = {"dev", "browser"}
EXTRAS = ("heif", "lora", "cuda", "quantize")
IMPORTING_OPTIONAL = {  # the modules that say what to install where it is missing
    "pillow-heif": {"captioner/imaging/formats.py"},
    "peft": {"captioner/models/adapters.py", "captioner/training/lora.py"},
    "torchao": {"captioner/models/quantized.py"},
    "bitsandbytes": {"captioner/models/quantized.py"},
    "triton": {"captioner/models/git/triton_kernels.py"},
}
IMPORTED_BY_TRANSFORMERS = {"accelerate"}  # where a Trainer is made; transformers itself does not require it


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the wheel, as an installation has them."""
    source, unpacked = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("unpacked")
    for package in OWN:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, unpacked], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = unpacked.glob("*.whl")
    shutil.unpack_archive(wheel, unpacked, "zip")
    wheel.unlink()
    return unpacked


def test_the_wheel_has_every_file_of_the_packages(unpacked: Path) -> None:
    there, installed = files_of(ROOT), files_of(unpacked)

    assert {"captioner/py.typed", "captioner/starter/model/model.safetensors"} <= there
    assert installed == there


def test_what_the_wheel_installs_runs_alone(unpacked: Path, tmp_path: Path) -> None:
    def captioner(*words: str) -> str:
        """The output of a command, run in another directory by the entry point of the wheel."""
        start = "from importlib.metadata import entry_points as e; [c] = e(group='console_scripts', name='captioner'); "
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"{start}c.load()()", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(unpacked), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert captioner("--version") == f"captioner {PROJECT['version']}\n"
    assert "the report: demo/captions/report/index.html" in captioner("demo", "--local", "--count", "4")
    record = json.loads((tmp_path / "demo/captions/run.json").read_text(encoding="utf-8"))
    assert record["counts"]["ok"] == 4


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


def test_every_extra_of_a_user_is_named_where_it_is_missing() -> None:
    texts = [file.read_text(encoding="utf-8") for package in OWN for file in (ROOT / package).rglob("*.py")]
    extras = PROJECT["optional-dependencies"].keys() - FOR_DEVELOPERS

    assert extras >= set(EXTRAS)
    assert [extra for extra in extras if not any(f"pip install 'captioner[{extra}]'" in text for text in texts)] == []


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (["train", "pairs", "out", "--model", "starter", "--lora-rank", "4"], "peft", "lora"),
        (["caption", "images", "out", "--local", "--model", "adapter"], "peft", "lora"),
        (["caption", "images", "out", "--local", "--model", "starter", "--quantize", "int8"], "torchao", "quantize"),
        (["try", "images/no.jpg", "--model", "starter", "--quantize", "int4"], "bitsandbytes", "quantize"),
        *((["demo", "server"], package, "demo-server") for package in ("fastapi", "uvicorn", "openai")),
    ],
)
def test_a_command_names_the_extra_that_it_misses(
    words: list[str],
    package: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    make_folder(tmp_path / "images", 2)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "starter"}')
    (tmp_path / "adapter/adapter_model.safetensors").touch()

    with pytest.raises(SystemExit) as ended:
        main(words)

    assert ended.value.code == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("captioner: error: ")
    assert error.endswith(f"; pip install 'captioner[{extra}]'")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `make setup` reads, and a uv that writes down what it is asked for."""
    for name in ("MAKEFLAGS", "MFLAGS", "PIP_ARGS"):  # of a make that runs these tests
        monkeypatch.delenv(name, raising=False)
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


def files_of(root: Path) -> set[str]:
    """Files of the packages below a directory, without what Python compiled."""
    files = (file for package in OWN for file in (root / package).rglob("*"))
    return {str(file.relative_to(root)) for file in files if file.is_file() and file.suffix != ".pyc"}


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
