"""The reasoning of chat models that cannot leave it out is no part of a caption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captioner.config import ModelConfig
from captioner.data import Captions, object_array
from captioner.models import load, resolve
from captioner.models.thoughts import without_thought
from captioner.steps import caption_or_reasons
from captioner.testing import make_tiny_model
from captioner.training.evaluate import make_collate

END = 2  # id of the tiny tokenizer's end token
ONLY_THOUGHT = "only reasoning, no caption"
CUT = f"{ONLY_THOUGHT}, cut at --max-new-tokens"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen2_vl", tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model whose template begins a thought, as that of Qwen3-VL-Thinking."""
    path = make_tiny_model("qwen2_vl", tmp_path_factory.mktemp("thinking"))
    template = path / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>\n{% endif %}")
    return path


def open_model(path: Path, **settings: Any) -> Any:
    return load(resolve(ModelConfig(name=str(path), max_new_tokens=6, **settings)), device="cpu")


def captions_in(captioner: Any, answers: list[tuple[str, bool]], each: int = 1) -> Captions:
    """Return the captions in answers of a model, each with whether it is finished."""
    ids = captioner.tokenizer([text for text, _ in answers], add_special_tokens=False).input_ids
    rows = [[*row, END] if finished else row for row, (_, finished) in zip(ids, answers, strict=True)]
    longest = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return captioner.to_captions(tokens, torch.zeros(tokens.shape), each)


def images(count: int) -> Any:
    return object_array(list(np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)))


def test_the_thought_of_a_model_is_no_part_of_its_caption(chat: Path) -> None:
    answers = [
        ("<think>a dog? no.</think>\n\na cat", True),
        ("a cat", True),
        ("<think>a dog? no.</think>", True),
        ("<think>a dog or", False),
        ("a cat or", False),
    ]

    captions = captions_in(open_model(chat), answers)

    assert captions.texts == ["a cat", "a cat", "", "", "a cat or"]
    assert captions.errors == ["", "", ONLY_THOUGHT, CUT, ""]


def test_an_answer_to_a_template_that_begins_a_thought_is_a_caption_where_it_ends_it(thinking: Path) -> None:
    answers = [("a dog? no.</think>\n\na cat", True), ("a dog? no. a cat", True), ("a dog or", False)]

    captions = captions_in(open_model(thinking), answers)

    assert captions.texts == ["a cat", "", ""]
    assert captions.errors == ["", ONLY_THOUGHT, CUT]


def test_of_several_captions_those_that_are_only_reasoning_are_null(chat: Path) -> None:
    captioner = open_model(chat, temperature=1.0, num_captions=2)
    thought = "<think>a dog?</think>"
    answers = [(thought, True), ("a cat", True), ("a bird", True), ("a hat", True), (thought, True), (thought, True)]

    captions = captions_in(captioner, answers, each=2)

    assert captions.texts == ["a cat", "a bird", ""]
    assert captions.errors == ["", "", ONLY_THOUGHT]
    assert captions.samples == [[None, "a cat"], ["a bird", "a hat"], [None, None]]
    assert captions.num_tokens[0] == len(captioner.tokenizer("a cat", add_special_tokens=False).input_ids) + 1


def test_an_image_about_which_a_model_only_reasons_is_a_failed_row(thinking: Path) -> None:
    results = caption_or_reasons(open_model(thinking), images(3))

    assert set(results) <= {ONLY_THOUGHT, CUT}


def test_an_answer_that_is_only_reasoning_is_null_with_its_reason_and_not_asked_for_again(
    chat: Path, thinking: Path, tmp_path: Path
) -> None:
    questions = tmp_path / "questions.yaml"
    questions.write_text(
        "caption: {prompt: 'What is it?'}\n"
        "color: {prompt: 'Which colour?'}\n"
        "facts: {prompt: Count., schema: {type: object, properties: {people: {type: integer}}}}\n"
    )
    captioner = open_model(thinking, questions=str(questions))
    asked: list[str] = []
    captioner.text_of = lambda prompt: asked.append(prompt) or captioner.text_before_answer(prompt)

    captions = captioner.caption(images(2), [("What is it?", "Which colour?", "Count."), (None, "Which colour?", None)])

    assert captions.errors[0] in (ONLY_THOUGHT, CUT)
    assert captions.errors[1] == ""
    assert [answer["color"] for answer in captions.answers] == [None, None]
    assert captions.answers[0]["people"] is None
    errors = captions.answers[0]["color_error"], captions.answers[1]["color_error"], captions.answers[0]["facts_error"]
    assert set(errors) <= {ONLY_THOUGHT, CUT}
    assert not any("An earlier answer was wrong" in prompt for prompt in asked)


def test_training_ends_the_thought_that_a_template_begins(chat: Path, thinking: Path) -> None:
    captioner = open_model(thinking)
    before = make_collate(captioner).before

    captions = captions_in(captioner, [(f"{before}a cat", True)])

    assert captions.texts == ["a cat"]
    assert make_collate(open_model(chat)).before.isspace()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("<think>a dog?</think><answer>a cat</answer>", "a cat"),
        ("<think>a dog?</think>\n<answer>a cat", "a cat"),
        ("<answer>a cat</answer>", "<answer>a cat</answer>"),
        ("<THINKING>a dog?</THINKING> a cat", "a cat"),
        ("<think>a dog?</think>a cat<think>or", "a cat"),
    ],
)
def test_a_caption_is_what_follows_the_thought(answer: str, text: str) -> None:
    assert without_thought(answer) == text
