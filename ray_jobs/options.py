"""Flags made from pydantic settings: `captioner.config` says what there is, typer reads the command line.

typer checks names only; every value goes to pydantic as text, so a flag and a YAML key obey the same rule.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import types
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
import yaml

from captioner.config import PoolSize, Setting, Settings, load_config, parse_yaml, settings_of
from captioner.console.logs import log_as_json
from captioner.errors import OK, UsageError

KindT = TypeVar("KindT", bound=Settings)
ConfigFile = Annotated[str | None, typer.Option(metavar="FILE.yaml", help="Settings of this run; flags win over it.")]
SetValue = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="GROUP.KEY=VALUE", help="One setting by its YAML key; VALUE is YAML. Repeatable."),
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Show the resolved settings as YAML and stop.")]

LogFormat = Annotated[Literal["text", "json"], typer.Option(help="json: a JSON object a line, for a log collector.")]


def takes(
    kind: type[KindT], groups: Collection[str] | None = None
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate `command(settings, **own)` so that typer gives it `kind`'s settings as arguments and flags.

    `groups`: only these groups become flags (`None`: all). `--config FILE.yaml`, `--set`, `--print-config` and
    `--log-format` always
    come with them; a flag wins over `--set`, and both over the file. The command is called with the validated settings
    first, then its own parameters. The decorated command's `resolve(values)` gives both without calling it.
    """
    settings = {f"{one.group}__{one.field}": one for one in settings_of(kind) if groups is None or one.group in groups}

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def run(print_config: bool = False, log_format: str = "text", **values: Any) -> int:
            if log_format == "json":
                log_as_json()
            resolved, values = resolve(values)
            if print_config:
                typer.echo(to_yaml(resolved, groups), nl=False)
                return OK
            return command(resolved, **values)

        def resolve(values: dict[str, Any]) -> tuple[KindT, dict[str, Any]]:
            values = dict(values)
            given: dict[str, dict[str, Any]] = {}
            for one in values.pop("set_", None) or []:
                group, field, value = parse_set(kind, one)
                given.setdefault(group, {})[field] = value
            for name, setting in settings.items():
                value = values.pop(name)
                if value not in (None, False, []):  # was given; a text may be given empty
                    given.setdefault(setting.group, {})[setting.field] = _to_validate(setting, value)
            return load_config(kind, values.pop("config", None), given), values

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        made = [_parameter(name, setting) for name, setting in settings.items()]
        file = [
            _keyword("config", ConfigFile),
            _keyword("set_", SetValue),
            _keyword("print_config", PrintConfig, False),
        ]
        parameters = [*own, *made, *file, _keyword("log_format", LogFormat, "text")]
        run.resolve = resolve  # type: ignore[attr-defined]
        run.groups = set(kind.model_fields) if groups is None else set(groups)  # type: ignore[attr-defined]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def settings_of_call(command: Any, values: dict[str, Any]) -> tuple[Settings, dict[str, Any]] | None:
    """The settings a parsed command line has flags for, and its own parameters. None: it takes no settings."""
    command = inspect.unwrap(command, stop=lambda one: hasattr(one, "resolve"))
    if not hasattr(command, "resolve"):
        return None
    resolved, own = command.resolve(values)
    own.pop("print_config", None)
    if own.get("log_format") == "text":
        del own["log_format"]
    kept = {group: getattr(resolved, group) for group in command.groups}
    return type(resolved).model_validate(kept), own


def parse_set(kind: type[Settings], text: str) -> tuple[str, str, Any]:
    """`model.num_beams=3` as (group, key, value). Raises UsageError naming the nearest known key."""
    path, equals, value = text.partition("=")
    known = {f"{one.group}.{one.field}": one for one in settings_of(kind)}
    if not equals or path not in known:
        near = difflib.get_close_matches(path, known, n=1) or [next(iter(known))]
        raise UsageError(f"--set {text}: should be GROUP.KEY=VALUE; did you mean {near[0]}=...?")
    try:
        return known[path].group, known[path].field, parse_yaml(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text}: the value is not YAML: {' '.join(str(error).split())}") from None


def to_yaml(config: Settings, groups: Collection[str] | None = None) -> str:
    """Settings as a file that --config reads."""
    tree = config.model_dump(mode="json", include=None if groups is None else set(groups))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _parameter(name: str, setting: Setting) -> inspect.Parameter:
    """A typer parameter whose value is `None` (`[]`, `False`) where the command line does not give it."""
    help_text = setting.info.description or ""
    if setting.argument:
        info: Any = typer.Argument(metavar=setting.argument, help=help_text, show_default=False)
        return _keyword(name, Annotated[str | None, info])
    default = setting.info.get_default()
    if default not in (None, "", False, []):
        help_text += f" [default: {default}]"
    is_flag = setting.info.annotation is bool
    info = typer.Option(
        setting.flag, metavar=None if is_flag else _metavar(setting), help=help_text, show_default=False
    )
    if is_flag:
        return _keyword(name, Annotated[bool, info], default=False)
    return _keyword(name, Annotated[list[str] | None if _is_list(setting) else str | None, info])


def _keyword(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _to_validate(setting: Setting, value: Any) -> Any:
    return ",".join(value) if setting.is_comma_list else value


def _is_list(setting: Setting) -> bool:
    return get_origin(setting.info.annotation) is list


def _metavar(setting: Setting) -> str:
    return "A,B" if setting.is_comma_list else _type_name(setting.info.annotation)


def _type_name(annotation: Any) -> str:
    """A type as help shows it: N, FRACTION, TEXT, or the choices."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return "|".join(_type_name(part) for part in parts if part is not type(None))
    if annotation == get_args(PoolSize)[-1]:
        return "MIN:MAX"
    if origin in (Annotated, list):
        return _type_name(parts[0])
    return {int: "N", float: "F"}.get(annotation, "TEXT")
