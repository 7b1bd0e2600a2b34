"""The settings of every command. Flags and YAML keys are made from these models.

A YAML file has the shape of `CaptionConfig` (`source:`, `model:`, ...); a flag is a field's name with dashes. All
defaults are here.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from captioner.errors import UsageError


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


CommaList = Annotated[list[str], BeforeValidator(_split_commas)]
AutoInt = Annotated[int, Field(ge=1)] | Literal["auto"]
Device = Literal["auto", "cpu", "cuda", "mps", "xpu"]


def _pool_size(value: int | str) -> int | str:
    text = str(value)
    sizes = [int(part) for part in text.split(":")] if re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", text) else []
    if text != "auto" and (not sizes or sizes != sorted(sizes)):
        raise ValueError("a number, auto, or MIN:MAX with 1 <= MIN <= MAX")
    return sizes[0] if len(sizes) == 1 else text


PoolSize = Annotated[int | str, AfterValidator(_pool_size)]  # "MIN:MAX" grows and shrinks


def _size(text: str) -> str:
    num_bytes(text)
    return text


def num_bytes(size: str) -> int:
    """Return the number of bytes of a size such as "4GB". Raises ValueError."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        raise ValueError("a size, such as 4GB or 500MB") from None


def _gpu_share(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("a whole number, or a share of one GPU below 1")
    return value


GpuShare = Annotated[float, Field(ge=0), AfterValidator(_gpu_share)]


def _language_tag(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z]{1,8}(-[A-Za-z0-9]{1,8})*", text):
        raise ValueError("a language tag, such as en or pt-BR")
    return text


def _types_in(annotation: Any) -> set[Any]:
    """Return the types that an annotation is made of, such as int and None for `int | None`."""
    return {annotation}.union(*map(_types_in, get_args(annotation))) if get_args(annotation) else {annotation}


class Settings(BaseModel):
    """Base class of all settings: frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _bool_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Turn true and false, which pydantic takes for the numbers 1 and 0, into texts, which are not numbers."""
        is_number = not _types_in(cls.model_fields[str(info.field_name)].annotation).isdisjoint((int, float))
        return str(value).lower() if isinstance(value, bool) and is_number else value


SPLIT = "Split of a dataset, or of files whose names say it; without it train where there are several; or all."


class SourceConfig(Settings):
    """Which images to caption."""

    path: str = Field(
        "",
        description="Folder, WebDataset tar(s), Parquet, Hugging Face dataset or manifest.",
        json_schema_extra={"argument": "SOURCE"},
    )
    include: list[str] = Field([], description="Take only image ids that match one of these globs.")
    exclude: list[str] = Field([], description="Leave out image ids that match one of these globs.")
    take_as: Literal["auto", "folder", "tars", "parquet", "dataset", "manifest"] = Field(
        "auto",
        description="What SOURCE is taken for; auto decides by what most of it is, and says so.",
        json_schema_extra={"flag": "as"},
    )
    split: str | None = Field(None, description=SPLIT)
    image_column: str | None = Field(None, description="Column with bytes, struct{bytes,path}, path or uri.")
    id_column: str | None = Field(None, description="Column with a unique id for each image.")
    reference_column: str | None = Field(None, description="Column with known captions (text or list of text).")
    keep_columns: CommaList = Field([], description="Source columns to carry into the table, comma-separated.")
    limit: int | None = Field(None, ge=1, description="Plan only the first N images.")
    pages: Literal["first", "all"] = Field("first", description="Which pages of a TIFF are images: the first, or all.")
    max_pixels: int = Field(
        300_000_000,
        ge=1,
        description="Larger images fail as too_many_pixels, unless they can be read at a smaller size.",
    )
    max_file_size: int = Field(
        1 << 30, ge=1, description="Bytes; a larger file, or member of a tar, fails as too_large and is not read."
    )
    decode_timeout: float = Field(60.0, gt=0, description="Seconds; an image that takes longer fails as timeout.")


def _device_field() -> Any:
    return Field(
        "auto",
        description="Device to compute on; auto is the GPU that torch can use, on Ray the one that a worker reserved.",
    )


_MODEL_NAME = "starter (packaged; for rendered scenes only), a model directory, a hub id or a URI."


class ModelConfig(Settings):
    """Which model to use, and how it writes captions."""

    name: str = Field("", description=_MODEL_NAME, json_schema_extra={"flag": "model"})
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    prompt: str | None = Field(
        None,
        description="Text the caption starts from, or the question to a chat model, which may hold {image_id} and "
        "{COLUMN}, a kept column.",
    )
    system: str | None = Field(None, description="System prompt of a chat model.")
    questions: str | None = Field(
        None, description="YAML file with several questions for a chat model; one of them is the caption."
    )
    num_beams: int = Field(1, ge=1, description="Beams of the search; 1 is greedy.")
    temperature: float = Field(
        0.0, ge=0, description="Sample captions at this temperature, such as 0.8; 0 takes the most probable."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the most probable tokens that together have this probability."
    )
    num_captions: int = Field(
        1, ge=1, le=100, description="Sampled captions of each image, in column captions; the first one is caption."
    )
    seed: int = Field(0, ge=0, description="Seed of sampled captions; others give other captions.")
    max_new_tokens: int = Field(40, ge=1, description="Longest caption, in tokens.")
    device: Device = _device_field()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of weights and arithmetic; auto is bfloat16 with CUDA, else float32."
    )
    quantize: Literal["int8", "int4"] | None = Field(
        None, description="Bits of the weights of linear layers, for less memory; captions differ a little."
    )
    batch_size: AutoInt = Field("auto", description="Images for each forward pass.")
    preprocess: Literal["fast", "processor"] = Field(
        "fast", description="How images are resized: fast, or exactly as by the model's own image processor."
    )
    endpoint: list[str] = Field(
        [],
        description="URL of an OpenAI-compatible model server, such as http://gpu1:8000/v1, that captions with the "
        "--model it serves. Repeatable: servers share the images.",
    )
    concurrency: int = Field(32, ge=1, description="Requests under way at each --endpoint.")
    max_side: int = Field(
        1536, ge=28, le=16_384, description="Longer side, in pixels, of the images that are sent to an --endpoint."
    )
    request_timeout: float = Field(
        300.0, gt=0, description="Seconds; an --endpoint that answers later counts as not answering."
    )
    endpoint_timeout: float = Field(
        600.0, gt=0, description="Seconds after which a run stops when no --endpoint has answered."
    )
    price_in: float | None = Field(
        None, ge=0, description="Price of a million prompt tokens of the --endpoint, to compute the cost."
    )
    price_out: float | None = Field(
        None, ge=0, description="Price of a million answer tokens of the --endpoint, to compute the cost."
    )

    @property
    def compute_on(self) -> Device:
        """The device of a worker: where a server captions, the worker needs none."""
        return "cpu" if self.endpoint else self.device

    def cost_of(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """Return what tokens of an --endpoint cost; None without --price-in and --price-out."""
        if self.price_in is None and self.price_out is None:
            return None
        price_in, price_out = self.price_in or 0.0, self.price_out or 0.0
        return (prompt_tokens * price_in + completion_tokens * price_out) / 1e6


class ClusterConfig(Settings):
    """Where the job runs, with how many workers."""

    address: str | None = Field(None, description="Ray cluster to join; without it a local Ray is started.")
    local: bool = Field(False, description="Run in one process, without Ray; table and resuming are the same.")
    num_workers: PoolSize = Field(
        "auto",
        description="Caption workers; auto is one for each GPU, or node; MIN:MAX grows when nodes join.",
        json_schema_extra={"metavar": "N|auto|MIN:MAX"},
    )
    gpus_per_worker: GpuShare | None = Field(
        None,
        description="GPUs of each worker; default 1 where there are GPUs, 0 with --device cpu; from 2 on they share "
        "the weights of a large model.",
    )
    decode_cpus: AutoInt = Field("auto", description="CPUs that read and decode images.")
    read_concurrency: int = Field(32, ge=1, description="Reads that each of these CPUs does at once.")

    @property
    def gpus_for_weights(self) -> int:
        """The GPUs of a worker that share the weights of a model."""
        return max(1, int(self.gpus_per_worker or 1))


class OutputConfig(Settings):
    """Where to write the table, and what to do with rows that it already has."""

    path: str = Field(
        "",
        description="Directory of the captions table; local or a URI (s3://, gs://).",
        json_schema_extra={"argument": "OUT"},
    )
    plan_only: bool = Field(False, description="List the source into OUT/plan and stop. Needs no model.")
    overwrite: bool = Field(False, description="Delete the table in OUT and start again.")
    retry_failed: bool = Field(
        False, description="Ask again about images without a caption or an answer; new rows supersede old ones."
    )
    extend: bool = Field(False, description="Add images that are new in the source.")
    only: str | None = Field(
        None,
        description="Caption these rows again, usually with a better model: flags, flag:NAME, logprob<10%, judge<10%, "
        "rejected, expert or failed, joined by 'or'.",
    )
    max_failed: float = Field(1.0, ge=0, le=1, description="Exit 2 when a larger share of the images failed.")
    no_dedupe: bool = Field(False, description="Caption every image, also byte-equal copies.")
    rows_per_file: int = Field(50_000, ge=1, description="Approximate number of rows in each published file.")


class CheckConfig(Settings):
    """How to check the captions, and the limits that they must keep."""

    references: str | None = Field(
        None,
        description="Known captions: COCO .json, .jsonl, .csv, .parquet, folder of .txt; else SOURCE's own.",
    )
    references_columns: CommaList = Field(
        [], description="Columns of a table given as --references: that of the images' names, then those of captions."
    )
    sample: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        500, description="Number of captions to score, or all."
    )
    seed: int = Field(0, ge=0, description="Seed of the sample.")
    max_wer: float | None = Field(None, ge=0, description="Exit 2 when the WER of the sample is higher.")
    min_lift: float | None = Field(
        None, le=1, description="Exit 2 when the lift over shuffled captions, 1 - WER / shuffled WER, is lower."
    )
    max_flagged: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Exit 2 when a larger share of the captions is empty, cut off, repetitive, the same for many "
        "images, in another language, a refusal or the prompt, or has special tokens or a term of --terms.",
    )
    min_right: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Exit 2 when the share of right captions by `captioner spot-check` is lower: the lower end of its "
        "95 % interval.",
    )
    terms: str | None = Field(
        None, description="File with one word or phrase per line; captions that contain one are flagged."
    )
    language: Annotated[str, AfterValidator(_language_tag)] | None = Field(
        None,
        description="Language that the captions should be in (en, pt-BR); others are flagged. Default: that of most.",
    )


