"""The house rules that a reader relies on: imports run one way, and importing is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("ray", "torch", "transformers", "datasets", "evaluate")

# A part may import the parts on the lines above its own, and itself; never a part on its own line or below.
LAYERS = """
    errors
    text tiff
    config data devices scenes stopping dedupe bottleneck ahead
    files starter samples
    sources imaging models store
    scoring faults
    alttext
    steps recaption binding review exports
    job progress
    record summary report
    quality tiny_models
    pipeline commands batches training testing starter.build
"""
LEVELS = {part: level for level, line in enumerate(LAYERS.split("\n")) for part in line.split()}
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("captioner", "ray_jobs")
    for path in (ROOT / package).rglob("*.py")
)


def test_captioner_never_imports_ray() -> None:
    offenders = [
        (module, target)
        for module in MODULES
        if module.startswith("captioner")
        for target, _ in imports_of(module)
        if target.split(".")[0] in ("ray", "ray_jobs")
    ]

    assert offenders == []


def test_every_part_of_captioner_has_its_layer() -> None:
    without = [module for module in MODULES if module.startswith("captioner.") and part_of(module) is None]

    assert without == [], "add the new part to LAYERS"


def test_imports_run_down_the_layers() -> None:
    offenders = [
        f"{module} imports {target}"
        for module in MODULES
        for target, _ in imports_of(module)
        if module.startswith("captioner.") and target.startswith("captioner.") and not may_import(module, target)
    ]

    assert offenders == []


def test_no_module_imports_itself_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for target, at_import in imports_of(module):
                if at_import and target in MODULES and target != module:
                    visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize(
    "module",
    [
        "captioner",
        "captioner.config",
        "captioner.data",
        "captioner.sources",
        "captioner.imaging",
        "captioner.models",
        "captioner.store",
        "captioner.pipeline",
        "captioner.samples",
        "ray_jobs.caption",
        "ray_jobs.cli",
    ],
)
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout

    assert shown.strip() == "[]"


@pytest.mark.parametrize("module", [module for module in MODULES if not module.split(".")[-1].startswith("_")])
def test_every_module_says_what_it_is(module: str) -> None:
    source = source_of(module)

    assert not source.strip() or ast.get_docstring(ast.parse(source))


def may_import(module: str, target: str) -> bool:
    own, other = part_of(module), part_of(target)
    return own is not None and other is not None and (own == other or LEVELS[other] < LEVELS[own])


def part_of(module: str) -> str | None:
    """The longest name in LAYERS that the module lies in: "sources" for captioner.sources.folder."""
    path = module.removeprefix("captioner.")
    return next((part for part in sorted(LEVELS, key=len, reverse=True) if f"{path}.".startswith(f"{part}.")), None)


@cache
def imports_of(module: str) -> list[tuple[str, bool]]:
    """(imported module, whether at import time) for each import, those inside functions included."""
    return list(_imports(ast.parse(source_of(module)), at_import=True))


def _imports(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, at_import) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            assert child.level == 0, "imports here are absolute"
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from ((name if name in MODULES else child.module, at_import) for name in names)
        inside_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(child, at_import and not inside_function)


def source_of(module: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
