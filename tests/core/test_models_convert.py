"""`captioner models convert`: weights of a pickle become safetensors, and a pickle that runs code is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from captioner.config import ModelConfig
from captioner.errors import ModelError
from captioner.models import load, resolve
from captioner.models.converting import convert_file, run
from captioner.testing import make_tiny_model


@pytest.fixture(scope="module")
def safe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("vision-encoder-decoder", tmp_path_factory.mktemp("model") / "safe")


def pickled(safe: Path, path: Path, shards: int = 1) -> Path:
    """The model as it was saved before safetensors, with the tied output weights in it twice."""
    shutil.copytree(safe, path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[shard::shards]} for shard in range(shards)]
    files = [f"pytorch_model-{shard}.bin" for shard in range(shards)] if shards > 1 else ["pytorch_model.bin"]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, path / file)
    if shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def captions(path: Path) -> list[str]:
    ref = resolve(ModelConfig(name=str(path), max_new_tokens=6))
    pixels = torch.randint(0, 256, (4, ref.spec.height, ref.spec.width, 3), dtype=torch.uint8)
    return load(ref, "cpu", 4).caption(pixels.numpy()).texts


def test_a_converted_model_captions_as_before(safe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pickled(safe, tmp_path / "bin", shards=2)
    (source / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(ModelError, match=rf"only pickled weights.*captioner models convert {source} OUT"):
        resolve(ModelConfig(name=str(source)))

    assert run(str(source), str(tmp_path / "new" / "out")) == 0

    torch.manual_seed(0)
    converted = captions(tmp_path / "new" / "out")
    torch.manual_seed(0)
    assert converted == captions(safe)
    assert not list((tmp_path / "new" / "out").glob("*.bin"))
    assert not list((tmp_path / "new" / "out").glob("*.py"))
    assert os.listdir(tmp_path / "new") == ["out"]
    assert "give it to --model" in capsys.readouterr().out


def test_a_module_in_the_current_folder_is_not_imported(
    safe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = pickled(safe, tmp_path / "bin"), tmp_path / "folder"
    folder.mkdir()
    (folder / "torch.py").write_text("raise SystemExit('the torch.py of somebody else')")
    monkeypatch.chdir(folder)

    assert run(str(source), str(tmp_path / "out")) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(safe / "model.safetensors").keys()


def test_tied_and_cut_tensors_become_tensors_of_their_own(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": base, "tied": base, "row": base[1], "turned": base.T}, tmp_path / "x.bin")

    assert convert_file(str(tmp_path / "x.bin"), str(tmp_path / "x.safetensors")) == ["a", "tied", "row", "turned"]

    tensors = load_file(tmp_path / "x.safetensors")
    assert torch.equal(tensors["tied"], base)
    assert torch.equal(tensors["row"], base[1])
    assert torch.equal(tensors["turned"], base.T)


class Runs:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "code": (lambda path: saved({"a": Runs(path)}), r"refused, opening it would run \w+.mkdir"),
    "code in a plain pickle": (
        lambda path: pickle.dumps({"a": Runs(path)}),
        r"refused, opening it would run|cannot be opened",
    ),
    "a whole network": (lambda path: saved(torch.nn.Linear(2, 2)), r"refused, opening it would run torch.nn.modules"),
    "other values": (lambda path: saved({"a": torch.ones(1), "step": 7}), r"'step' is a int, not a tensor"),
    "a list": (lambda path: saved([torch.ones(1)]), r"holds a list, not tensors by name"),
    "nothing": (lambda path: b"", r"cannot be opened"),
    "cut": (lambda path: saved({"a": torch.ones(100)})[:200], r"cannot be opened"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_of_something_else_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    make, message = HOSTILE[kind]
    (tmp_path / "x.bin").write_bytes(make(tmp_path / "ran"))

    with pytest.raises(ModelError, match=message) as caught:
        convert_file(str(tmp_path / "x.bin"), str(tmp_path / "x.safetensors"))

    assert os.listdir(tmp_path) == ["x.bin"]
    assert "\n" not in str(caught.value)
    assert "x.bin" in str(caught.value)


def test_weights_that_are_quantised_already_are_refused_before_they_are_read(safe: Path, tmp_path: Path) -> None:
    source = pickled(safe, tmp_path / "bin")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (source / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match=rf"{source}/config.json: its weights are quantised already .*gptq"):
        run(str(source), str(tmp_path / "out"))


def test_nothing_is_left_of_a_conversion_that_was_refused(safe: Path, tmp_path: Path) -> None:
    source = pickled(safe, tmp_path / "bin")
    (source / "pytorch_model.bin").write_bytes(saved({"a": Runs(tmp_path / "ran")}))

    with pytest.raises(ModelError, match=rf"{source}/pytorch_model.bin: refused, opening it would run \w+.mkdir"):
        run(str(source), str(tmp_path / "out"))

    assert os.listdir(tmp_path) == ["bin"]


def test_tensors_that_do_not_fit_the_configuration_are_named(safe: Path, tmp_path: Path) -> None:
    source = pickled(safe, tmp_path / "bin")
    torch.save({"a": torch.ones(1)}, source / "pytorch_model.bin")

    with pytest.raises(ModelError, match=r"bin: tensors do not fit config.json: .* 1 unexpected: a"):
        run(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_needs_no_conversion_is_said(safe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    source = pickled(safe, tmp_path / "bin", 2)
    for directory, out, message in (
        (safe, tmp_path / "out", "safetensors already"),
        (tmp_path / "empty", tmp_path / "out", "no config.json"),
        (source, tmp_path / "empty", "exists already"),
    ):
        with pytest.raises(ModelError, match=message):
            run(str(directory), str(out))
    (source / "pytorch_model-1.bin").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model-1.bin of .* is missing"):
        run(str(source), str(tmp_path / "out"))