class RunCheckConfig(CheckConfig):
    """How to check the captions of a run while it captions and at its end."""

    seed: int = Field(0, ge=0, description="Seed of the sample.", json_schema_extra={"flag": "check-seed"})
    stop_early: bool = Field(False, description="Stop when the WER can no longer come down to --max-wer.")


class CheckTableConfig(Settings):
    """The settings of `captioner check`."""

    check: CheckConfig = CheckConfig()


class CaptionConfig(Settings):
    """The settings of `captioner caption`."""

    source: SourceConfig = SourceConfig()
    model: ModelConfig = ModelConfig()
    cluster: ClusterConfig = ClusterConfig()
    output: OutputConfig = OutputConfig()
    check: RunCheckConfig = RunCheckConfig()


class JudgeConfig(Settings):
    """Which model judges captions by their images, and beside how many others."""

    name: str = Field(
        "",
        description="CLIP or SigLIP: a model directory, a hub id or a URI; or the chat model of an --endpoint.",
        json_schema_extra={"flag": "model"},
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    device: Device = _device_field()
    batch_size: int = Field(64, ge=1, description="Images for each forward pass.")
    endpoint: list[str] = Field(
        [],
        description="URL of an OpenAI-compatible model server: its chat --model is asked whether captions name "
        "anything that is not in their image. Repeatable.",
    )
    sample: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        500, description="Number of captions that an --endpoint is asked about, or all."
    )
    concurrency: int = Field(32, ge=1, description="Requests under way at each --endpoint.")
    price_in: float | None = Field(None, ge=0, description="Price of a million prompt tokens of the --endpoint.")
    price_out: float | None = Field(None, ge=0, description="Price of a million answer tokens of the --endpoint.")
    references: str | None = Field(
        None, description="Known captions for RefCLIPScore, as of check; else those given before, or SOURCE's own."
    )
    references_columns: CommaList = Field(
        [], description="Columns of a table given as --references: that of the images' names, then those of captions."
    )
    num_others: int = Field(
        100, ge=1, le=500, description="Other images that each caption is compared with, drawn from those near it."
    )
    seed: int = Field(0, ge=0, description="Seed of the draw of other images, and of the sample.")


