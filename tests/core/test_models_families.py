"""Captions of BLIP-2, Florence-2 and chat models are those of the model's own processor and `generate`."""

from __future__ import annotations

import io
import json
import shutil
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import chats_to_test, use_t5
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from captioner.config import ModelConfig
from captioner.data import RawImage
from captioner.errors import ModelError
from captioner.imaging import decode_images
from captioner.models import load, packed, resolve
from captioner.models.families import FAMILY_BY_NAME, QUESTION, family_of
from captioner.models.processors import open_processor
from captioner.models.questions import prompts_of
from captioner.starter.scenes import make_scenes
from captioner.steps import caption_or_reasons
from captioner.testing import make_tiny_model
from captioner.testing.tiny_chat_models import TINY_CHATS

LIMIT = 12
START, END = 1, 2
NEW = ("blip-2", "florence2", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", *chats_to_test())


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cache(lambda family: make_tiny_model(family, tmp_path_factory.mktemp(family)))


@cache
def small_images() -> list[Image.Image]:
    """Return images with sizes below, at and above those of the tiny models."""
    sizes = [(20 + 7 * index % 31, 18 + 5 * index % 29) for index in range(12)]
    return [scene.render(64).resize(size) for scene, size in zip(make_scenes(12, seed=5), sizes, strict=True)]


def as_files(images: list[Image.Image]) -> list[RawImage]:
    raws = []
    for index, image in enumerate(images):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        raws.append(RawImage(str(index), "", buffer.getvalue()))
    return raws


def caption(directory: Path, batch_size: int = 16, images: list[Image.Image] | None = None, **settings):
    """Return the captions of images, read from files."""
    config = ModelConfig(name=str(directory), **({"max_new_tokens": LIMIT, "preprocess": "processor"} | settings))
    ref = resolve(config)
    decoded = decode_images(as_files(images or small_images()), ref.spec, max_pixels=10**6)
    return load(ref, device="cpu", batch_size=batch_size).caption(decoded.pixels)


def change_settings(file: Path, **settings: object) -> None:
    """Change settings in a model's JSON file; None removes one."""
    changed = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))


@pytest.fixture(scope="module")
def greedy(model):
    """The captions of `small_images` in one batch, by the directory of the model."""
    return cache(caption)


def generate_one_by_one(
    family: str, directory: Path, prompt: str | None = None, images: list[Image.Image] | None = None
) -> list[str]:
    """Return captions by `generate` on one image after the other, prepared by transformers' own classes."""
    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = []
    for image in images or small_images():
        inputs = INPUTS[family](directory, tokenizer, image, prompt)
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=LIMIT)[0]
        num_start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        texts.append(tokenizer.decode(ids[num_start:], skip_special_tokens=True).strip())
    return texts


def blip2_inputs(directory, tokenizer, image, prompt):
    from transformers import Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    processor = Blip2Processor(BlipImageProcessorPil.from_pretrained(directory), tokenizer, num_query_tokens=4)
    return processor(images=image, text=prompt or "", return_tensors="pt")


def florence2_inputs(directory, tokenizer, image, prompt):
    from transformers import Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = Florence2Processor(CLIPImageProcessorPil.from_pretrained(directory), tokenizer)
    return processor(images=image, text=prompt or "<CAPTION>", return_tensors="pt")


def tiled_inputs(directory, tokenizer, image, prompt, kind):
    images = kind.from_pretrained(directory)([[image]], return_row_col_info=True, return_tensors="pt")
    rows, columns = images.pop("rows")[0][0], images.pop("cols")[0][0]
    tokens = ("<fake_token_around_image>", "<image>", "<global-img>")
    placeholders = get_image_prompt_string(rows, columns, 4, *tokens)
    text = f"user:{placeholders} {prompt or QUESTION}\nassistant:"
    return dict(tokenizer(text, return_tensors="pt")) | dict(images)


def qwen_inputs(directory, tokenizer, image, prompt):
    images = Qwen2VLImageProcessorPil.from_pretrained(directory)([image], return_tensors="pt")
    placeholders = "<|image_pad|>" * (int(images["image_grid_thw"].prod()) // 4)
    text = f"user:<|vision_start|>{placeholders}<|vision_end|> {prompt or QUESTION}\nassistant:"
    inputs = dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False)) | dict(images)
    kinds = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    return inputs | {"mm_token_type_ids": kinds}


