"""The loss is the cross-entropy over caption tokens, for every family that can be trained."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import use_t5
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from captioner.config import ModelConfig, TrainModelConfig
from captioner.data import RawImage
from captioner.errors import ModelError
from captioner.imaging import decode_images
from captioner.models import packed, resolve
from captioner.models.base import TransformersCaptioner
from captioner.models.chat import ChatCaptioner
from captioner.models.families import family_of
from captioner.models.git import GitNetwork
from captioner.models.processors import open_processor
from captioner.testing import make_tiny_model
from captioner.testing.tiny_models import TINY_SIDE
from captioner.training.chat_batches import ChatCollate
from captioner.training.collate import Collate
from captioner.training.evaluate import make_collate
from captioner.training.loss import CaptionLoss
from captioner.training.pairs import TRAINABLE
from captioner.training.trainable import enable_gradient_checkpointing, open_trainable

BLIP2_T5 = "blip-2 with T5"  # whose text model is an encoder-decoder; the tiny blip-2 has an OPT, as most have
FAMILIES = [*TRAINABLE, BLIP2_T5]
pytestmark = pytest.mark.usefixtures("one_thread")
CAPTIONS = ["a small red circle on a white background", "a ring", "a large blue square above a small green cross"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TransformersCaptioner]:
    return {family: open_tiny(make_model(family, tmp_path_factory.mktemp("model"))) for family in FAMILIES}


def make_model(family: str, path: Path) -> Path:
    return use_t5(make_tiny_model("blip-2", path)) if family == BLIP2_T5 else make_tiny_model(family, path)


def open_tiny(path: Path, **settings) -> TransformersCaptioner:
    ref = resolve(ModelConfig(name=str(path), max_new_tokens=8, preprocess="processor"))
    return open_trainable(ref, TrainModelConfig(**settings), torch.device("cpu"), 4, None)


def images(count: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, TINY_SIDE, TINY_SIDE, 3), dtype=np.uint8))


Batch = dict[str, torch.Tensor]


def batch_of(captioner: TransformersCaptioner, captions: list[str], first: int = 0) -> Batch:
    """Return the batch of captions of `images`, from number `first` on; for chat models each image has its own size."""
    collate, pixels = make_collate(captioner), images(first + len(captions))[first:]
    if isinstance(collate, ChatCollate):
        sized = [own_size(image, number) for number, image in enumerate(pixels, first)]
        decoded = decode_images([as_file(image) for image in sized], captioner.ref.spec, max_pixels=10**6)
        return collate.join(captioner.process(decoded.pixels), captions)
    return {"pixels": pixels, **collate.texts(captions)}


def as_file(image: torch.Tensor) -> RawImage:
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, "PNG")
    return RawImage("", "", buffer.getvalue())


def own_size(image: torch.Tensor, number: int) -> torch.Tensor:
    return image[: TINY_SIDE - 7 * number]


def logits_of_model(captioner: TransformersCaptioner, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the model's own logits after each token of one text: float [T, vocabulary]."""
    model, family = captioner.model, captioner.ref.family
    if isinstance(captioner, ChatCaptioner):
        text = captioner.text_of(captioner.prompts[0]) + captioner.tokenizer.decode(ids)
        processor = open_processor(captioner.ref.path, family_of(family))
        inputs = processor(text=[text], images=[[Image.fromarray(pixels.numpy())]], return_tensors="pt")
        assert inputs.input_ids[0, -len(ids) :].tolist() == ids.tolist()
        return model(**inputs).logits[0, -len(ids) - 1 :]
    images = captioner.normalise(pixels[None])
    if family == "blip-2" and model.language_model.config.is_encoder_decoder:
        prompt = torch.tensor([captioner.input_ids()])
        return model(input_ids=prompt, pixel_values=images, decoder_input_ids=ids[None]).logits[0]
    if family == "blip-2":
        ids = torch.tensor([*captioner.prefix, *ids[1:]])
        return model(input_ids=ids[None], pixel_values=images).logits[0, len(captioner.prefix) - 1 :]
    if family == "florence2":
        processor = open_processor(captioner.ref.path, family_of(family))
        question = processor(images=Image.fromarray(pixels.numpy()), text="<CAPTION>", return_tensors="pt").input_ids
        return model(input_ids=question, pixel_values=images, decoder_input_ids=ids[None]).logits[0]
    if family == "git":
        return model(input_ids=ids[None], pixel_values=images).logits[0, -len(ids) :]
    if family == "blip":
        seen = model.vision_model(pixel_values=images).last_hidden_state
        return model.text_decoder(input_ids=ids[None], encoder_hidden_states=seen).logits[0]
    return model(pixel_values=images, decoder_input_ids=ids[None]).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_cross_entropy_of_each_caption_token(models, family: str) -> None:
    captioner = models[family]
    loss, batch, end = CaptionLoss(captioner).eval(), batch_of(captioner, CAPTIONS), make_collate(captioner).end
    is_chat = isinstance(captioner, ChatCaptioner)

    with torch.no_grad():
        total = loss(**batch).item()
        expected, num_tokens = 0.0, 0
        for number, (image, caption) in enumerate(zip(images(len(CAPTIONS)), CAPTIONS, strict=True)):
            answer = f" {caption}" if is_chat else caption  # as in the chat template
            target = [*captioner.tokenizer(answer, add_special_tokens=False).input_ids, end]
            read = torch.tensor(target[:-1] if is_chat else [captioner.prefix[-1], *target[:-1]])
            logits = logits_of_model(captioner, own_size(image, number) if is_chat else image, read)
            log_probs = logits.float().log_softmax(-1)
            expected -= sum(log_probs[position, token].item() for position, token in enumerate(target))
            num_tokens += len(target)

    assert len(batch["labels"]) == num_tokens  # so prompts, images and padding have none
    assert total == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_batch_is_the_sum_of_its_pairs(models, family: str) -> None:
    captioner = models[family]
    loss = CaptionLoss(captioner).eval()

    with torch.no_grad():
        alone = [loss(**batch_of(captioner, [caption], number)).item() for number, caption in enumerate(CAPTIONS)]
        together = loss(**batch_of(captioner, CAPTIONS)).item()

    assert together == pytest.approx(sum(alone), rel=1e-4)


