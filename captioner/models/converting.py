"""Write the pickled weights of a model directory as safetensors: `captioner models convert DIR OUT`.

Each pickle is opened in a process of its own, with torch's `weights_only=True`: it may hold tensors and plain values,
and nothing that runs code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from captioner.console.text import counted, printable
from captioner.errors import ERROR, OK, ModelError
from captioner.models.checking import result_of, start_module
from captioner.models.weights import INDEX_FILE, PICKLE_SUFFIXES, SINGLE_FILE, check_not_quantised, read_json

PICKLE_FILE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
NOT_COPIED = (*PICKLE_SUFFIXES, ".h5", ".msgpack", ".ot", ".onnx", ".safetensors", ".index.json", ".py")
_UNSAFE = re.compile(r"(?:GLOBAL|global) ([\w.]+)")


def run(directory: str, out: str) -> int:
    """Convert a model, check that its tensors fit its configuration, and print the result. Raises ModelError."""
    source, target = Path(directory), Path(out)
    if not (source / "config.json").is_file():
        raise ModelError(f"{directory}: no model directory, it has no config.json; download one with hf download")
    if (source / SINGLE_FILE).is_file() or (source / INDEX_FILE).is_file():
        raise ModelError(f"{directory}: its weights are safetensors already; give it to --model")
    check_not_quantised(source / "config.json", read_json(source / "config.json"))
    if target.exists():
        raise ModelError(f"{out} exists already; give another OUT")
    files = pickle_files(source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            _convert_all(files, folder)
            _copy_others(source, folder)
            _run_in_process("captioner.models", [str(folder)], source)
            os.replace(folder, target)
    except OSError as error:
        raise ModelError(f"{out} cannot be written: {error.strerror or error}; give another OUT") from None
    print(f"{printable(out)}: {counted(len(files), 'file')} of weights as safetensors; give it to --model")
    return OK


def pickle_files(directory: Path) -> list[Path]:
    """Return the pickles that hold a model's weights, as transformers names them. Raises ModelError without any."""
    if (directory / PICKLE_FILE).is_file():
        return [directory / PICKLE_FILE]
    if (directory / PICKLE_INDEX).is_file():
        weight_map = read_json(directory / PICKLE_INDEX).get("weight_map")
        names = sorted({Path(str(name)).name for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ModelError(f"{directory}: the weights file {missing[0]} of {PICKLE_INDEX} is missing; copy it too")
        return [directory / name for name in names]
    raise ModelError(f"{directory}: no pickled weights; it needs {PICKLE_FILE} (or {PICKLE_INDEX} and its files)")


def _convert_all(files: list[Path], folder: Path) -> None:
    """Write each pickle as a safetensors file, and the index where there are several."""
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = SINGLE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        names = _run_in_process("captioner.models.converting", [str(file), str(folder / name)], file)
        weight_map |= dict.fromkeys(json.loads(names), name)
    if len(files) > 1:
        size = sum(file.stat().st_size for file in folder.iterdir())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _copy_others(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            shutil.copy(file, folder / file.name)


def _run_in_process(module: str, arguments: list[str], source: Path) -> str:
    """Run a module in another Python and return the last line of its output; raise ModelError where it fails."""
    try:
        return result_of(start_module(module, *arguments), f"{source}: its conversion")
    except ModelError as error:
        raise ModelError(str(error).replace(arguments[0], str(source))) from None


def convert_file(pickle: str, target: str) -> list[str]:
    """Write the tensors of one pickle as safetensors and return their names. Raises ModelError for anything else."""
    import torch
    from safetensors.torch import save_file

    try:
        content = torch.load(pickle, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for a damaged file depends on how it is damaged
        unsafe = _UNSAFE.search(str(error))
        if unsafe:
            raise ModelError(
                f"{pickle}: refused, opening it would run {unsafe[1]}; take a checkpoint with safetensors"
            ) from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{pickle}: cannot be opened ({reason}); copy or download it again") from None
    tensors = _tensors_of(content, pickle)
    save_file(_without_sharing(tensors), target, metadata={"format": "pt"})
    return list(tensors)


def _tensors_of(content: Any, pickle: str) -> dict[str, Any]:
    """Return the tensors by name; checkpoints of training programs hold them under "state_dict" or "model"."""
    import torch

    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{pickle}: holds a {type(content).__name__}, not tensors by name; give a model's weights")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise ModelError(f"{pickle}: {name!r} is a {kind}, not a tensor; give a model's weights")
    return content


def _without_sharing(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return contiguous tensors, each with memory of its own: safetensors refuses tied weights and views."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        is_whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        separate[name] = tensor.detach() if is_whole else tensor.detach().clone().contiguous()
    return separate


def main(arguments: list[str]) -> int:
    """Convert one pickle, and print the names of its tensors as JSON: `python -m captioner.models.converting A B`."""
    try:
        print(json.dumps(convert_file(*arguments)))
    except ModelError as error:
        print(error)
        return ERROR
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