class JudgeTableConfig(Settings):
    """The settings of `captioner judge`."""

    judge: JudgeConfig = JudgeConfig()
    cluster: ClusterConfig = ClusterConfig()


class AltTextConfig(Settings):
    """How to make alt texts from captions."""

    field: str = Field("caption", description="Column of the table to make alt texts of: caption, or an answer.")
    max_chars: int = Field(
        125, ge=1, description="Drop the last sentences of longer texts; the first sentence is kept whole."
    )
    hard_max: int = Field(250, ge=2, description="Cut texts that are still longer at a clause or word.")
    language: Annotated[str, AfterValidator(_language_tag)] | None = Field(
        None,
        description="Language of the captions (en, pt-BR), to label the texts; nothing is translated.",
    )
    terms: str | None = Field(
        None, description="File with one word or phrase per line; texts that contain one are flagged."
    )
    rules: CommaList = Field([], description="Apply only these rules, comma-separated.")
    no_rule: list[str] = Field([], description="Disable this rule. Repeatable.")


class MakeAltTextConfig(Settings):
    """The settings of `captioner alt-text`."""

    alt_text: AltTextConfig = AltTextConfig()


class ExportConfig(Settings):
    """Which texts to export, in what format and to where."""

    path: str = Field(
        "",
        description="File or folder to write; not with --beside-originals. hub: repository, OWNER/NAME.",
        json_schema_extra={"argument": "DEST"},
    )
    to: Literal["xmp", "html", "csv", "jsonl", "txt", "coco", "imagefolder", "webdataset", "parquet", "hub"] | None = (
        Field(None, description="Format of the export.")
    )
    field: str | None = Field(
        None, description="Column of the table to export, such as caption or an answer; default the alt text."
    )
    prefix: str = Field("", description="Text to put before each text of a training set, such as a trigger word.")
    suffix: str = Field("", description="Text to put after each text of a training set.")
    approved_only: bool = Field(
        False, description="Export only texts that a person approved or edited, and decorative images; the default."
    )
    include_unreviewed: bool = Field(
        False, description="Export also unreviewed texts; those of a model marked as automatic."
    )
    automatic_mark: str = Field(
        "(automatic description)", min_length=1, description="Suffix for texts of a model that nobody has reviewed."
    )
    update: bool = Field(False, description="Refresh an earlier export at DEST.")
    dry_run: bool = Field(False, description="Print what would be exported and write nothing; html shows the diff.")
    beside_originals: bool = Field(False, description="xmp, txt: write beside the images themselves.")
    existing: Literal["skip", "overwrite", "append"] = Field(
        "skip", description="txt: what to do where a .txt file already exists."
    )
    columns: CommaList = Field([], description="csv: NAME=FIELD for each column, comma-separated.")
    preset: Literal["wordpress", "wagtail"] | None = Field(None, description="csv: the columns of a publishing system.")
    coco_results: bool = Field(False, description="coco: write the list of results that COCO.loadRes reads.")
    html_dir: str | None = Field(
        None, description="html: folder of the pages to fill in; the pages themselves are not changed."
    )
    embed: bool = Field(False, description="xmp: write into copies of the images, with ExifTool, instead of sidecars.")
    allow_c2pa: bool = Field(False, description="--embed: write also where that breaks a C2PA signature.")


