"""Find, hash and check the files of a model directory, without torch or transformers."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioner.errors import ModelError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
TRAINING_IMAGES = "training_images.parquet"  # of a model that `captioner train` has made: which images it saw
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# The files that determine captions besides the weights, as current and earlier versions of transformers save them.
SETTINGS_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


# In a directory with none of these transformers opens an empty tokenizer, whose texts are empty.
VOCABULARY_FILES = (
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a model's file; {} where there is no such file.

    Raises ModelError where the file cannot be read or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({error}); save or copy the model again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds a JSON {type(content).__name__}, not an object; save the model again")
    return content


def check_not_quantised(config_file: Path, config: dict[str, Any]) -> None:
    """Raise ModelError where the weights of a model are stored in fewer bits already, as its config.json says.

    Such tensors can be compared with config.json only by loading them, and their shapes do not tell their memory.
    """
    for section in (config, *config.values()):  # transformers takes it from the section of the text model too
        stored = section.get("quantization_config") if isinstance(section, dict) else None
        if stored:
            method = stored.get("quant_method") if isinstance(stored, dict) else stored
            raise ModelError(
                f"{config_file}: its weights are quantised already (quantization_config: {method}), which is not"
                " supported; give the checkpoint with unquantised weights, where memory is short with --quantize"
                " int8|int4"
            )


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that transformers would load, by name. Raises ModelError where there are none."""
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if (directory / INDEX_FILE).is_file():
        return _sharded_files(directory)
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such directory; copy the model to this place on every node")
    pickles = sorted(
        f.name for f in directory.iterdir() if f.suffix in PICKLE_SUFFIXES and f.name != "training_args.bin"
    )
    if pickles:
        raise ModelError(
            f"{directory}: only pickled weights ({pickles[0]}), which can run code when opened; convert them safely:"
            f" captioner models convert {shlex.quote(str(directory))} OUT"
        )
    raise ModelError(
        f"{directory}: no weights; it needs {SINGLE_FILE} (or {INDEX_FILE} and its shards); of a model that has only"
        " pytorch_model.bin: hf download NAME --local-dir DIR, then captioner models convert DIR OUT"
    )


def _sharded_files(directory: Path) -> list[Path]:
    weight_map = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{directory / INDEX_FILE}: has no weight_map; save or copy the model again")
    files = sorted({directory / str(name) for name in weight_map.values()})
    for file in files:
        if not file.is_file():
            raise ModelError(f"{directory}: the weights file {file.name} of {INDEX_FILE} is missing; copy it too")
    return files


def check_header(file: Path) -> None:
    """Raise ModelError unless `file` has a safetensors header and as many bytes as the header implies.

    Format: 8 bytes little-endian header length, JSON of dtype, shape and data_offsets for each tensor, data
    (https://huggingface.co/docs/safetensors).
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("no safetensors header")
            header = json.loads(stream.read(length))
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: is not a safetensors file ({error}); copy or download it again") from None
    if size != 8 + length + end:
        raise ModelError(
            f"{file}: holds {size:,} bytes, not the {8 + length + end:,} of its header; copy or download it again"
        )


def tensor_shapes(directory: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield name and shape of each tensor that transformers would load, from the headers of the files."""
    for file in weight_files(directory):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        yield from ((name, tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def sha256_of(files: list[Path]) -> str:
    """Return the hex sha256 over the files' contents, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def settings_sha256(directory: Path) -> str:
    """Return the hex sha256 over the names and contents of the settings files in a directory."""
    digest = hashlib.sha256()
    for name in SETTINGS_FILES:
        file = directory / name
        if file.is_file():
            digest.update(f"{name}\0{sha256_of([file])}\n".encode())
    return digest.hexdigest()
