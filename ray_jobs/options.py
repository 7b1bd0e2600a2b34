"""Flags made from pydantic settings: `captioner.config` says what there is, typer reads the command line.

typer checks names only; every value goes to pydantic as text, so a flag and a YAML key obey the same rule.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer

from captioner.config import Setting, Settings, load_config, settings_of

KindT = TypeVar("KindT", bound=Settings)
ConfigFile = Annotated[str | None, typer.Option(metavar="FILE.yaml", help="Settings of this run; flags win over it.")]


def takes(
    kind: type[KindT], groups: Collection[str] | None = None
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate `command(settings, **own)` so that typer gives it `kind`'s settings as arguments and flags.

    `groups`: only these groups become flags (`None`: all). `--config FILE.yaml` always comes with them. The command
    is called with the validated settings first, then its own parameters.
    """
    settings = {f"{one.group}__{one.field}": one for one in settings_of(kind) if groups is None or one.group in groups}

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def run(config: str | None = None, **values: Any) -> int:
            given: dict[str, dict[str, Any]] = {}
            for name, setting in settings.items():
                value = values.pop(name)
                if value not in (None, False, []):  # was given; a text may be given empty
                    given.setdefault(setting.group, {})[setting.field] = _to_validate(setting, value)
            return command(load_config(kind, config, given), **values)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        made = [_parameter(name, setting) for name, setting in settings.items()]
        file = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFile)
        parameters = [*own, *made, file]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


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
    if origin in (Annotated, list):
        return _type_name(parts[0])
    return {int: "N", float: "F"}.get(annotation, "TEXT")
