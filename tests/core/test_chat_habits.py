"""Habits of chat models are flagged, and ordinary captions are not."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import caption_config, rows_of

from captioner import pipeline
from captioner.config import ModelConfig
from captioner.models import resolve
from captioner.scoring.chat_habits import HABITS, chat_habits, repeats_prompt
from captioner.scoring.flags import ALL_FLAGS, FAULTS, caption_flags
from captioner.testing import make_folder

ORDINARY = """
a man with a hat
a man taking a picture of a cat
A woman carrying luggage through an airport.
THERE IS A MAN WALKING IN THE AIRPORT
there are two brown bears together in the wild
Two young children and an old woman feed pigeons.
an elderly man in a black suit, seen from behind
an old man in a wheelchair
a black and white photo of a street
a black dog and a white cat on an American flag
a black man-made lake
an African elephant and its baby
a white baby goat
the blinds of a window next to a blind corner
an american football player and an indian food stand
a disabled parking sign
a woman holding a 10 year old bottle of whisky
a 200 year old oak
a building that is 100 years old
the men's room is in the back
a person who looks like they are skiing
A bowl of food that looks like worms and some greens.
a man in front of what appears to be Big Ben
a dog that looks sick
a sign that says thank you
a sign telling you to stop
Red laptop on a table showing you can learn anywhere!
a poster with the words "Here is your image. I'm sorry, I cannot help you."
a mask that reads, “I can’t breathe.”
a sorry looking cat in an AI lab
a dog with no picture frame
a street without images
there is an image on a wall
a painting shows a king in his thirties style coat
in the kitchen a picture hangs on the wall
a photographer of birds
hereford cows in a field
a caption contest
4 * 4 wheels and 2 * 2 seats
a score of 3-2 - the home team has won
1. FC Union fans in the stands
f*** written on a wall
snake_case and __init__ on a screen
a sports car #7 in the rain
an array [1] (top view)
eine Frau mit Hut
Un homme avec un chapeau
一个戴帽子的男人
帽子をかぶった男の人
"""
LONG_PROMPT = "Please name every person that is in the image. " * 9
HABITUAL = [
    ("I'm sorry, but I can't help with that.", {"refusal"}),
    ("I’m sorry, I cannot identify people in images.", {"refusal"}),
    ("As an AI language model, I do not see.", {"refusal"}),
    ("Unfortunately I am unable to view images.", {"refusal"}),
    ("No image was provided.", {"refusal"}),
    ("Please upload the image again.", {"refusal"}),
    ("Es tut mir leid, dabei kann ich nicht helfen.", {"refusal"}),
    ("很抱歉，我无法查看图片。", {"refusal"}),
    ("The image shows a dog.", {"preamble"}),
    ("This picture captures two dogs", {"preamble"}),
    ("In this image, a dog runs.", {"preamble"}),
    ("In the photo there is a dog.", {"preamble"}),
    ("Here is a short caption: a dog", {"preamble"}),
    ("Here's an alt text.", {"preamble"}),
    ("Sure! A dog.", {"preamble"}),
    ("Caption: a dog", {"preamble"}),
    ("I can see a dog", {"preamble"}),
    ("Based on the image, a dog is running", {"preamble"}),
    ("**A dog** on the grass", {"markdown"}),
    ("**Caption:** a dog", {"markdown", "preamble"}),
    ("# A dog\n\non the grass", {"markdown"}),
    ("- a dog\n- a cat", {"markdown"}),
    ("1. a dog\n2. a cat", {"markdown"}),
    ("a dog on *green* grass", {"markdown"}),
    ("see [the dog](https://example.org/dog)", {"markdown"}),
    ("```\na dog\n```", {"markdown"}),
    ("| dog | cat |", {"markdown"}),
    ("a street where you can see shops", {"second_person"}),
    ("A dog. Let me know if you need more.", {"second_person"}),
    ("Your dog sits. The sign says no.", {"second_person"}),
    ("a man in his mid-30s", {"guess_about_person"}),
    ("She seems to be in her early twenties.", {"guess_about_person"}),
    ("a 5-year-old girl", {"guess_about_person"}),
    ("a woman who is about 40 years old", {"guess_about_person"}),
    ("a man aged around 50", {"guess_about_person"}),
    ("a middle-aged man", {"guess_about_person"}),
    ("an Asian woman with a bag", {"guess_about_person"}),
    ("two white men at a table", {"guess_about_person"}),
    ("a man of African descent", {"guess_about_person"}),
    ("a person who appears to be Indian", {"guess_about_person"}),
    ("a Muslim woman", {"guess_about_person"}),
    ("a man who may be an actor", {"guess_about_person"}),
    ("a man who looks like Barack Obama", {"guess_about_person"}),
    ("The woman is identified as a nurse.", {"guess_about_person"}),
    ("a child who appears to be sick", {"guess_about_person"}),
    ("a man suffering from dementia", {"guess_about_person"}),
    ("a pregnant woman", {"guess_about_person"}),
    ("a person who has a disability", {"guess_about_person"}),
]


@pytest.mark.parametrize("caption", ORDINARY.strip().splitlines())
def test_an_ordinary_caption_has_no_habit(caption: str) -> None:
    assert chat_habits(caption, "Describe the image in one sentence.") == set()


@pytest.mark.parametrize(("caption", "habits"), HABITUAL)
def test_a_habit_is_flagged(caption: str, habits: set[str]) -> None:
    assert chat_habits(caption) == habits
    assert habits <= set(caption_flags(caption))


@pytest.mark.parametrize(
    ("text", "prompt", "repeats"),
    [
        ("Describe the image in one sentence. A dog.", "Describe the image in one sentence.", True),
        ("A dog. DESCRIBE the image, in one sentence", "Describe the image in one sentence.", True),
        ("A dog described in one sentence.", "Describe the image in one sentence.", False),
        ("a photo of a dog", "a photo of", False),
        ("To do: name every person that is in the image", LONG_PROMPT, True),
        ("a person is in the image", LONG_PROMPT, False),
        ("用一句话描述这张图片。一只狗。", "用一句话描述这张图片。", True),
        ("一只狗在图片里。", "用一句话描述这张图片。", False),
        ("", "Describe the image in one sentence.", False),
    ],
)
def test_a_caption_that_repeats_the_prompt(text: str, prompt: str, repeats: bool) -> None:
    assert repeats_prompt(text, prompt) is repeats


def test_only_the_question_to_a_chat_model_can_be_repeated() -> None:
    fake = resolve(ModelConfig(name="fake", prompt="a photo of a large"))

    assert replace(fake, family="git").question == ""
    assert {replace(fake, family=name).question for name in ("qwen2_vl", "endpoint")} == {"a photo of a large"}
    assert resolve(ModelConfig(name="fake")).question == ""


def test_a_run_flags_captions_that_repeat_its_prompt(tmp_path: Path) -> None:
    archive = make_folder(tmp_path / "archive", 3)  # the fake model begins every caption with the prompt

    pipeline.run(caption_config(archive, tmp_path / "out", model={"prompt": "Describe the image briefly"}))

    assert [row["flags"] for row in rows_of(tmp_path / "out")] == [["repeats_prompt"]] * 3


def test_every_flag_is_described_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs/quality.md").read_text(encoding="utf-8")

    assert [flag for flag in ALL_FLAGS if not re.search(rf"`{flag}`", page)] == []
    assert set(HABITS) & FAULTS == {"refusal", "repeats_prompt"}
