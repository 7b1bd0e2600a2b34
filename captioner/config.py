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
Device = Literal["auto", "cpu", "cuda", "mps", "xpu"]
PoolSize = AutoInt | Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")]  # "MIN:MAX" grows and shrinks


class Settings(BaseModel):
    """Base of every group of settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class SourceConfig(Settings):
    """Which images."""

    path: str = Field(
        "",
        description="Folder, WebDataset tar(s), Parquet, Hugging Face dataset or manifest.",
        json_schema_extra={"argument": "SOURCE"},
    )
    include: list[str] = Field([], description="Only image ids that match one of these globs.")
    exclude: list[str] = Field([], description="No image id that matches one of these globs.")
    split: str = Field("train", description="Split of a Hugging Face dataset.")
    image_column: str | None = Field(None, description="Column with bytes, struct{bytes,path}, path or uri.")
    id_column: str | None = Field(None, description="Column with a unique id for each image.")
    reference_column: str | None = Field(None, description="Column with known captions (text or list of text).")
    keep_columns: CommaList = Field([], description="Source columns to carry into the table, comma-separated.")
    limit: int | None = Field(None, ge=1, description="Plan only the first N images.")
    pages: Literal["first", "all"] = Field("first", description="Of a TIFF: its first page, or each page an image.")
    max_pixels: int = Field(
        300_000_000, ge=1, description="Images that are larger even when read reduced fail as too_many_pixels."
    )
    decode_timeout: float = Field(60.0, gt=0, description="Seconds; an image that takes longer fails as timeout.")


def _device_field() -> Any:
    return Field("auto", description="What computes; auto is the GPU that torch can use (on Ray: that a worker holds).")


class ModelConfig(Settings):
    """Which model, and how it writes captions."""

    name: str = Field(
        "", description="starter, a model directory, a hub id or a URI.", json_schema_extra={"flag": "model"}
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    prompt: str | None = Field(None, description="Text the caption starts from, or the question to a chat model.")
    num_beams: int = Field(1, ge=1, description="Beams of the search; 1 is greedy.")
    max_new_tokens: int = Field(40, ge=1, description="Longest caption, in tokens.")
    device: Device = _device_field()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights and arithmetic; auto is bfloat16 with CUDA, else float32."
    )
    batch_size: AutoInt = Field("auto", description="Images for each forward pass.")
    preprocess: Literal["fast", "processor"] = Field(
        "fast", description="Pixels resized the fast way, or exactly as the model's own image processor does."
    )


class ClusterConfig(Settings):
    """On what machines."""

    address: str | None = Field(None, description="Ray cluster to join; without it a local Ray is started.")
    local: bool = Field(False, description="One process, without Ray: same table, same resume.")
    num_workers: PoolSize = Field(
        "auto", description="Caption workers; auto is one for each GPU, or node; MIN:MAX grows when nodes join."
    )
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs of each worker; default 1 where there are GPUs, 0 with --device cpu."
    )
    decode_cpus: AutoInt = Field("auto", description="CPUs that read and decode images.")
    read_concurrency: int = Field(32, ge=1, description="Reads that each of them has under way at once.")


class OutputConfig(Settings):
    """Where the table goes, and what to do with rows that are already there."""

    path: str = Field(
        "",
        description="Directory of the captions table; local or a URI (s3://, gs://).",
        json_schema_extra={"argument": "OUT"},
    )
    plan_only: bool = Field(False, description="List the source into OUT/plan and stop. Needs no model.")
    overwrite: bool = Field(False, description="Discard what OUT holds and start again.")
    retry_failed: bool = Field(False, description="Caption the failed images again; new rows supersede old ones.")
    extend: bool = Field(False, description="Add the images that are new in the source.")
    only: str | None = Field(
        None,
        description="Caption weak rows again, with another model too: flags, flag:NAME, logprob<10%, rejected, expert "
        "or failed, joined by 'or'.",
    )
    max_failed: float = Field(1.0, ge=0, le=1, description="Exit 2 when a larger share of the images failed.")
    no_dedupe: bool = Field(False, description="Caption every image, byte-equal ones too.")
    rows_per_file: int = Field(50_000, ge=1, description="About how many rows each published file holds.")


class CheckConfig(Settings):
    """How good the captions are, and what is good enough."""

    references: str | None = Field(
        None, description="Known captions: COCO .json, .jsonl, .csv, .parquet, folder of .txt; else SOURCE's own."
    )
    sample: Annotated[int, Field(ge=0)] | Literal["all"] = Field(500, description="Captions to score; 0 is none.")
    seed: int = Field(0, ge=0, description="Another seed draws another sample.")
    max_wer: float | None = Field(None, ge=0, description="Exit 2 when the WER of the sample is higher.")
    min_lift: float | None = Field(
        None, le=1, description="Exit 2 when the lift over shuffled captions, 1 - WER / shuffled WER, is lower."
    )
    max_flagged: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Exit 2 when a larger share of the captions is empty, cut off, repetitive, the same for many "
        "images, in another language, or has special tokens or a term of --terms.",
    )
    terms: str | None = Field(None, description="File with a word or phrase a line; captions with one are flagged.")


class SpotCheckConfig(CheckConfig):
    """The check while captioning, and at its end."""

    stop_early: bool = Field(False, description="Stop when the WER so far cannot come down to --max-wer.")


class CheckTableConfig(Settings):
    """`captioner check`."""

    check: CheckConfig = CheckConfig()


class CaptionConfig(Settings):
    """`captioner caption`."""

    source: SourceConfig = SourceConfig()
    model: ModelConfig = ModelConfig()
    cluster: ClusterConfig = ClusterConfig()
    output: OutputConfig = OutputConfig()
    check: SpotCheckConfig = SpotCheckConfig()


class AltTextConfig(Settings):
    """How captions become alt text."""

    max_chars: int = Field(125, ge=1, description="Drop the last sentences of longer texts; the first stays whole.")
    hard_max: int = Field(250, ge=2, description="Cut what is still longer at a clause or word.")
    language: str | None = Field(
        None,
        pattern=r"^[A-Za-z]{1,8}(-[A-Za-z0-9]{1,8})*$",
        description="What language the captions are in (en, pt-BR); a label, nothing is translated.",
    )
    terms: str | None = Field(None, description="File with a word or phrase a line; texts with one are flagged.")
    rules: CommaList = Field([], description="Only these rules, comma-separated.")
    no_rule: list[str] = Field([], description="Not this rule. Repeatable.")


class MakeAltTextConfig(Settings):
    """`captioner alt-text`."""

    alt_text: AltTextConfig = AltTextConfig()


class ExportConfig(Settings):
    """Where texts go, in what form, and which of them."""

    path: str = Field(
        "", description="File or folder to write; not with --beside-originals.", json_schema_extra={"argument": "DEST"}
    )
    to: Literal["xmp", "html", "csv", "jsonl", "txt", "coco", "imagefolder", "webdataset", "parquet"] | None = Field(
        None, description="The form of the export."
    )
    approved_only: bool = Field(
        False, description="Only what a person has approved, edited or called decorative; so by default."
    )
    include_unreviewed: bool = Field(False, description="Also what nobody has reviewed, marked as automatic.")
    automatic_mark: str = Field(
        "(automatic description)", min_length=1, description="Put behind every text that nobody has reviewed."
    )
    update: bool = Field(False, description="Refresh an earlier export at DEST.")
    dry_run: bool = Field(False, description="Say what would be exported and write nothing; html shows the diff.")
    beside_originals: bool = Field(False, description="xmp, txt: write beside the images themselves.")
    existing: Literal["skip", "overwrite", "append"] = Field(
        "skip", description="txt: what to do where a .txt file is there."
    )
    columns: CommaList = Field([], description="csv: NAME=FIELD for each column, comma-separated.")
    preset: Literal["wordpress", "wagtail"] | None = Field(None, description="csv: the columns of a publishing system.")
    html_dir: str | None = Field(None, description="html: folder of the pages to fill; they are not changed.")
    embed: bool = Field(False, description="xmp: into copies of the images, by ExifTool, instead of sidecars.")
    allow_c2pa: bool = Field(False, description="--embed: also where it breaks a C2PA signature.")


class ExportTextsConfig(Settings):
    """`captioner export`."""

    export: ExportConfig = ExportConfig()


class TrainDataConfig(Settings):
    """Pairs of images and captions, and how they are shared out."""

    path: str = Field(
        "",
        description="Images with captions: a folder with metadata.jsonl, tars, Parquet, a dataset or captions table.",
        json_schema_extra={"argument": "DATA"},
    )
    split: str = Field("train", description="Split of a Hugging Face dataset.")
    image_column: str | None = Field(None, description="Column with bytes, struct{bytes,path}, path or uri.")
    id_column: str | None = Field(None, description="Column with a unique id for each image.")
    reference_column: str | None = Field(None, description="Column with the captions (text or list of text).")
    limit: int | None = Field(None, ge=1, description="Take only the first N images.")
    max_pixels: int = Field(300_000_000, ge=1, description="Larger images are left out.")
    max_failed: float = Field(0.1, ge=0, le=1, description="Stop when a larger share of the images is unusable.")
    caption_choice: Literal["random", "first", "all"] = Field(
        "random", description="Of several captions: one drawn each epoch, the first, or each one as a pair."
    )
    eval_fraction: float = Field(0.1, ge=0, lt=1, description="Share of the images kept for evaluation.")
    eval_data: str | None = Field(None, description="Evaluate on these pairs instead.")
    test_fraction: float = Field(0.0, ge=0, lt=1, description="Share kept for one test after selection.")
    test_data: str | None = Field(None, description="Test on these pairs instead.")
    max_eval_samples: int | None = Field(None, ge=1, description="Evaluate on at most N images.")


class TrainModelConfig(Settings):
    """Which model, and which of its weights learn."""

    name: str = Field(
        "starter", description="starter, a model directory, a hub id or a URI.", json_schema_extra={"flag": "model"}
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    device: Device = _device_field()
    freeze_vision: bool = Field(False, description="Leave the vision encoder as it is.")
    lora_rank: int | None = Field(None, ge=1, description="Train LoRA adapters of this rank and merge them at the end.")
    max_new_tokens: int = Field(40, ge=1, description="Longest caption written in evaluation, in tokens.")


class TrainClusterConfig(Settings):
    """On what machines."""

    address: str | None = Field(None, description="Ray cluster to join; without it a local Ray is started.")
    num_workers: AutoInt = Field("auto", description="Training workers; auto is one for each GPU, or one.")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs of each worker; default 1 where there are GPUs, 0 with --device cpu."
    )


class TrainingConfig(Settings):
    """How to train; names and meanings are those of transformers' TrainingArguments."""

    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the training images.")
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps, instead of epochs.")
    learning_rate: float = Field(5e-5, gt=0, description="Highest learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = Field(
        "linear", description="How the learning rate goes down."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 is never.")
    per_device_train_batch_size: int = Field(32, ge=1, description="Pairs of each worker's forward pass.")
    per_device_eval_batch_size: int | None = Field(None, ge=1, description="The same in evaluation; default as above.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes for each optimiser step.")
    gradient_checkpointing: bool = Field(False, description="Less memory for more time.")
    bf16: bool = Field(False, description="Compute in bfloat16; weights stay float32.")
    fp16: bool = Field(False, description="Compute in float16; GPUs only.")
    logging_steps: int = Field(10, ge=1, description="Steps between entries of the loss history.")
    eval_steps: int | None = Field(None, ge=1, description="Steps between evaluations; default once an epoch.")
    save_steps: int | None = Field(None, ge=1, description="Steps between checkpoints; a multiple of --eval-steps.")
    save_total_limit: int = Field(3, ge=1, description="Checkpoints kept: the best ones, and the latest.")
    metric_for_best_model: Literal["wer", "loss"] = Field("wer", description="What chooses the best checkpoint.")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after N evaluations without a better one."
    )
    seed: int = Field(42, ge=0, description="Of the split, the order and the captions drawn.")
    report_to: Literal["none", "tensorboard"] = Field("none", description="Where curves go besides OUT.")


class TrainOutputConfig(Settings):
    """Where the model goes."""

    path: str = Field(
        "",
        description="Directory of the run; OUT/model is the model. Local or a URI (s3://, gs://).",
        json_schema_extra={"argument": "OUT"},
    )
    push_to_hub: bool = Field(False, description="Upload OUT/model to the hub as --hub-model-id; private.")
    hub_model_id: str | None = Field(None, description="Repository (owner/name) for --push-to-hub.")


class TrainConfig(Settings):
    """`captioner train`."""

    data: TrainDataConfig = TrainDataConfig()
    model: TrainModelConfig = TrainModelConfig()
    cluster: TrainClusterConfig = TrainClusterConfig()
    training: TrainingConfig = TrainingConfig()
    output: TrainOutputConfig = TrainOutputConfig()


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
