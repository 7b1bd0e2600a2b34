"""Everything a person can set. Flags and YAML are made from these models; nothing else reads either.

A YAML file has the shape of `CaptionConfig` (`source:`, `model:`, ...); a flag is a field's name with dashes. Defaults
are here and nowhere else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from captioner.errors import UsageError


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


CommaList = Annotated[list[str], BeforeValidator(_split_commas)]
AutoInt = Annotated[int, Field(ge=1)] | Literal["auto"]
PoolSize = AutoInt | Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")]  # "MIN:MAX" grows and shrinks


class Settings(BaseModel):
    """Base of every group of settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class SourceConfig(Settings):
    """Which pictures."""

    path: str = Field(
        "",
        description="Folder, WebDataset tar(s), Parquet, Hugging Face dataset or manifest.",
        json_schema_extra={"argument": "SOURCE"},
    )
    include: list[str] = Field([], description="Only image ids that match one of these globs.")
    exclude: list[str] = Field([], description="No image id that matches one of these globs.")
    split: str = Field("train", description="Split of a Hugging Face dataset.")
    image_column: str | None = Field(None, description="Column with bytes, struct{bytes,path}, path or uri.")
    id_column: str | None = Field(None, description="Column with a unique id for each picture.")
    reference_column: str | None = Field(None, description="Column with known captions (text or list of text).")
    keep_columns: CommaList = Field([], description="Source columns to carry into the table, comma-separated.")
    limit: int | None = Field(None, ge=1, description="Plan only the first N pictures.")
    max_pixels: int = Field(300_000_000, ge=1, description="Larger pictures fail as too_many_pixels, unopened.")


class ModelConfig(Settings):
    """Which model, and how it writes captions."""

    name: str = Field(
        "", description="starter, a model directory, a hub id or a URI.", json_schema_extra={"flag": "model"}
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    prompt: str | None = Field(None, description="Text the caption starts from, or the question to a chat model.")
    num_beams: int = Field(1, ge=1, description="Beams of the search; 1 is greedy.")
    max_new_tokens: int = Field(40, ge=1, description="Longest caption, in tokens.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights and arithmetic; auto is bfloat16 on a GPU, float32 on a CPU."
    )
    batch_size: AutoInt = Field("auto", description="Pictures for each forward pass.")


class ClusterConfig(Settings):
    """On what machines."""

    address: str | None = Field(None, description="Ray cluster to join; without it a local Ray is started.")
    local: bool = Field(False, description="One process, without Ray: same table, same resume.")
    num_workers: PoolSize = Field(
        "auto", description="Caption workers; auto is one for each GPU, or node; MIN:MAX grows when nodes join."
    )
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs of each worker; default 1 where there are GPUs."
    )
    decode_cpus: AutoInt = Field("auto", description="CPUs that read and decode pictures.")


class OutputConfig(Settings):
    """Where the table goes, and what to do with rows that are already there."""

    path: str = Field(
        "",
        description="Directory of the captions table; local or a URI (s3://, gs://).",
        json_schema_extra={"argument": "OUT"},
    )
    plan_only: bool = Field(False, description="List the source into OUT/plan and stop. Needs no model.")
    overwrite: bool = Field(False, description="Discard what OUT holds and start again.")
    retry_failed: bool = Field(False, description="Caption the failed pictures again; new rows supersede old ones.")
    extend: bool = Field(False, description="Add the pictures that are new in the source.")
    max_failed: float = Field(1.0, ge=0, le=1, description="Exit 2 when a larger share of the pictures failed.")
    rows_per_file: int = Field(50_000, ge=1, description="About how many rows each published file holds.")


