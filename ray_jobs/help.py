"""The help of the command line: what a command does, examples, and its flags in groups.

`--help` shows the flags of every day, `--help-all` all of them. Plain text, for 60 columns and more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from captioner.errors import EXIT_CODES

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "captioner demo",
        "captioner try photo.jpg --model microsoft/git-base-coco",
        "captioner init photos/",
        "captioner caption --config run.yaml",
    ),
    "caption": (
        "captioner caption photos/ captions/ --model starter",
        "captioner caption --config run.yaml --limit 100",
        "captioner caption photos/ captions/ \\\n      --endpoint http://localhost:8000/v1",
        "captioner caption photos/ captions/ --retry-failed",
    ),
    "init": ("captioner init photos/", "captioner init shards/ run.yaml --out captions/"),
    "doctor": ("captioner doctor --address auto --model starter",),
    "estimate": (
        "captioner estimate photos/ --model starter",
        "captioner estimate photos/ --sample 64 --model starter",
    ),
    "submit": (
        "captioner submit -- caption s3://b/in s3://b/out \\\n      --model starter",
        "captioner submit --no-wait -- check s3://b/out",
    ),
    "try": (
        "captioner try photo.jpg --model starter",
        "captioner try a.jpg b.jpg --num-beams 3 --model starter",
        "captioner try a.jpg --model starter --model models/git \\\n      --page models.html",
    ),
    "verify": ("captioner verify captions/",),
    "status": ("captioner status captions/",),
    "check": (
        "captioner check captions/",
        "captioner check captions/ --references refs.jsonl",
        "captioner check captions/ --max-flagged 0.1",
    ),
    "judge": (
        "captioner judge captions/ \\\n      --model openai/clip-vit-base-patch32",
        "captioner judge captions/ --model clip/ --local",
    ),
    "report": ("captioner report captions/ --open",),
    "alt-text": ("captioner alt-text captions/", "captioner alt-text captions/ --max-chars 100"),
    "spot-check": (
        "captioner spot-check captions/ --sample 200 --open",
        "captioner spot-check captions/ --by folder --reviewer ana",
    ),
    "review": ("captioner review captions/ --open", "captioner review captions/ --queue random"),
    "export": (
        "captioner export captions/ texts.csv --to csv",
        "captioner export captions/ --to xmp --beside-originals",
        "captioner export captions/ --to html --html-dir site/ \\\n      --dry-run",
    ),
    "feedback": ("captioner feedback captions/ pairs/",),
    "models": ("captioner models", "captioner models convert DIR OUT"),
    "models convert": ("captioner models convert vit-gpt2/ vit-gpt2-safe/",),
    "render-scenes": ("captioner render-scenes scenes/ --count 100",),
    "train": (
        "captioner train pairs/ trained/ --model starter",
        "captioner train pairs/ trained/ --lora-rank 16 --bf16",
        "captioner train --config train.yaml",
    ),
    "demo": ("captioner demo", "captioner demo --local", "captioner demo train"),
    "demo train": ("captioner demo train",),
    "demo server": ("captioner demo server",),
}
COMMAND_GROUPS = {
    "Captions": ("caption", "init", "try", "status", "verify", "check", "judge", "spot-check", "report"),
    "Alt texts": ("alt-text", "review", "export"),
    "Training": ("train", "feedback"),
    "Clusters": ("doctor", "estimate", "submit"),
    "Models and examples": ("models", "render-scenes", "demo"),
}
# The flags that --help shows of a command that has more than FEW of them, besides the command's own.
FEW = 12
EVERYDAY = (
    *("--model", "--endpoint", "--prompt", "--num-beams", "--max-new-tokens", "--batch-size", "--device"),
    *("--include", "--limit", "--keep-columns", "--local", "--address", "--num-workers"),
    *("--retry-failed", "--extend", "--only", "--references", "--max-wer", "--max-flagged"),
    *("--num-train-epochs", "--learning-rate", "--per-device-train-batch-size", "--lora-rank", "--bf16"),
    *("--to", "--include-unreviewed", "--update", "--dry-run", "--beside-originals", "--html-dir"),
    *("--config", "--help", "--help-all"),
)
GROUP_TITLES = {
    "source": "Images",
    "data": "Training data",
    "model": "Model",
    "cluster": "Where it runs",
    "output": "Output",
    "check": "Checks",
    "training": "Training",
    "alt_text": "Alt texts",
    "export": "Export",
}
_SHOW_ALL = "captioner.help_all"


def _show_all(context: typer.Context, is_given: bool) -> None:
    if is_given:
        context.meta[_SHOW_ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


HelpAll = Annotated[
    bool, typer.Option("--help-all", callback=_show_all, is_eager=True, help="Show all options and exit.")
]


class Command(TyperCommand):
    """A command whose help has examples, and its flags in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write examples, arguments and options, below the text of the command."""
        _write_examples(formatter, ctx.command_path.partition(" ")[2])
        params = [(param, record) for param in self.get_params(ctx) if (record := param.get_help_record(ctx))]
        arguments = [(name.split(" <")[0], text) for param, (name, text) in params if _is_argument(param)]
        _write_section(formatter, "Arguments", arguments)
        options = [(param, record) for param, record in params if not _is_argument(param)]
        shows_all = ctx.meta.get(_SHOW_ALL) or len(options) <= FEW
        everyday = [(param, record) for param, record in options if len(options) <= FEW or _is_everyday(param)]
        _write_section(formatter, "Options", [record for _, record in sorted(everyday, key=_rank)])
        rest = [option for option in options if option not in everyday]
        if not shows_all:
            formatter.write_paragraph()
            formatter.write_text(f"{len(rest)} more options: {ctx.command_path} --help-all")
            return
        for title in dict.fromkeys(_title(param) for param, _ in rest):
            _write_section(formatter, title, [record for param, record in rest if _title(param) == title])


class Group(TyperGroup):
    """The group of all commands, whose help lists them by what they are for, and the exit codes."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write examples, the commands in their groups, and the options."""
        _write_examples(formatter, ctx.command_path.partition(" ")[2])
        groups = {"Commands": tuple(self.commands)} if ctx.parent else COMMAND_GROUPS
        for title, names in groups.items():
            rows = [(name, _first_sentence(self.commands[name].help)) for name in names]
            _write_section(formatter, title, rows)
        options = [record for param in self.get_params(ctx) if (record := param.get_help_record(ctx))]
        _write_section(formatter, "Options", options)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the exit codes, below the help of the whole program."""
        if ctx.parent:
            return
        _write_section(formatter, "Exit codes", [(str(code), meaning) for code, meaning in EXIT_CODES.items()])


def _write_examples(formatter: Any, command: str) -> None:
    if examples := EXAMPLES.get(command):
        with formatter.section("Examples"):
            formatter.write("".join(f"  {example}\n" for example in examples))


def _write_section(formatter: Any, title: str, rows: Iterable[tuple[str, str]]) -> None:
    if rows := list(rows):
        with formatter.section(title):
            formatter.write_dl(rows, col_max=22 if formatter.width < 80 else 30)


def _first_sentence(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


def _is_argument(param: Any) -> bool:
    return bool(param.param_type_name == "argument")


def _is_everyday(param: Any) -> bool:
    is_own = _group_of(param) not in GROUP_TITLES and param.name not in _COMMON
    return is_own or any(name in EVERYDAY for name in param.opts)


def _rank(option: tuple[Any, Any]) -> int:
    """Return where an option stands among those of every day; a command's own options come first."""
    return max((EVERYDAY.index(name) for name in option[0].opts if name in EVERYDAY), default=-1)


_COMMON = {"set_", "print_config", "log_format"}


def _group_of(param: Any) -> str:
    """Return the group of settings that the parameter belongs to: see `ray_jobs.options.SettingsFlags`."""
    return str(param.name).partition("__")[0]


def _title(param: Any) -> str:
    return GROUP_TITLES.get(_group_of(param), "Settings and logs")