def gradients(captioner: TransformersCaptioner, value: torch.Tensor) -> dict[str, torch.Tensor]:
    captioner.model.zero_grad()
    value.backward()
    gradients = {name: weight.grad for name, weight in captioner.model.named_parameters() if weight.grad is not None}
    captioner.model.zero_grad()
    return gradients


def assert_same_gradients(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        size = max(gradient.abs().max().item(), 1e-3 * largest)  # gradients of key biases are zero except for rounding
        torch.testing.assert_close(gradients[name] / size, gradient / size, rtol=1e-3, atol=1e-4, msg=name)


def test_gradients_of_git_are_those_of_its_own_forward_pass(models) -> None:
    """The loss leaves out operations whose results are not used; the gradients must not change."""
    captioner = models["git"]
    loss, batch = CaptionLoss(captioner).eval(), batch_of(captioner, CAPTIONS[:1])

    logits = logits_of_model(captioner, batch["pixels"][0], batch["input_ids"][0])
    expected = gradients(captioner, functional.cross_entropy(logits, batch["labels"], reduction="sum"))

    assert_same_gradients(gradients(captioner, loss(**batch)), expected)


@pytest.mark.parametrize("adapters", [{}, {"lora_rank": 2}], ids=["all-weights", "adapters"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path, family: str, adapters: dict) -> None:
    if adapters:
        pytest.importorskip("peft", reason="the extra `lora` is not installed")
    captioner = open_tiny(make_model(family, tmp_path / "model"), **adapters)
    for module in captioner.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss, batch = CaptionLoss(captioner).train(), batch_of(captioner, CAPTIONS)
    value, all_kept = with_saved_size(lambda: loss(**batch))
    expected = gradients(captioner, value)

    enable_gradient_checkpointing(captioner.model)
    value, kept = with_saved_size(lambda: loss(**batch))

    assert kept < 0.7 * all_kept
    assert_same_gradients(gradients(captioner, value), expected)


def with_saved_size(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return the result of `run`, and how many numbers were saved for the backward pass."""
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return run(), sum(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_has_no_influence_on_the_loss(models, family: str) -> None:
    captioner = models[family]
    loss, batch = CaptionLoss(captioner).eval(), batch_of(captioner, CAPTIONS)
    predicting = torch.zeros(batch["input_ids"].shape, dtype=torch.int64)
    predicting.view(-1)[batch["positions"]] = 1
    is_padding = predicting.flip(1).cumsum(1).flip(1) == 0  # after the last token that predicts
    other = dict(batch, input_ids=batch["input_ids"].where(~is_padding, 77))
    assert is_padding.any()

    with torch.no_grad():
        assert loss(**other).item() == pytest.approx(loss(**batch).item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_that_captions_depend_on_has_a_gradient(models, family: str) -> None:
    captioner = models[family]
    loss = CaptionLoss(captioner).train()
    loss.zero_grad()

    loss(**batch_of(captioner, CAPTIONS)).backward()

    without = {name for name, weight in loss.named_parameters() if weight.grad is None}
    assert not {name for name in without if "pooler" not in name and "post_layernorm" not in name}
    loss.zero_grad()


def test_a_model_in_training_captions_with_its_current_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the network for captioning holds copies of weights, which would not change."""
    from captioner.models.git import captioner as git

    monkeypatch.setattr(git, "open_network", None)  # opens a network that copies weights

    assert type(open_tiny(make_tiny_model("git", tmp_path / "model"))._fast.network) is GitNetwork


def test_the_search_of_git_follows_its_network_to_another_device(tmp_path: Path) -> None:
    """As with --fsdp, which moves the network to the GPU after it was opened."""
    captioner, device = open_tiny(make_tiny_model("git", tmp_path / "model")), torch.device("meta")
    captioner.model.to(device)

    captioner.use_device(device)

    search = captioner._fast
    assert search.task.ends.device == search.network.device == device


def test_the_vision_encoder_can_be_frozen(tmp_path: Path) -> None:
    captioner = open_tiny(make_tiny_model("git", tmp_path / "model"), freeze_vision=True)

    learning = {name for name, weight in captioner.model.named_parameters() if weight.requires_grad}

    assert learning
    assert not any("image_encoder" in name for name in learning)


def test_a_model_without_a_known_loss_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be trained"):
        open_tiny(Path("fake"))


class Words:
    """A tokenizer of numbers, one token each."""

    def __call__(self, texts: list[str], add_special_tokens: bool) -> object:
        return type("Encoding", (), {"input_ids": [[int(word) for word in text.split()] for text in texts]})


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(10, 99), max_size=9), min_size=1, max_size=5),
    start=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    most=st.integers(1, 9),
)
def test_labels_are_the_next_tokens_and_padding_reaches_the_longest_caption(texts, start, most) -> None:
    collate = Collate(Words(), tuple(start), end=5, padding=0, spec=None, max_tokens=most)

    batch = collate.texts([" ".join(map(str, text)) for text in texts])

    length = len(start) + max(min(len(text), most) for text in texts)
    assert batch["input_ids"].shape == (len(texts), length)
    labels = dict(zip(batch["positions"].tolist(), batch["labels"].tolist(), strict=True))
    assert len(labels) == sum(min(len(text), most) + 1 for text in texts)
    for row, (text, ids) in enumerate(zip(texts, batch["input_ids"].tolist(), strict=True)):
        whole = [*start, *text[:most], 5]
        assert ids == whole[:-1] + [0] * (length - len(whole) + 1)
        after = {row * length + index: whole[index + 1] for index in range(len(start) - 1, len(whole) - 1)}
        assert after.items() <= labels.items()


@pytest.mark.parametrize("family", ["git", "qwen2_vl"])
def test_layers_that_a_cpu_packs_for_captioning_are_trained(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "MIN_WEIGHTS", 1)
    network = open_tiny(make_tiny_model(family, tmp_path / "model")).model

    assert [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    assert not [name for name, module in network.named_modules() if isinstance(module, packed.PackedLinear)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_name_of_a_special_token_in_a_caption_is_text(
    models: dict[str, TransformersCaptioner], family: str
) -> None:
    """Captions of LLaVA's data hold "<image>", which chat models and BLIP-2 took for an image without features."""
    captioner = models[family]
    tokenizer, image_token = captioner.tokenizer, getattr(captioner.model.config, "image_token_id", None)
    special = {*tokenizer.all_special_ids, *([] if image_token is None else [image_token])}
    captions = [f"a {name} ring" for name in tokenizer.convert_ids_to_tokens(sorted(special))]

    batch, end = batch_of(captioner, captions), make_collate(captioner).end

    labels = batch["labels"].tolist()
    assert labels.count(end) == len(captions)
    assert not set(labels) & special - {end, tokenizer.unk_token_id}
    assert math.isfinite(CaptionLoss(captioner)(**batch).item())