class CaptionConfig(Settings):
    """`captioner caption`."""

    source: SourceConfig = SourceConfig()
    model: ModelConfig = ModelConfig()
    cluster: ClusterConfig = ClusterConfig()
    output: OutputConfig = OutputConfig()


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a tree of settings, and what the command line calls it."""

    group: str
    field: str
    info: FieldInfo

    @property
    def argument(self) -> str | None:
        """The name of the positional argument, where it is one: "SOURCE"."""
        return self._extra("argument")

    @property
    def flag(self) -> str:
        """The name of the flag: "--batch-size"."""
        return f"--{self._extra('flag') or self.field.replace('_', '-')}"

    @property
    def is_comma_list(self) -> bool:
        return any(isinstance(part, BeforeValidator) for part in self.info.metadata)

    def _extra(self, key: str) -> str | None:
        extra = self.info.json_schema_extra
        value = extra.get(key) if isinstance(extra, dict) else None
        return value if isinstance(value, str) else None


def settings_of(kind: type[Settings]) -> Iterator[Setting]:
    """Every field of every group, in order."""
    for group in kind.model_fields:
        for field, info in _fields_at(kind, [group]).items():
            yield Setting(group, field, info)


def command_line(config: Settings) -> list[str]:
    """The arguments that make these settings: those that are positional, then a flag for what is not the default."""
    arguments, flags = [], []
    for setting in settings_of(type(config)):
        value = getattr(getattr(config, setting.group), setting.field)
        if setting.argument:
            arguments.append(value)
        elif value is True:
            flags.append(setting.flag)
        elif value != setting.info.get_default():
            many = [",".join(value)] if setting.is_comma_list else value if isinstance(value, list) else [value]
            flags += [word for one in many for word in (setting.flag, str(one))]
    return arguments + flags


ConfigT = TypeVar("ConfigT", bound=Settings)


def load_config(kind: type[ConfigT], file: str | None, flags: dict[str, dict[str, Any]]) -> ConfigT:
    """The YAML file, if any, overlaid with the flags that were given: `{group: {field: value}}`.

    Raises UsageError naming the file, the key or value at fault, and the nearest known key.
    """
    tree = _read_yaml(file) if file else {}
    for group in kind.model_fields:
        section = tree.get(group)
        if section is None:  # not there, or its keys are commented out
            section = tree[group] = {}
        if not isinstance(section, dict):
            known = ", ".join(_fields_at(kind, [group]))
            raise UsageError(f"--config {file}: {group!r} holds {section!r}, but must hold keys: {known}")
        tree[group] = section | flags.get(group, {})
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_explain(kind, error, file, flags)) from None


class _Yaml(yaml.SafeLoader):
    """YAML in which 1:8 is a text. YAML 1.1 reads it as a number to base 60: 68."""


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError."""
    return yaml.load(text, _Yaml)


def _read_yaml(file: str) -> dict[Any, Any]:
    try:
        tree = parse_yaml(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--config {file}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {file}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"--config {file}: must hold keys at the top level, not a {type(tree).__name__}")
    return tree


def _explain(kind: type[Settings], error: ValidationError, file: str | None, flags: dict[str, dict[str, Any]]) -> str:
    """One line for the first thing wrong."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][:2]]
    group, field = where[0], where[-1]
    if first["type"] in ("extra_forbidden", "invalid_key"):
        return f"--config {file}: unknown key {'.'.join(where)!r}; {_nearest(kind, where)}"
    messages = [detail["msg"] for detail in error.errors() if [*detail["loc"][:2]] == [*first["loc"][:2]]]
    wanted = " or ".join(
        dict.fromkeys(message.removeprefix("Input should be ").split(", unable")[0] for message in messages)
    )
    if field in flags.get(group, {}):
        setting = next(one for one in settings_of(kind) if (one.group, one.field) == (group, field))
        return f"{setting.argument or setting.flag} {first['input']!r}: should be {wanted}"
    return f"--config {file}: {'.'.join(where)} is {first['input']!r}, but should be {wanted}"


def _nearest(kind: type[Settings], where: list[str]) -> str:
    """What an unknown key may have meant: a key of its own group, or one that stands in another group."""
    known = list(_fields_at(kind, where[:-1]))
    near = difflib.get_close_matches(where[-1], known, n=1)
    elsewhere = [f"{one.group}.{one.field}" for one in settings_of(kind) if where[-1] in (one.field, one.flag[2:])]
    guesses = [".".join([*where[:-1], *near])] if near else elsewhere
    return f"did you mean {guesses[0]!r}?" if guesses else f"known keys: {', '.join(known)}"


def _fields_at(kind: type[Settings], path: list[str]) -> dict[str, FieldInfo]:
    for name in path:
        annotation = kind.model_fields[name].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, Settings)
        kind = annotation
    return dict(kind.model_fields)
