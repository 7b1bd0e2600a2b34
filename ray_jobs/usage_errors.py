"""Say what is wrong with a command line that typer cannot parse: near flags, and where its help is."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

# How alike a flag must be to be suggested, from 0 to 1: 0.75 takes two exchanged or one missing letter of a short word.
ALIKE = 0.75
MAX_SUGGESTED = 3
# Flags of other programs, and the flag that does the same here. Suggested only where the command has it.
OTHER_NAMES = {
    "--dry-run": "--plan-only",
    "--epochs": "--num-train-epochs",
    "--force": "--overwrite",
    "--format": "--to",
    "--jobs": "--num-workers",
    "--lr": "--learning-rate",
    "--max-length": "--max-new-tokens",
    "--n-gpus": "--num-workers",
    "--num-gpus": "--num-workers",
    "--processes": "--num-workers",
}
# Flags of other programs for what is said without a flag here.
WITHOUT_A_FLAG = {
    **dict.fromkeys(("--input", "--input-dir", "--source", "--images-dir"), "SOURCE"),
    **dict.fromkeys(("-o", "--output", "--out", "--output-dir"), "OUT"),
}
_OF_SEVERAL_WORDS = "put paths with spaces in quotes"


def describe(error: Any) -> str:
    """Return the error of a command line as one line. `error`: a `typer.TyperException`."""
    message, context = error.format_message().rstrip("."), getattr(error, "ctx", None)
    path = context.command_path if context else "captioner"
    option = getattr(error, "option_name", None)
    if option is not None and message.startswith("No such option"):
        message = f"No such option: {option}{_advice(option, context)}"
    elif "unexpected extra argument" in message:
        message = f"{message}; {_OF_SEVERAL_WORDS}"
    return f"{message} See {path} --help" if message.endswith("?") else f"{message}; see {path} --help"


def _advice(option: str, context: Any) -> str:
    commands = getattr(context.command, "commands", None) if context else None
    if commands:
        name = next((name for name, command in commands.items() if option in _flags_of(command)), "")
        return f"; flags stand after the command: {context.command_path} {name} ... {option}" if name else ""
    command = context.command if context else None
    metavar = WITHOUT_A_FLAG.get(option)
    if command and metavar and any(param.metavar == metavar for param in command.params):
        return f"; {metavar} is given without a flag"
    near = suggestions(option, _flags_of(command)) if command else []
    return f"; did you mean {' or '.join(near)}?" if near else ""


def suggestions(option: str, flags: Collection[str]) -> list[str]:
    """Return the flags that `option` may have meant, the most likely first; most often one or none.

    They do the same in other programs, are written almost alike, or have all of its words: --num-workers for
    --workers.
    """
    if OTHER_NAMES.get(option) in flags:
        return [OTHER_NAMES[option]]
    names = {flag.removeprefix("--"): flag for flag in flags}
    name = option.removeprefix("--").replace("_", "-").lower()
    near = [names[alike] for alike in difflib.get_close_matches(name, names, n=1, cutoff=ALIKE)]
    words = set(name.split("-"))
    with_words = [flag for other, flag in names.items() if words < set(other.split("-"))]
    return [*dict.fromkeys(near + (with_words if len(with_words) <= MAX_SUGGESTED else []))]


def _flags_of(command: Any) -> list[str]:
    return [flag for param in command.params for flag in param.opts if flag.startswith("--")]