class ExportTextsConfig(Settings):
    """The settings of `captioner export`."""

    export: ExportConfig = ExportConfig()


class TrainDataConfig(Settings):
    """Which pairs of images and captions to train on, and how to split them."""

    path: str = Field(
        "",
        description="Images with captions: a folder with metadata.jsonl, tars, Parquet, a dataset or captions table.",
        json_schema_extra={"argument": "DATA"},
    )
    split: str | None = Field(None, description=SPLIT)
    image_column: str | None = Field(None, description="Column with bytes, struct{bytes,path}, path or uri.")
    id_column: str | None = Field(None, description="Column with a unique id for each image.")
    reference_column: str | None = Field(None, description="Column with the captions (text or list of text).")
    limit: int | None = Field(None, ge=1, description="Take only the first N rows of DATA; an image may have several.")
    max_pixels: int = Field(300_000_000, ge=1, description="Larger images are left out.")
    max_failed: float = Field(0.1, ge=0, le=1, description="Stop when a larger share of the images is unusable.")
    pixel_cache: Annotated[str, AfterValidator(_size)] = Field(
        "4GB", description="Keep decoded images in this much of each node's folder for temporary files; 0 is none."
    )
    caption_choice: Literal["random", "first", "all"] = Field(
        "random", description="Which of several captions to use: a random one each epoch, the first, or all as pairs."
    )
    eval_fraction: float = Field(0.1, ge=0, lt=1, description="Share of the images kept for evaluation.")
    eval_data: str | None = Field(None, description="Evaluate on these pairs instead.")
    test_fraction: float = Field(0.0, ge=0, lt=1, description="Share kept for one test after selection.")
    test_data: str | None = Field(None, description="Test on these pairs instead.")
    max_eval_samples: int | None = Field(None, ge=1, description="Evaluate on at most N images.")


