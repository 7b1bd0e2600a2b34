"""Everything a person can set. Flags and YAML are made from these models; nothing else reads either.

A YAML file has the shape of `CaptionConfig` (`source:`, `model:`, ...); a flag is a field's name with dashes. Defaults
are here and nowhere else.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from captioner.errors import UsageError


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


CommaList = Annotated[list[str], BeforeValidator(_split_commas)]
AutoInt = int | Literal["auto"]


class Settings(BaseModel):
    """Base of every group of settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class SourceConfig(Settings):
    """Which pictures."""

    path: str = Field("", description="Folder, WebDataset tar(s), Parquet, Hugging Face dataset or manifest.")
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

    name: str = Field("", description="starter, a model directory, a hub id or a URI.", json_schema_extra={"flag": "model"})
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
    num_workers: AutoInt = Field("auto", description="Caption workers; auto is one for each GPU, or one for all CPUs.")
    gpus_per_worker: float | None = Field(None, ge=0, description="GPUs of each worker; default 1 where there are GPUs.")
    decode_cpus: AutoInt = Field("auto", description="CPUs that read and decode pictures.")


class OutputConfig(Settings):
    """Where the table goes, and what to do with rows that are already there."""

    path: str = Field("", description="Directory of the captions table; local or a URI (s3://, gs://).")
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


ConfigT = TypeVar("ConfigT", bound=Settings)


def load_config(kind: type[ConfigT], file: str | None, flags: dict[str, dict[str, Any]]) -> ConfigT:
    """The YAML file, if any, overlaid with the flags that were given: `{group: {field: value}}`.

    Raises UsageError naming the file, the key or value at fault, and the nearest known key.
    """
    tree: dict[str, Any] = _read_yaml(file) if file else {}
    for group, values in flags.items():
        section = tree.setdefault(group, {})
        if not isinstance(section, dict):
            raise UsageError(f"{file}: {group!r} must hold keys, not {section!r}")
        section.update(values)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_explain(kind, error, file)) from None


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--config {file}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {file}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"--config {file}: must hold keys at the top level, not a {type(tree).__name__}")
    return tree


def _explain(kind: type[Settings], error: ValidationError, file: str | None) -> str:
    """One line for the first thing wrong."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if isinstance(part, str)]
    prefix = f"--config {file}: " if file else ""
    if first["type"] == "extra_forbidden":
        known = list(_fields_at(kind, where[:-1]))
        nearest = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
        return f"{prefix}unknown key {'.'.join(where)!r}; {hint}"
    return f"{prefix}{'.'.join(where[:2])}={first['input']!r}: {first['msg'].lower()}"


def _fields_at(kind: type[Settings], path: list[str]) -> dict[str, Any]:
    for name in path:
        annotation = kind.model_fields[name].annotation
        assert isinstance(annotation, type) and issubclass(annotation, Settings)
        kind = annotation
    return dict(kind.model_fields)
