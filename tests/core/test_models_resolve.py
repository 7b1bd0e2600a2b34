"""From a name to a ModelRef: how models are found, what is recorded, and how others are refused."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from captioner.config import ModelConfig
from captioner.data import PixelSpec
from captioner.errors import ModelError
from captioner.models import load, resolve
from captioner.models.families import QUESTION
from captioner.testing import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model("git", tmp_path_factory.mktemp("model") / "tiny-git")


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def resolved(directory, **settings):
    return resolve(ModelConfig(name=str(directory), **settings))


def edit_json(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(file, size) -> None:
    file.write_bytes(file.read_bytes()[:size])


def test_a_directory_describes_all_a_worker_needs(tiny) -> None:
    ref = resolved(tiny, num_beams=3, max_new_tokens=9, prompt="a red")

    assert (ref.name, ref.path, ref.family, ref.revision) == (str(tiny), str(tiny), "git", None)
    assert (ref.dtype, ref.num_beams, ref.max_new_tokens, ref.prompt) == ("float32", 3, 9, "a red")
    assert (ref.spec.height, ref.spec.width, ref.spec.resize, ref.spec.shortest_edge) == (32, 32, "shortest_edge", 32)
    assert ref.training_run_id is None
    assert pickle.loads(pickle.dumps(ref)) == ref


def test_the_sha256_is_that_of_the_weights_file(tiny) -> None:
    shown = subprocess.run(["sha256sum", tiny / "model.safetensors"], capture_output=True, text=True, check=True)

    assert resolved(tiny).sha256 == shown.stdout.split()[0]


def test_a_relative_directory_is_made_absolute(tiny, monkeypatch) -> None:
    monkeypatch.chdir(tiny.parent)

    assert resolve(ModelConfig(name=tiny.name)).path == str(tiny)


def test_the_training_run_is_recorded(model) -> None:
    (model / "training_run.json").write_text('{"training_run_id": "flickr-0007"}')

    assert resolved(model).training_run_id == "flickr-0007"


def test_auto_dtype_is_chosen_by_the_caller(tiny) -> None:
    assert resolve(ModelConfig(name=str(tiny)), dtype="bfloat16").dtype == "bfloat16"
    assert resolve(ModelConfig(name=str(tiny), dtype="float32"), dtype="bfloat16").dtype == "float32"


def test_starter_and_fake_need_no_path() -> None:
    assert resolve(ModelConfig(name="starter")).family == "git"
    assert resolve(ModelConfig(name="fake")).spec == PixelSpec(height=32, width=32)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: {"num_beams": 2},
        lambda model: {"max_new_tokens": 7},
        lambda model: {"prompt": "a"},
        lambda model: {"dtype": "bfloat16"},
        lambda model: make_tiny_model("git", model, seed=1) and {},
        lambda model: edit_json(model / "config.json", layer_norm_eps=1e-6) or {},
        lambda model: edit_json(model / "generation_config.json", no_repeat_ngram_size=2) or {},
        lambda model: edit_json(model / "tokenizer_config.json", model_max_length=32) or {},
        lambda model: (model / "preprocessor_config.json").write_text("{}") and {},
    ],
    ids=["beams", "tokens", "prompt", "dtype", "weights", "config", "generation", "tokenizer", "processor"],
)
def test_the_fingerprint_depends_on_all_that_determines_captions(change, model) -> None:
    before = resolved(model).fingerprint

    assert resolved(model, **change(model)).fingerprint != before


def test_the_fingerprint_depends_on_nothing_else(model, tmp_path) -> None:
    before = resolved(model).fingerprint
    moved = model.rename(tmp_path / "moved")
    (moved / "README.md").write_text("a card")
    (moved / "training_run.json").write_text('{"training_run_id": "7"}')

    assert resolved(moved, batch_size=3, revision=None).fingerprint == before


def remove(*names):
    return lambda model: [(model / name).unlink() for name in names]


def only_pickles(model) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "no config.json; give the directory"),
        (remove("model.safetensors"), "no weights; it needs model.safetensors"),
        (only_pickles, r"only pickled weights \(pytorch_model.bin\).*captioner models convert"),
        (remove("processor_config.json"), "no image processor settings"),
        (remove("tokenizer.json"), "no tokenizer .*save the model's processor or tokenizer"),
        (lambda model: truncate(model / "model.safetensors", 5000), "model.safetensors: is not a safetensors file"),
        (lambda model: truncate(model / "model.safetensors", 100_000), "holds 100,000 bytes, not the"),
        (lambda model: truncate(model / "model.safetensors", 0), "model.safetensors: is not a safetensors file"),
        (lambda model: (model / "model.safetensors").write_bytes(b"PK\3\4" * 99), "is not a safetensors file"),
        (lambda model: (model / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda model: (model / "config.json").write_text("[]"), "config.json: holds a JSON list"),
        (lambda model: (model / "processor_config.json").write_text("{'"), "processor_config.json: cannot be read"),
        (
            lambda model: (model / "generation_config.json").write_text('{"no_repeat_ngram_size": 2,}'),
            "generation_config.json: cannot be read as JSON",
        ),
        (
            lambda model: (model / "generation_config.json").write_text("\ufeff{}"),
            "generation_config.json: cannot be read as JSON",
        ),
        (
            lambda model: edit_json(model / "config.json", model_type="llama"),
            "model_type 'llama' is not supported: transformers .* has no model .*; supported: git, blip, blip-2",
        ),
        (
            lambda model: edit_json(model / "config.json", vision_config={"image_size": 48}),
            "makes 32x32 pixels, its model wants 48x48",
        ),
    ],
)
def test_an_unusable_directory_is_an_error_of_one_line(damage, message, model) -> None:
    damage(model)

    with pytest.raises(ModelError, match=message) as raised:
        resolved(model)

    assert_one_line(raised.value, str(model))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"no model given; add --model starter\|DIR\|HUB_ID"),
        ("  ", "no model given"),
        ("nowhere", "--model nowhere: no such directory; use starter, a model directory, a hub id"),
        ("./nowhere", "--model ./nowhere: no such directory"),
        ("/no/such/place", "--model /no/such/place: no such directory"),
    ],
)
def test_an_unknown_name_is_an_error_of_one_line(name, message) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        resolve(ModelConfig(name=name))

    assert_one_line(raised.value, name.strip())


def test_a_file_is_not_a_model(tiny) -> None:
    with pytest.raises(ModelError, match="is a file; give the directory"):
        resolved(tiny / "config.json")


def test_a_directory_has_no_revision(tiny) -> None:
    with pytest.raises(ModelError, match="--revision main: only hub ids have revisions"):
        resolved(tiny, revision="main")


def test_captions_longer_than_the_model_can_hold_are_refused(tiny) -> None:
    with pytest.raises(ModelError, match=r"--max-new-tokens 64: .* has 64 text positions.*use 63 or fewer"):
        resolved(tiny, max_new_tokens=64)


def test_a_vision_encoder_decoder_takes_no_prompt(tmp_path) -> None:
    model = make_tiny_model("vision-encoder-decoder", tmp_path)

    with pytest.raises(ModelError, match=r"--prompt 'a photo of': .* takes no prompt"):
        resolved(model, prompt="a photo of")


def test_a_chat_model_of_a_type_not_in_the_table_is_tried_with_a_line_that_says_so(tmp_path) -> None:
    lines: list[str] = []

    ref = resolve(ModelConfig(name=str(make_tiny_model("vipllava", tmp_path))), notify=lines.append)

    assert (ref.family, ref.prompt) == ("vipllava", QUESTION)
    assert lines == ["model_type vipllava is not tested; used through its chat template"]


def name_processor(model, name) -> None:
    edit_json(model / "processor_config.json", processor_class=name)


@pytest.mark.parametrize(
    ("model_type", "damage", "reason"),
    [
        ("lfm2_vl", lambda model: None, "its image processor needs torchvision"),
        ("glm_ocr", lambda model: None, "transformers .* has no processor of this type"),
        ("mllama", lambda model: name_processor(model, "PixtralProcessor"), "its PixtralProcessor needs a package"),
        ("pixtral", lambda model: None, "transformers .* has no model of this type"),
        ("moondream1", lambda model: edit_json(model / "config.json", auto_map={}), "it needs the .* own code"),
        ("aria", remove("chat_template.jinja"), "its directory has no chat template"),
    ],
)
def test_a_chat_model_that_cannot_work_is_refused_with_the_reason(model_type, damage, reason, tmp_path) -> None:
    model = make_tiny_model("llava", tmp_path)
    edit_json(model / "config.json", model_type=model_type)
    settings = json.loads((model / "processor_config.json").read_text())
    del settings["image_processor"]["image_processor_type"]
    (model / "processor_config.json").write_text(json.dumps(settings))
    damage(model)

    with pytest.raises(ModelError, match=f"model_type '{model_type}' is not supported: {reason}") as raised:
        resolved(model)

    assert_one_line(raised.value, str(model))


FP8 = {"quantization_config": {"quant_method": "fp8"}}


@pytest.mark.parametrize("settings", [FP8, {"text_config": FP8}], ids=["model", "text model"])
def test_weights_that_are_quantised_already_are_refused_with_what_to_do(model, settings) -> None:
    edit_json(model / "config.json", **settings)

    with pytest.raises(ModelError, match=r"quantised already \(quantization_config: fp8\).*--quantize int8") as raised:
        resolved(model)

    assert_one_line(raised.value, str(model))
    edit_json(model / "config.json", quantization_config=None, text_config={})
    assert resolved(model)


def test_a_missing_shard_is_named(model) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    with pytest.raises(ModelError, match=r"the weights file model-00002-of-00002\.safetensors"):
        resolved(model)


def test_pickles_beside_safetensors_are_not_touched(model) -> None:
    (model / "pytorch_model.bin").write_bytes(b"not even a pickle")

    assert load(resolved(model), device="cpu")


def test_code_in_the_directory_is_never_run(model, tmp_path) -> None:
    sign = tmp_path / "it-ran"
    (model / "evil.py").write_text(f"open({str(sign)!r}, 'w').close()\nModel = Config = Tokenizer = object\n")
    edit_json(
        model / "config.json",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"},
    )
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})

    load(resolved(model), device="cpu")

    assert not sign.exists()


def test_a_broken_tokenizer_is_an_error_of_one_line(model) -> None:
    (model / "tokenizer.json").write_text("{}")

    with pytest.raises(ModelError, match="the tokenizer cannot be loaded") as raised:
        load(resolved(model), device="cpu")

    assert_one_line(raised.value, str(model))


def flip_a_bit(model: Path) -> None:
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)


@pytest.mark.parametrize("change", [partial(make_tiny_model, "git", seed=1), flip_a_bit], ids=["others", "one bit"])
def test_weights_that_changed_since_the_start_are_refused(model, change) -> None:
    ref = resolved(model)
    change(model)

    with pytest.raises(ModelError, match="not the files that the run started with"):
        load(ref)


def test_a_directory_of_another_machine_is_named(model) -> None:
    ref = resolved(model)
    shutil.rmtree(model)

    with pytest.raises(ModelError, match="put the model on a disk all machines share"):
        load(ref)


def test_resolving_imports_nothing_heavy(tiny) -> None:
    code = f"""
import sys
from captioner.config import ModelConfig
from captioner.models import check_in_subprocess, load, resolve
for name in ({str(tiny)!r}, "starter", "fake"):
    resolve(ModelConfig(name=name), notify=str)
load(resolve(ModelConfig(name="fake")))
print([name for name in ("torch", "transformers", "tokenizers", "huggingface_hub", "ray") if name in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert shown.stdout.strip() == "[]"


def assert_one_line(error, value) -> None:
    assert "\n" not in str(error)
    assert value in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))
