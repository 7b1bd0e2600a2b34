"""Find the split that files belong to, by the README of their dataset or by their names, as `datasets` does."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from captioner.console.text import counted
from captioner.errors import SourceError
from captioner.sources.root import Root

DEFAULT = "train"
ALL = "all"
# The rules of `datasets.data_files`, which are documented in its "Structure your repository".
_KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_SHARD = re.compile(rb"(?:.*/)?data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_IN_FOLDER = {name: re.compile(rf"(.*[-._ 0-9])?({words})([-._ 0-9].*)?".encode()) for name, words in _KEYWORDS.items()}
_IN_NAME = {name: re.compile(rf"(.*[-._ 0-9])?({words})[-._ 0-9].*".encode()) for name, words in _KEYWORDS.items()}


def splits_of(root: Root, files: Sequence[bytes]) -> dict[str, list[bytes]]:
    """Return the files of each split, without those that belong to none; {} where nothing says splits."""
    rules = (_split_of_shard, _split_of_folder, _split_of_name)
    # `datasets` takes what is in folders like __MACOSX and __pycache__ for no data.
    named = [file for file in files if b"/__" not in b"/" + os.path.dirname(file)]
    return _by_readme(root, files) or next(filter(None, (_by(named, rule) for rule in rules)), {})


def choose_split(
    files: Sequence[bytes], splits: Mapping[str, list[bytes]], wanted: str | None, where: str
) -> tuple[list[bytes], str]:
    """Return the files of a split, and a sentence for a person that says so; "" where there is nothing to choose.

    Without `wanted` it is `train`, where there are others and each file belongs to one. Raises SourceError where there
    is no such split.
    """
    is_complete = sum(map(len, splits.values())) == len(files)
    if wanted is None:
        wanted = DEFAULT if DEFAULT in splits and len(splits) > 1 and is_complete else ALL
    if wanted == ALL:
        return list(files), ""
    if wanted not in splits:
        raise SourceError(f"{where}: no split {wanted!r}; choose one of {', '.join(splits)} with --split")
    others = ", ".join(f"{name} ({len(of_split)})" for name, of_split in splits.items() if name != wanted)
    rest = f"; left out are the files of {others}, which --split all takes" if others else ""
    return splits[wanted], f"split {wanted!r}, {len(splits[wanted])} of {counted(len(files), 'file')}{rest}"


def _by(files: Sequence[bytes], split_of: Any) -> dict[str, list[bytes]]:
    splits: dict[str, list[bytes]] = {}
    for file in files:
        if split := split_of(file):
            splits.setdefault(split, []).append(file)
    order = [*_KEYWORDS, *sorted(splits.keys() - _KEYWORDS.keys())]
    return {split: splits[split] for split in order if split in splits}


def _split_of_shard(file: bytes) -> str | None:
    match = _SHARD.fullmatch(file)
    return match[1].decode("utf-8", "replace") if match else None


def _split_of_folder(file: bytes) -> str | None:
    folders = os.path.dirname(file).split(b"/")
    return next((name for name, word in _IN_FOLDER.items() if any(map(word.fullmatch, folders))), None)


def _split_of_name(file: bytes) -> str | None:
    return next((name for name, word in _IN_NAME.items() if word.fullmatch(os.path.basename(file))), None)


def _by_readme(root: Root, files: Sequence[bytes]) -> dict[str, list[bytes]]:
    """Return the files of each split that the YAML of the README defines, for the default configuration."""
    patterns = _data_files(root)
    regexes = {split: [_as_regex(os.fsencode(pattern)) for pattern in of_split] for split, of_split in patterns.items()}
    splits = {
        split: [file for file in files if any(regex.fullmatch(file) for regex in of_split)]
        for split, of_split in regexes.items()
    }
    return {split: of_split for split, of_split in splits.items() if of_split}


def _data_files(root: Root) -> dict[str, list[str]]:
    """Return the globs of each split in the README of a dataset; {} where it has none."""
    try:
        text = root.read(b"README.md", 0, 1 << 20).decode("utf-8", "replace")
        head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        configs = (yaml.safe_load(head[1]) or {}).get("configs") if head else None
        configs = [config for config in configs or [] if "data_files" in config]
        default = [config for config in configs if config.get("default") or config.get("config_name") == "default"]
        (config,) = default[:1] or configs
        data_files = config["data_files"]
        if isinstance(data_files, str) or all(isinstance(item, str) for item in data_files):
            return {DEFAULT: _as_list(data_files)}
        return {str(item["split"]): _as_list(item["path"]) for item in data_files}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
        return {}  # no README, or none that configures splits


def _as_list(patterns: Any) -> list[str]:
    return [patterns] if isinstance(patterns, str) else [str(pattern) for pattern in patterns]


def _as_regex(pattern: bytes) -> re.Pattern[bytes]:
    """Return a glob as a regular expression; `**` also matches slashes."""
    parts = re.split(rb"(\*\*/?|\*|\?|\[!?\]?[^]]*\])", pattern.removeprefix(b"./"))
    special = {b"**": b".*", b"**/": b"(?:.*/)?", b"*": b"[^/]*", b"?": b"[^/]"}
    regex = (special.get(part) or (_bracket(part) if part[:1] == b"[" else re.escape(part)) for part in parts)
    return re.compile(b"".join(regex), re.DOTALL)


def _bracket(part: bytes) -> bytes:
    """Return a bracket of a glob as a regular expression: `[!t]` is any other character, `[z-a]` none."""
    anchored = fnmatch.translate(os.fsdecode(part))
    return os.fsencode(anchored.removesuffix(r"\Z").removesuffix(r"\z"))
