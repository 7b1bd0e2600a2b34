"""Make typer's flags from the pydantic settings of `captioner.config`.

typer checks names only; every value goes to pydantic as text, so a flag and a YAML key obey the same rule.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import types
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import yaml

from captioner.config import Setting, Settings, load_config, parse_yaml, settings_of
from captioner.console.logs import log_as_json
from captioner.errors import OK, UsageError
from ray_jobs.help import HelpAll

LONGEST_METAVAR = 36
ConfigFile = Annotated[str | None, typer.Option(metavar="FILE.yaml", help="Settings of this run; flags win over it.")]
SetValue = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="GROUP.KEY=VALUE", help="One setting by its YAML key; VALUE is YAML. Repeatable."),
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Show the resolved settings as YAML and stop.")]
LogFormat = Annotated[Literal["text", "json"], typer.Option(help="json: a JSON object a line, for a log collector.")]


def _keyword(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


COMMON_FLAGS = {  # of every command with settings
    "config": _keyword("config", ConfigFile),
    "set_": _keyword("set_", SetValue),
    "print_config": _keyword("print_config", PrintConfig, False),
    "log_format": _keyword("log_format", LogFormat, "text"),
    "help_all": _keyword("help_all", HelpAll, False),
}


class SettingsFlags:
    """The flags of a command for the settings `kind`. `groups`: only these groups have flags; None: all.

    `each`: the GROUP.KEY of a setting whose flag may be given several times, for settings that differ in it; or "".
    """

    def __init__(self, kind: type[Settings], groups: Collection[str] | None = None, each: str = "") -> None:
        self.kind, self.groups = kind, set(kind.model_fields) if groups is None else set(groups)
        self.each = each.replace(".", "__")
        self._settings = {
            f"{setting.group}__{setting.field}": setting
            for setting in settings_of(kind)
            if setting.group in self.groups
        }

    def parameters(self) -> list[inspect.Parameter]:
        """Return what typer makes flags and arguments of."""
        flags = (_parameter(name, setting, name == self.each) for name, setting in self._settings.items())
        return [*flags, *COMMON_FLAGS.values()]

    def resolve(self, values: Mapping[str, Any]) -> tuple[list[Settings], dict[str, Any]]:
        """Split the values of a parsed command line into validated settings and the command's own values.

        There is one settings object, or one for each value of the flag `each`. A flag wins over `--set`, and both win
        over the file of `--config`. Raises UsageError.
        """
        several = values.get(self.each) or [None]
        own = {name: value for name, value in values.items() if name not in {*self._settings, *COMMON_FLAGS}}
        return [self._resolve_one({**values, self.each: value}) for value in several], own

    def _resolve_one(self, values: Mapping[str, Any]) -> Settings:
        overrides: dict[str, dict[str, Any]] = {}
        for text in values["set_"] or []:
            group, field, value = parse_set(self.kind, text)
            overrides.setdefault(group, {})[field] = value
        for name, setting in self._settings.items():
            if is_given(values[name]):
                overrides.setdefault(setting.group, {})[setting.field] = _to_validate(setting, values[name])
        return load_config(self.kind, values["config"], overrides)


def takes(
    kind: type[Settings], groups: Collection[str] | None = None, each: str = ""
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate `command(settings, **own)`: typer then gives it the flags of `kind` beside its own parameters.

    The command is called with the validated settings first; with a list of them where there is an `each`. `groups`,
    `each`: see `SettingsFlags`.
    """
    flags = SettingsFlags(kind, groups, each)

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def run(**values: Any) -> int:
            if values["log_format"] == "json":
                log_as_json()
            settings, own = flags.resolve(values)
            if values["print_config"]:
                typer.echo("---\n".join(to_yaml(config, flags.groups) for config in settings), nl=False)
                return OK
            return command(settings if each else settings[0], **own)

        # typer reads the signature: the settings are replaced by their flags.
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        vars(run)["flags"] = flags
        vars(run)["__signature__"] = inspect.Signature([*own, *flags.parameters()])
        return run

    return decorate


def is_given(value: Any) -> bool:
    """Return whether the command line gives this value of a flag or argument; "" and 0 are given.

    A list flag that is absent is `()` to click, and None to a command that typer calls.
    """
    return not (value is None or value is False or value in ([], ()))


def settings_of_call(command: Any, values: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]] | None:
    """Return the settings of a parsed command line, and the command's own values; None for one without settings."""
    command = inspect.unwrap(command, stop=lambda function: hasattr(function, "flags"))
    if not hasattr(command, "flags"):
        return None
    (settings, *_), own = command.flags.resolve(values)
    if values["log_format"] != "text":
        own["log_format"] = values["log_format"]
    return type(settings).model_validate({group: getattr(settings, group) for group in command.flags.groups}), own


def parse_set(kind: type[Settings], text: str) -> tuple[str, str, Any]:
    """Parse a text such as `model.num_beams=3` into (group, key, value). Raises UsageError naming the nearest key."""
    path, equals, value = text.partition("=")
    settings = {f"{setting.group}.{setting.field}": setting for setting in settings_of(kind)}
    if not equals or path not in settings:
        near = difflib.get_close_matches(path, settings, n=1) or [next(iter(settings))]
        raise UsageError(f"--set {text}: should be GROUP.KEY=VALUE; did you mean {near[0]}=...?")
    try:
        return settings[path].group, settings[path].field, parse_yaml(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text}: the value is not YAML: {' '.join(str(error).split())}") from None


def to_yaml(config: Settings, groups: Collection[str]) -> str:
    """Return the settings of these groups as a file that --config reads."""
    tree = config.model_dump(mode="json", include=set(groups))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _parameter(name: str, setting: Setting, repeatable: bool = False) -> inspect.Parameter:
    """Return a typer parameter whose value is None (`[]`, False) where the command line does not give it."""
    help_text = setting.info.description or ""
    if setting.argument:
        info: Any = typer.Argument(metavar=setting.argument, help=help_text, show_default=False)
        return _keyword(name, Annotated[str | None, info])
    default = setting.info.get_default()
    shown_default = "" if default in (None, "", False, []) else f" [default: {default}]"
    is_flag = setting.info.annotation is bool
    metavar = _metavar(setting)
    help_text += " Repeatable." if repeatable else ""
    if len(metavar) > LONGEST_METAVAR:  # a list of choices that is wider than a narrow terminal has space for
        metavar, help_text = "KIND", f"{help_text} One of {metavar.replace('|', ', ')}."
    info = typer.Option(
        setting.flag, metavar=None if is_flag else metavar, help=help_text + shown_default, show_default=False
    )
    if is_flag:
        return _keyword(name, Annotated[bool, info], default=False)
    return _keyword(name, Annotated[list[str] | None if repeatable or _is_list(setting) else str | None, info])


def _to_validate(setting: Setting, value: Any) -> Any:
    return ",".join(value) if setting.is_comma_list else value


def _is_list(setting: Setting) -> bool:
    return get_origin(setting.info.annotation) is list


def _metavar(setting: Setting) -> str:
    return setting.metavar or ("A,B" if setting.is_comma_list else _type_name(setting.info.annotation))


def _type_name(annotation: Any) -> str:
    """Return a type as help shows it: N, F, TEXT, or the choices."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return "|".join(_type_name(part) for part in parts if part is not type(None))
    if origin in (Annotated, list):
        return _type_name(parts[0])
    return {int: "N", float: "F"}.get(annotation, "TEXT")