class TrainModelConfig(Settings):
    """Which model to train, and which of its weights."""

    name: str = Field("starter", description=_MODEL_NAME, json_schema_extra={"flag": "model"})
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    device: Device = _device_field()
    freeze_vision: bool = Field(False, description="Do not train the vision encoder.")
    prompt: str | None = Field(
        None, description="Task token, question or first words of the captions; default by model family."
    )
    lora_rank: int | None = Field(None, ge=1, description="Train LoRA adapters of this rank and merge them at the end.")
    lora_targets: CommaList = Field(
        [], description="Layers with adapters, such as q_proj,v_proj; default all linear ones (docs/train.md)."
    )
    quantize: Literal["int4"] | None = Field(
        None, description="Bits of the base model's linear layers while LoRA adapters learn, for less memory (QLoRA)."
    )
    keep_adapter: bool = Field(
        False, description="Leave the LoRA adapter in OUT/model, not merged with its base model."
    )
    max_new_tokens: int = Field(40, ge=1, description="Longest caption in evaluation, in tokens.")


class TrainClusterConfig(Settings):
    """Where the job runs, with how many workers."""

    address: str | None = Field(None, description="Ray cluster to join; without it a local Ray is started.")
    num_workers: AutoInt = Field("auto", description="Training workers; auto is one for each GPU, or one.")
    gpus_per_worker: GpuShare | None = Field(
        None, description="GPUs of each worker, 1 at most; default 1 where there are GPUs, 0 with --device cpu."
    )


