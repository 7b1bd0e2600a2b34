"""Write a commented run.yaml for a source: what it holds, what it was taken for, the model, and the likely settings."""

from __future__ import annotations

import itertools
import json
import textwrap
from pathlib import Path

import pyarrow as pa

from captioner.config import CaptionConfig, Setting, SourceConfig, settings_of
from captioner.console.phases import phase
from captioner.console.stopping import notify
from captioner.console.text import counted, printable, shell_command
from captioner.data import Source
from captioner.errors import OK, OutputError, SourceError, UsageError
from captioner.files import shown
from captioner.models.download import why_unreachable
from captioner.models.resolving import STARTER, is_hub_id
from captioner.sources import describe, open_source
from captioner.starter.scenes import describes_scene

LOOK_AT = 1_000  # images of the source
FOR_PHOTOS = "microsoft/git-base-coco"
# The settings that the file names, in its order; the others are in --help-all.
SHOWN = {
    "source": ("path", "include", "exclude", "limit", "split", "reference_column", "keep_columns"),
    "model": ("name", "prompt", "num_beams", "max_new_tokens"),
    "cluster": ("address", "local", "num_workers"),
    "output": ("path", "max_failed"),
    "check": ("references", "max_wer", "max_flagged"),
}
_HEAD = """\
# Settings of a run: {command}
#
# {facts}
#
# Each key is also a flag, such as --max-new-tokens for max_new_tokens; a flag wins over this file.
# Lines that begin with # are defaults or examples. All settings: captioner caption --help-all
"""
_EXAMPLES = {
    "include": '["*.jpg"]',
    "exclude": '["thumbnails/*"]',
    "limit": "100",
    "split": "train",
    "reference_column": "caption",
    "keep_columns": "[title]",
    "prompt": "a photo of",
    "address": "auto",
    "local": "true",
    "references": "refs.jsonl",
    "max_failed": "0.05",
    "max_wer": "0.7",
    "max_flagged": "0.1",
}


def run(path: str, file: str, model: str | None, out: str) -> int:
    """Write `file` for the source at `path`; return the exit code. Raises CaptionerError where the file exists."""
    source = open_source(SourceConfig(path=path))
    rows = _first_rows(source)
    facts = [f"{shown(path)} is {describe(source)}", _contents(rows)]
    values = {"source.path": path, "model.name": model or _fitting_model(rows), "output.path": out}
    missing = _why_missing(values["model.name"])
    text = _text(file, facts, values, missing)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise UsageError("SOURCE, OUT or FILE is not UTF-8, which a YAML file must be; rename it") from None
    try:
        with Path(file).open("xb") as stream:
            stream.write(data)
    except FileExistsError:
        raise OutputError(f"{file} exists already; give another FILE, or remove it") from None
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}; give another FILE") from None
    then = f"first set model.name in it, since {missing}; then" if missing else "next"
    print("\n".join(map(printable, [*facts, f"wrote {file}; {then}: {_caption_command(file)}"])))
    return OK


def _caption_command(file: str) -> str:
    return shell_command("caption", "--config", file)


def _why_missing(model: str) -> str:
    """Return why this machine cannot use a model of the hub; "" where it can, and for other models."""
    if not is_hub_id(model):
        return ""
    with phase(f"asking the hub for {model}", notify):
        return why_unreachable(model)


def _first_rows(source: Source) -> pa.Table:
    """Return the planned rows of the first images. Raises SourceError where there are none."""
    listings = itertools.chain.from_iterable(map(source.list_unit, source.units()))
    batches, count = [], 0
    for listing in listings:
        batches.append(listing.rows)
        count += listing.rows.num_rows
        if count >= LOOK_AT:
            break
    if not count:
        raise SourceError(f"{source.name}: no images found; check the path")
    return pa.concat_tables(batches).slice(0, LOOK_AT)


def _contents(rows: pa.Table) -> str:
    with_captions = sum(bool(captions) for captions in rows["reference_captions"].to_pylist())
    more = " or more" if rows.num_rows == LOOK_AT else ""
    references = f"{with_captions:,} of them with known captions" if with_captions else "without known captions"
    return f"{counted(rows.num_rows, 'image')}{more}, such as {rows['image_id'][0].as_py()!r}; {references}"


def _fitting_model(rows: pa.Table) -> str:
    """Return the starter for the rendered scenes it was trained on, else a small model for photographs."""
    with_captions = [captions for captions in rows["reference_captions"].to_pylist()[:8] if captions]
    is_scene = bool(with_captions) and all(
        describes_scene(caption) for captions in with_captions for caption in captions
    )
    return STARTER if is_scene else FOR_PHOTOS


def _text(file: str, facts: list[str], values: dict[str, str], missing: str) -> str:
    settings = {(setting.group, setting.field): setting for setting in settings_of(CaptionConfig)}
    lines = [_HEAD.format(command=printable(_caption_command(file)), facts="\n# ".join(map(printable, facts)))]
    for group, fields in SHOWN.items():
        lines.append(f"{group}:")
        if group == "model" and missing:
            lines += [f"  # {line}" for line in textwrap.wrap(f"CHANGE name: {printable(missing)}", 90)]
        elif group == "model" and is_hub_id(values["model.name"]):
            lines.append("  # Downloaded from the Hugging Face hub by the first run; a directory needs no network.")
        lines += [line for field in fields for line in _lines(settings[group, field], values)]
        lines.append("")
    return "\n".join(lines)


def _lines(setting: Setting, values: dict[str, str]) -> list[str]:
    value = values.get(f"{setting.group}.{setting.field}")
    comments = [f"  # {line}" for line in textwrap.wrap(setting.info.description or "", 90)]
    if value is not None:
        return [*comments, f"  {setting.field}: {json.dumps(value, ensure_ascii=False)}"]
    return [*comments, f"  # {setting.field}: {_EXAMPLES.get(setting.field, setting.info.get_default())}"]
