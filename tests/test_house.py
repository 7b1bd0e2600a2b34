"""The house rules that a reader relies on: imports run one way, and importing is light."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("ray", "torch", "transformers", "datasets", "evaluate", "pandas")

# A part may import the parts on the lines above its own, and itself; never a part on its own line or below.
LAYERS = """
    errors data console.text console.phases run.dedupe run.prefetch
    config files imaging starter run.bottleneck
    sources models store console
    scoring
    steps report starter.build
    run publishing
    pipeline training testing console.commands console.trying console.first_config
"""
# Files of one name in several packages, where they are the same thing for each.
SAME_IN_SEVERAL = {"command", "job", "parquet", "progress", "record", "webdataset"}
LEVELS = {part: level for level, line in enumerate(LAYERS.split("\n")) for part in line.split()}


def modules_in(*folders: str) -> list[str]:
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    )


MODULES = modules_in("captioner", "ray_jobs")


def test_captioner_never_imports_ray() -> None:
    offenders = [
        (module, target)
        for module in MODULES
        if module.startswith("captioner")
        for target in imports_of(module)
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
        for target in imports_of(module)
        if module.startswith("captioner.") and target.startswith("captioner.") and not may_import(module, target)
    ]

    assert offenders == []


def test_no_module_imports_itself_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for target in imports_of(module):
                if target in MODULES and target != module:
                    visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_a_reader_finds_few_names_at_the_top_and_none_twice() -> None:
    top = {module.split(".")[1] for module in MODULES if module.startswith("captioner.")}
    files = Counter(module.split(".")[-1] for module in MODULES if not is_package(module))

    assert len(top) <= 18, "a new module goes into one of the packages"
    assert {name for name, count in files.items() if count > 1} <= SAME_IN_SEVERAL


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
        "captioner.starter.render",
        "ray_jobs.caption",
        "ray_jobs.cli",
    ],
)
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout

    assert shown.strip() == "[]"


def test_tests_import_the_modules_that_they_name() -> None:
    """Else they pass only where another test has imported the module before."""
    missing = []
    for path in (ROOT / "tests").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = {f"{alias.name}." for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        named = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
        for module in named & set(MODULES):
            if not any(name.startswith(f"{module}.") for name in imported):
                missing.append(f"{path.name}: {module}")

    assert missing == []


@pytest.mark.parametrize("module", [module for module in MODULES if not module.split(".")[-1].startswith("_")])
def test_every_module_says_what_it_is(module: str) -> None:
    source = source_of(module)

    assert not source.strip() or ast.get_docstring(ast.parse(source))


# Names that say nothing of what they hold: an index, captions, a message have names of their own.
EMPTY_NAMES = {"place", "places", "found", "told", "known", "made", "said", "one", "some", "it"}


@pytest.mark.parametrize("module", modules_in("captioner", "ray_jobs", "benchmarks", "tests"))
def test_names_say_what_they_hold(module: str) -> None:
    assert {name for name in bound_names(module) if name.strip("_") in EMPTY_NAMES} == set()


NOUNS = (
    "alt texts|captions|checks|chunks|CPUs|files|GPUs|images|lines|nodes|pairs|parts|references|rows|scenes|shards|"
    "tables|tars|texts|workers"
)


@pytest.mark.parametrize("module", MODULES)
def test_nouns_follow_their_number(module: str) -> None:
    """Messages take a number with its noun from `counted`, so that one image is not "1 images"."""
    strings = [node for node in ast.walk(ast.parse(source_of(module))) if isinstance(node, ast.JoinedStr)]
    pairs = [pair for string in strings for pair in itertools.pairwise(string.values)]

    assert [
        f"line {number.lineno}: {noun.value}"
        for number, noun in pairs
        if isinstance(number, ast.FormattedValue) and isinstance(noun, ast.Constant)
        if re.match(rf" ({NOUNS})\b", str(noun.value))
    ] == []


@pytest.mark.parametrize("module", MODULES)
def test_calls_of_cuda_name_their_device_or_stream(module: str) -> None:
    """Else torch takes the calling thread's current device, which is GPU 0 in a thread that has set none."""
    calls = [node for node in ast.walk(ast.parse(source_of(module))) if isinstance(node, ast.Call) and not node.args]
    names = re.compile(r".*\.record|torch\.(cuda|xpu)\.(Stream|current_stream|synchronize|mem_get_info)")

    assert [ast.unparse(call) for call in calls if names.fullmatch(ast.unparse(call.func))] == []


# Words that a reader of a message had to guess at, and what says the same: see the table of issue 15.
UNCLEAR = {
    "passed over": "skipped",
    "committed rows stay": "progress is saved",
    "the same command goes on": "run the same command to continue",
    "mend it": "fix it",
    "hardly fit": "are no better than",
    "images a second": "images/s",
    "duplicate's caption": "caption reused",
    "bound by": "bottleneck",
    "no filesystem opens": "unknown URI scheme",
    "that no page shows": "not used on these pages",
    "was planned with source.": "was created from",
    "word errors for each word": "WER",
    "a word, on average": "mean token probability",
    "closer look": "look at the flags",
}
PAGES = sorted(
    path
    for kind in ("md", "html", "j2")
    for root in (ROOT / "captioner", ROOT / "docs")
    for path in root.rglob(f"*.{kind}")
)


@pytest.mark.parametrize("phrase", UNCLEAR)
def test_messages_are_plain(phrase: str) -> None:
    texts = {module: "\n".join(strings_of(module)) for module in MODULES}
    texts |= {path.name: path.read_text(encoding="utf-8") for path in PAGES}

    assert [name for name, text in texts.items() if phrase in text.casefold()] == [], f"say “{UNCLEAR[phrase]}”"


@cache
def strings_of(module: str) -> list[str]:
    """Every text in the code of a module, without its docstrings."""
    tree = ast.parse(source_of(module))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [text for text in constants if isinstance(text, str) and text not in docstrings]


def bound_names(module: str) -> Iterator[str]:
    """Every name that the module gives to a value, an argument, an attribute, a function or a class."""
    for node in ast.walk(ast.parse(source_of(module))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name


def may_import(module: str, target: str) -> bool:
    own, other = part_of(module), part_of(target)
    return own is not None and other is not None and (own == other or LEVELS[other] < LEVELS[own])


def part_of(module: str) -> str | None:
    """The longest name in LAYERS that the module lies in: "sources" for captioner.sources.folder."""
    path = module.removeprefix("captioner.")
    return next((part for part in sorted(LEVELS, key=len, reverse=True) if f"{path}.".startswith(f"{part}.")), None)


@cache
def imports_of(module: str) -> list[str]:
    """What it imports anywhere, inside functions too; not what it imports when it is run as a program."""
    return list(_imports(ast.parse(source_of(module))))


def _imports(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "__name__ == '__main__'":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            assert child.level == 0, "imports here are absolute"
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in MODULES else child.module for name in names)
        yield from _imports(child)


def source_of(module: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    return (path / "__init__.py" if is_package(module) else path.with_suffix(".py")).read_text(encoding="utf-8")


def is_package(module: str) -> bool:
    return ROOT.joinpath(*module.split(".")).is_dir()