@cache
def processor_of(family: str, directory: Path):
    """Return the processor as transformers opens it or, where that needs torchvision for videos, without that part."""
    try:
        return AutoProcessor.from_pretrained(directory, backend="pil")
    except (ImportError, OSError, ValueError):
        return open_processor(str(directory), family_of(family))


def chat_inputs(directory, tokenizer, image, prompt, family):
    """Return the inputs as in the documentation of each of these models in transformers."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt or QUESTION}]
    return processor_of(family, directory).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def paligemma_inputs(directory, tokenizer, image, prompt):
    processor = processor_of("paligemma", directory)
    return processor(text=f"<image>{prompt or 'caption en'}", images=image, return_tensors="pt")


INPUTS = {family: partial(chat_inputs, family=family) for family in TINY_CHATS} | {
    "paligemma": paligemma_inputs,
    "blip-2": blip2_inputs,
    "florence2": florence2_inputs,
    "idefics3": lambda *args: tiled_inputs(*args, kind=Idefics3ImageProcessorPil),
    "smolvlm": lambda *args: tiled_inputs(*args, kind=SmolVLMImageProcessorPil),
    "qwen2_vl": qwen_inputs,
    "qwen2_5_vl": qwen_inputs,
}


@pytest.mark.parametrize("family", NEW)
def test_captions_are_those_of_the_processor_and_generate(family, model, greedy) -> None:
    expected = generate_one_by_one(family, model(family))

    assert len(set(expected)) >= len(expected) / 2
    assert greedy(model(family)).texts == expected


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", NEW)
def test_batches_do_not_change_captions(family, num_beams, model, greedy) -> None:
    single = caption(model(family), batch_size=1, num_beams=num_beams)
    batched = greedy(model(family)) if num_beams == 1 else caption(model(family), batch_size=7, num_beams=num_beams)

    assert len(set(single.texts)) >= len(single.texts) / 2
    assert (batched.texts, batched.num_tokens, batched.finished) == (single.texts, single.num_tokens, single.finished)
    np.testing.assert_allclose(batched.logprob_mean, single.logprob_mean, atol=1e-3)


@pytest.mark.parametrize("family", NEW)
def test_images_of_very_different_sizes_are_captioned_in_one_batch(family, model) -> None:
    sizes = [(8, 8), (9, 150), (300, 20), (200, 170), (33, 32), (64, 64)]
    images = [scene.render(64).resize(size) for scene, size in zip(make_scenes(6, seed=8), sizes, strict=True)]
    expected = generate_one_by_one(family, model(family), images=images)

    assert caption(model(family), batch_size=6, images=images).texts == expected


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_images_of_like_size_share_a_batch(family, model) -> None:
    images = [
        scene.render(64).resize((64, 8 + 120 * (index % 2))) for index, scene in enumerate(make_scenes(8, seed=8))
    ]

    paddings = []
    for batch_size in (8, 4):
        (usage,) = caption(model(family), batch_size=batch_size, images=images).usage
        paddings.append(usage.padding_tokens)

    assert paddings[0] > 0
    assert paddings[1] == 0


@pytest.mark.parametrize("family", ["blip", "florence2", "smolvlm", "qwen2_5_vl"])
def test_packed_layers_do_not_change_captions(family, model, greedy, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = greedy(model(family))
    monkeypatch.setattr(packed, "MIN_WEIGHTS", 1)

    assert caption(model(family)).texts == plain.texts


@pytest.mark.parametrize("family", NEW)
def test_a_prompt_changes_captions_without_being_in_them(family, model, greedy) -> None:
    prompt = "<DETAILED_CAPTION>" if family == "florence2" else "a small red"
    expected = generate_one_by_one(family, model(family), prompt)

    captions = caption(model(family), prompt=prompt)

    assert captions.texts == expected
    assert captions.texts != greedy(model(family)).texts


@pytest.mark.parametrize("family", NEW)
def test_the_prompt_is_in_the_summary_and_in_the_fingerprint(family, model) -> None:
    plain, other = (resolve(ModelConfig(name=str(model(family)), prompt=prompt)) for prompt in (None, "What is this?"))

    assert plain.prompt == family_of(family).default_prompt
    assert repr(plain.prompt) in plain.summary or plain.prompt is None
    assert plain.fingerprint != other.fingerprint
    assert plain.fingerprint == resolve(ModelConfig(name=str(model(family)), prompt=plain.prompt)).fingerprint


def test_tasks_that_do_not_produce_captions_are_refused(model) -> None:
    with pytest.raises(ModelError, match=r"--prompt '<OD>': not a caption task of florence2; use <CAPTION>, "):
        resolve(ModelConfig(name=str(model("florence2")), prompt="<OD>"))


def test_a_florence_that_needs_its_own_code_is_refused(tmp_path) -> None:
    config = {"model_type": "florence2", "vision_config": {"model_type": "davit"}}
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match="use the same model from florence-community on the hub"):
        resolve(ModelConfig(name=str(tmp_path)))


def test_blip2_with_t5_reads_the_prompt_and_does_not_repeat_it(tmp_path) -> None:
    make_tiny_model("blip-2", tmp_path)
    use_t5(tmp_path)

    for prompt in (None, "a small red"):
        assert caption(tmp_path, prompt=prompt).texts == generate_one_by_one("blip-2", tmp_path, prompt)


def test_a_template_that_writes_the_start_token_gets_no_second_one(tmp_path) -> None:
    make_tiny_model("qwen2_vl", tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text("<s>" + template.read_text())
    captioner = load(resolve(ModelConfig(name=str(tmp_path))), device="cpu")

    ids = captioner.process([np.zeros((16, 16, 3), np.uint8)])["input_ids"][0].tolist()

    assert ids.count(START) == 1


def test_a_model_without_a_chat_template_is_an_error_of_one_line(tmp_path) -> None:
    make_tiny_model("qwen2_vl", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()

    with pytest.raises(ModelError, match="its chat template cannot be used") as raised:
        load(resolve(ModelConfig(name=str(tmp_path))), device="cpu")

    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("named", [False, True])
def test_a_chat_template_in_the_settings_of_the_tokenizer_is_used(named: bool, model, greedy, tmp_path) -> None:
    copy = shutil.copytree(model("qwen2_vl"), tmp_path / "model")
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    both = [{"name": "tool_use", "template": "no image"}, {"name": "default", "template": template}]
    change_settings(copy / "tokenizer_config.json", chat_template=both if named else template)

    assert caption(copy).texts == greedy(model("qwen2_vl")).texts


def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day(tmp_path) -> None:
    make_tiny_model("qwen2_vl", tmp_path)
    template = tmp_path / "chat_template.jinja"
    dates = "{{ strftime_now('%d %b %Y') }}|{{ strftime_now(form) }}|{{ strftime_now('%Y')|int - 1 }}"
    before = "  {% if strftime_now is defined %}{% set form = '%Y-%m-%d' %}" + dates + "{% endif %}\n"
    template.write_text(before + template.read_text())
    captioner = load(resolve(ModelConfig(name=str(tmp_path))), device="cpu")

    text = captioner.text_of("What is this?")

    assert text.startswith("01 Jan 2026|2026-01-01|2025user:<|vision_start|>")


def test_a_tokenizer_without_a_token_for_padding_pads_with_its_end_token(model, greedy, tmp_path) -> None:
    copy = shutil.copytree(model("qwen2_vl"), tmp_path / "model")
    change_settings(copy / "tokenizer_config.json", pad_token=None)

    assert caption(copy).texts == greedy(model("qwen2_vl")).texts


def test_a_tokenizer_without_any_token_for_padding_is_an_error(model, tmp_path) -> None:
    copy = shutil.copytree(model("qwen2_vl"), tmp_path / "model")
    change_settings(copy / "tokenizer_config.json", pad_token=None, eos_token=None)

    with pytest.raises(ModelError, match="the tokenizer has no token for padding; set pad_token in tokenizer_config"):
        caption(copy)


@pytest.mark.parametrize("family", ["blip-2", "florence2", "paligemma"])
def test_a_prompt_with_the_placeholder_of_images_is_refused(family, model) -> None:
    with pytest.raises(ModelError, match=r"--prompt contains the image placeholder <image>; remove it"):
        load(resolve(ModelConfig(name=str(model(family)), prompt="caption <image> en")), device="cpu")


@pytest.mark.parametrize("prompt", ["<|image_pad|> What is this?", None])
def test_a_question_without_exactly_one_image_placeholder_is_an_error(prompt, tmp_path) -> None:
    make_tiny_model("qwen2_vl", tmp_path)
    if prompt is None:
        (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}")

    with pytest.raises(
        ModelError, match=rf"contain {2 if prompt else 0} image placeholders \(<\|image_pad\|>\), not 1"
    ):
        load(resolve(ModelConfig(name=str(tmp_path), prompt=prompt)), device="cpu")


def test_only_the_image_fails_whose_column_holds_the_placeholder_of_images(model) -> None:
    settings = {"prompt": "Its title is {title}.", "max_new_tokens": LIMIT}
    ref = resolve(ModelConfig(name=str(model("qwen2_vl")), **settings))
    decoded = decode_images(as_files(small_images()[:4]), ref.spec, max_pixels=10**6)
    titles = pa.table({"title": ["a cat", None, "<|image_pad|>\nWhat is shown here?", "a dog"]})

    captioner = load(ref, device="cpu", batch_size=4)
    results = caption_or_reasons(captioner, decoded.pixels, prompts=prompts_of(ref, titles))

    assert [isinstance(result, str) for result in results] == [False, False, True, False]
    assert "contain 2 image placeholders" in str(results[2])


def test_florence2_marks_captions_as_cut_where_generate_forces_an_end_token(model, greedy) -> None:
    cut = caption(model("florence2"), max_new_tokens=4)

    whole = greedy(model("florence2"))
    assert cut.num_tokens == [min(count, 4) for count in whole.num_tokens]
    assert cut.finished == [count < 4 for count in cut.num_tokens]


def test_florence2_needs_no_start_token_in_the_settings_of_generate(model, greedy, tmp_path) -> None:
    copy = shutil.copytree(model("florence2"), tmp_path / "model")
    (copy / "generation_config.json").write_text('{"eos_token_id": 2, "pad_token_id": 0, "forced_eos_token_id": 2}')

    assert caption(copy).texts == greedy(model("florence2")).texts


def test_only_the_image_that_the_processor_refuses_fails(model) -> None:
    ref = resolve(ModelConfig(name=str(model("qwen2_vl")), max_new_tokens=LIMIT))
    strip = Image.new("RGB", (900, 2))  # Qwen refuses aspect ratios above 200
    decoded = decode_images(as_files([*small_images()[:3], strip]), ref.spec, max_pixels=10**6)

    results = caption_or_reasons(load(ref, device="cpu", batch_size=4), decoded.pixels)

    assert [isinstance(result, str) for result in results] == [False, False, False, True]
    assert "aspect ratio" in str(results[3])


def test_a_batch_that_exceeds_the_memory_is_halved_and_no_image_is_lost(model, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = load(resolve(ModelConfig(name=str(model("smolvlm")), max_new_tokens=LIMIT)), device="cpu", batch_size=9)
    decoded = decode_images(as_files(small_images()), captioner.ref.spec, max_pixels=10**6)
    expected = captioner.caption(decoded.pixels)
    search = captioner.search

    def with_little_memory(prepared, numbers):
        if len(prepared["input_ids"]) > 3:
            raise torch.OutOfMemoryError("no memory")
        return search(prepared, numbers)

    monkeypatch.setattr(captioner, "search", with_little_memory)

    assert captioner.caption(decoded.pixels).texts == expected.texts
    assert captioner.batch_size == 2


def test_families_that_need_a_prompt_have_a_default() -> None:
    assert all(
        (family.default_prompt is None) == (family.prompt in ("none", "start")) for family in FAMILY_BY_NAME.values()
    )