class TrainingConfig(Settings):
    """How to train; names and meanings as in transformers' TrainingArguments."""

    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the training images.")
    max_steps: int | None = Field(None, ge=1, description="Number of optimiser steps, instead of epochs.")
    learning_rate: float | None = Field(
        None, gt=0, description="Highest learning rate; default by model family, such as 5e-5 for git."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] | None = Field(
        None, description="How the learning rate decreases; default by model family."
    )
    warmup_steps: float | None = Field(
        None,
        ge=0,
        description="Steps over which the learning rate rises, below 1 a share of all steps; default by model family.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 is never.")
    per_device_train_batch_size: int = Field(32, ge=1, description="Pairs in each forward pass of a worker.")
    per_device_eval_batch_size: int | None = Field(
        None, ge=1, description="Pairs in each forward pass of evaluation; default as in training."
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes for each optimiser step.")
    gradient_checkpointing: bool = Field(False, description="Use less memory and more time.")
    fsdp: bool = Field(False, description="Shard weights, gradients and optimiser over the workers; for large models.")
    bf16: bool = Field(False, description="Compute in bfloat16; weights stay float32.")
    fp16: bool = Field(False, description="Compute in float16; GPUs only.")
    logging_steps: int = Field(
        10, ge=1, description="Steps between entries of the loss history; one more at each checkpoint."
    )
    eval_steps: int | None = Field(None, ge=1, description="Steps between evaluations; default once an epoch.")
    save_steps: int | None = Field(None, ge=1, description="Steps between checkpoints; a multiple of --eval-steps.")
    save_total_limit: int = Field(3, ge=1, description="Checkpoints kept: the best ones, and the latest.")
    metric_for_best_model: Literal["wer", "loss", "cider"] = Field(
        "wer", description="Metric that chooses the best checkpoint."
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after N evaluations without a better one."
    )
    stop_on_collapse: bool = Field(
        False, description="End the run with an error when more than half of the captions of an evaluation are equal."
    )
    seed: int = Field(42, ge=0, description="Seed of the split, the order and the choice of captions.")
    report_to: Literal["none", "tensorboard"] = Field("none", description="Where to write curves besides OUT.")


class TrainOutputConfig(Settings):
    """Where to write the model."""

    path: str = Field(
        "",
        description="Directory of the run, with the model in OUT/model; local or a URI (s3://, gs://).",
        json_schema_extra={"argument": "OUT"},
    )
    push_to_hub: bool = Field(False, description="Upload OUT/model to the hub as --hub-model-id; private.")
    hub_model_id: str | None = Field(None, description="Repository (owner/name) for --push-to-hub.")
    caption_image: str | None = Field(None, description="Image to caption with the finished model.")


class TrainConfig(Settings):
    """The settings of `captioner train`."""

    data: TrainDataConfig = TrainDataConfig()
    model: TrainModelConfig = TrainModelConfig()
    cluster: TrainClusterConfig = TrainClusterConfig()
    training: TrainingConfig = TrainingConfig()
    output: TrainOutputConfig = TrainOutputConfig()


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a settings model, and its name on the command line."""

    group: str
    field: str
    info: FieldInfo

    @property
    def argument(self) -> str | None:
        """The name of the positional argument, such as "SOURCE"; None for a flag."""
        return self._extra("argument")

    @property
    def flag(self) -> str:
        """The name of the flag, such as "--batch-size"."""
        return f"--{self._extra('flag') or self.field.replace('_', '-')}"

    @property
    def metavar(self) -> str | None:
        """How help shows the value, such as "N|auto|MIN:MAX"; None where that follows from its type."""
        return self._extra("metavar")

    @property
    def is_comma_list(self) -> bool:
        return any(isinstance(part, BeforeValidator) for part in self.info.metadata)

    def _extra(self, key: str) -> str | None:
        extra = self.info.json_schema_extra
        value = extra.get(key) if isinstance(extra, dict) else None
        return value if isinstance(value, str) else None


def settings_of(kind: type[Settings]) -> Iterator[Setting]:
    """Yield every field of every group, in order."""
    for group in kind.model_fields:
        for field, info in _fields_at(kind, [group]).items():
            yield Setting(group, field, info)


def command_line(config: Settings) -> list[str]:
    """Return the command line of these settings: positional arguments, then flags for values that are not defaults.

    A comma list whose values hold commas, or spaces at an end, is given as YAML with --set.
    """
    arguments, flags = [], []
    for setting in settings_of(type(config)):
        value = getattr(getattr(config, setting.group), setting.field)
        if setting.argument:
            arguments.append(value)
        elif value is True:
            flags.append(setting.flag)
        elif value != setting.info.get_default():
            flags += _flag_words(setting, value)
    return arguments + flags


def _flag_words(setting: Setting, value: Any) -> list[str]:
    if setting.is_comma_list:
        text = ",".join(value)
        if _split_commas(text) != value:
            as_yaml = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
            return ["--set", f"{setting.group}.{setting.field}={as_yaml.rstrip()}"]
        return [setting.flag, text]
    return [word for item in (value if isinstance(value, list) else [value]) for word in (setting.flag, str(item))]


_OF_ENDPOINTS = ("concurrency", "max_side", "request_timeout", "endpoint_timeout", "price_in", "price_out", "sample")


def check_endpoint_settings(model: ModelConfig | JudgeConfig) -> None:
    """Raise UsageError where settings of an --endpoint are given without one."""
    if not model.endpoint:
        refuse_unused(model, _OF_ENDPOINTS, "has no effect without --endpoint")


def check_local_settings(cluster: ClusterConfig, *others: str) -> None:
    """Raise UsageError where settings of a Ray cluster are given with --local. `others`: fields that are such too."""
    if cluster.local:
        refuse_unused(cluster, ("address", "num_workers", "decode_cpus", *others), "has no effect with --local")


def refuse_unused(settings: Settings, fields: Collection[str], why: str) -> None:
    """Raise UsageError where one of these fields of a group of settings, of those it has, is not its default.

    `why`: the message after the flag, such as "has no effect with --local".
    """
    for field, info in type(settings).model_fields.items():
        value = getattr(settings, field)
        if field in fields and value != info.get_default():
            words = [Setting("", field, info).flag]
            words += [] if value is True else [",".join(value) if isinstance(value, list) else str(value)]
            raise UsageError(f"{' '.join(words)}: {why}; leave it out")


ConfigT = TypeVar("ConfigT", bound=Settings)


def load_config(kind: type[ConfigT], file: str | None, flags: dict[str, dict[str, Any]]) -> ConfigT:
    """Return the settings of the YAML file, if any, overridden by the given flags: `{group: {field: value}}`.

    Raises UsageError naming the file, the key or value at fault, and the nearest known key.
    """
    tree = read_yaml(file) if file else {}
    for group in kind.model_fields:
        section = tree.get(group)
        if section is None:  # absent, or all its keys are commented out
            section = tree[group] = {}
        if not isinstance(section, dict):
            keys = ", ".join(_fields_at(kind, [group]))
            raise UsageError(f"--config {file}: {group!r} holds {section!r}, but must hold keys: {keys}")
        tree[group] = section | flags.get(group, {})
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_explain(kind, error, file, flags)) from None


class _Yaml(yaml.SafeLoader):
    """A YAML loader that reads 1:8 as a text, and refuses a key that occurs twice in a mapping.

    YAML 1.1 reads 1:8 as a number in base 60, 68. PyYAML takes the last of two equal keys, without a word.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"the key {key.value!r} occurs twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        return node


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """Parse YAML in which 1:8 is a text. Raises yaml.YAMLError."""
    return yaml.load(text, _Yaml)


def read_yaml(file: str, flag: str = "--config") -> dict[Any, Any]:
    """Return the keys of a YAML file. Raises UsageError, which names the flag, where it cannot be read."""
    try:
        tree = parse_yaml(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{flag} {file}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{flag} {file}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{flag} {file}: must hold keys at the top level, not a {type(tree).__name__}")
    return tree


_PREFIXES = re.compile("^(Input should be|Value error,) ")  # of pydantic's messages


def _explain(kind: type[Settings], error: ValidationError, file: str | None, flags: dict[str, dict[str, Any]]) -> str:
    """Return one line that explains the first error."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"][:2]]
    group, field = path[0], path[-1]
    if first["type"] in ("extra_forbidden", "invalid_key"):
        return f"--config {file}: unknown key {'.'.join(path)!r}; {_nearest(kind, path)}"
    messages = [detail["msg"] for detail in error.errors() if [*detail["loc"][:2]] == [*first["loc"][:2]]]
    expected = " or ".join(dict.fromkeys(_PREFIXES.sub("", message).split(", unable")[0] for message in messages))
    if field in flags.get(group, {}):
        setting = next(s for s in settings_of(kind) if (s.group, s.field) == (group, field))
        return f"{setting.argument or setting.flag} {first['input']!r}: should be {expected}"
    return f"--config {file}: {'.'.join(path)} is {first['input']!r}, but should be {expected}"


def _nearest(kind: type[Settings], path: list[str]) -> str:
    """Suggest a key for an unknown one: a similar key of its group, or the same key of another group."""
    keys = list(_fields_at(kind, path[:-1]))
    similar = difflib.get_close_matches(path[-1], keys, n=1)
    in_other_groups = [f"{s.group}.{s.field}" for s in settings_of(kind) if path[-1] in (s.field, s.flag[2:])]
    guesses = [".".join([*path[:-1], *similar])] if similar else in_other_groups
    return f"did you mean {guesses[0]!r}?" if guesses else f"known keys: {', '.join(keys)}"


def _fields_at(kind: type[Settings], path: list[str]) -> dict[str, FieldInfo]:
    for name in path:
        annotation = kind.model_fields[name].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, Settings)
        kind = annotation
    return dict(kind.model_fields)
