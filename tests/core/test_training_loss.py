"""The loss is the cross-entropy over caption tokens, for every family that can be trained."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from captioner.config import ModelConfig, TrainModelConfig
from captioner.errors import ModelError
from captioner.models import resolve
from captioner.models.base import TransformersCaptioner
from captioner.models.git import GitNetwork
from captioner.testing import make_tiny_model
from captioner.testing.tiny_models import TINY_SIDE
from captioner.training.collate import Collate
from captioner.training.loop import make_collate
from captioner.training.loss import CaptionLoss
from captioner.training.trainable import open_trainable

FAMILIES = ["git", "blip", "vision-encoder-decoder"]
CAPTIONS = ["a small red circle on a white background", "a ring", "a large blue square above a small green cross"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TransformersCaptioner]:
    return {family: open_tiny(make_tiny_model(family, tmp_path_factory.mktemp(family))) for family in FAMILIES}


def open_tiny(path: Path, **settings) -> TransformersCaptioner:
    ref = resolve(ModelConfig(name=str(path), max_new_tokens=8))
    return open_trainable(ref, TrainModelConfig(**settings), torch.device("cpu"), 4, None)


def images(count: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, TINY_SIDE, TINY_SIDE, 3), dtype=np.uint8))


def logits_of_model(captioner: TransformersCaptioner, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the model's own logits after each token of one text: float [T, vocabulary]."""
    images = captioner.normalise(pixels[None])
    model, family = captioner.model, captioner.ref.family
    if family == "git":
        return model(input_ids=ids[None], pixel_values=images).logits[0, -len(ids) :]
    if family == "blip":
        seen = model.vision_model(pixel_values=images).last_hidden_state
        return model.text_decoder(input_ids=ids[None], encoder_hidden_states=seen).logits[0]
    return model(pixel_values=images, decoder_input_ids=ids[None]).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_cross_entropy_of_each_caption_token(models, family: str) -> None:
    captioner = models[family]
    loss, collate = CaptionLoss(captioner).eval(), make_collate(captioner)
    pixels = images(len(CAPTIONS))

    with torch.no_grad():
        total = loss(pixels, **collate.texts(CAPTIONS)).item()
        expected, num_tokens = 0.0, 0
        for image, caption in zip(pixels, CAPTIONS, strict=True):
            text = [captioner.prefix[0], *captioner.tokenizer(caption, add_special_tokens=False).input_ids, collate.end]
            log_probs = logits_of_model(captioner, image, torch.tensor(text[:-1])).float().log_softmax(-1)
            expected -= sum(log_probs[position, token].item() for position, token in enumerate(text[1:]))
            num_tokens += len(text) - 1

    assert num_tokens == len(collate.texts(CAPTIONS)["labels"])
    assert total == pytest.approx(expected, rel=1e-4)


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
    loss, pixels = CaptionLoss(captioner).eval(), images(1)
    texts = make_collate(captioner).texts(CAPTIONS[:1])

    logits = logits_of_model(captioner, pixels[0], texts["input_ids"][0])
    expected = gradients(captioner, functional.cross_entropy(logits, texts["labels"], reduction="sum"))

    assert_same_gradients(gradients(captioner, loss(pixels, **texts)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path, family: str) -> None:
    captioner = open_tiny(make_tiny_model(family, tmp_path / "model"))
    for module in captioner.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss, texts = CaptionLoss(captioner).train(), make_collate(captioner).texts(CAPTIONS)
    value, all_kept = with_saved_size(lambda: loss(images(3), **texts))
    expected = gradients(captioner, value)

    captioner.model.activation_checkpointing_enable({"use_reentrant": False})
    value, kept = with_saved_size(lambda: loss(images(3), **texts))

    assert kept < all_kept / 2
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
    loss, texts = CaptionLoss(captioner).eval(), make_collate(captioner).texts(CAPTIONS)
    predicting = torch.zeros(texts["input_ids"].shape, dtype=torch.bool)
    predicting.view(-1)[texts["positions"]] = True
    other = dict(texts, input_ids=texts["input_ids"].where(predicting, 77))
    assert not predicting.all()

    with torch.no_grad():
        assert loss(images(3), **other).item() == pytest.approx(loss(images(3), **texts).item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_that_captions_depend_on_has_a_gradient(models, family: str) -> None:
    captioner = models[family]
    loss = CaptionLoss(captioner).train()
    loss.zero_grad()

    loss(images(3), **make_collate(captioner).texts(CAPTIONS)).backward()

    without = {name for name, weight in loss.named_parameters() if weight.grad is None}
    assert not {name for name in without if "pooler" not in name and "post_layernorm" not in name}
    loss.zero_grad()


def test_a_model_in_training_captions_with_its_current_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the network for captioning holds copies of weights, which would not change."""
    from captioner.models.git import captioner as git

    monkeypatch.setattr(git, "open_network", None)  # opens a network that copies weights

    assert type(open_tiny(make_tiny_model("git", tmp_path / "model"))._fast.network) is GitNetwork


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
