"""What a training run says while it trains: collapsed captions, shares of empty and cut ones, unusual lengths; and the
defaults of each family."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import train_config

from captioner.config import ModelConfig, TrainConfig, TrainModelConfig
from captioner.data import Captions
from captioner.errors import TrainingError
from captioner.models import resolve
from captioner.scoring.coco_metrics import cider_d
from captioner.scoring.normalise import caption_tokens
from captioner.testing.tiny_models import TINY_SIDE
from captioner.training import job
from captioner.training.advice import collapse_warning, is_collapsed, length_warning
from captioner.training.evaluate import WINDOW, Evaluator, make_collate
from captioner.training.local import LocalTrainEngine
from captioner.training.loss import CaptionLoss
from captioner.training.recipes import LORA_LEARNING_RATE, recipe_of, with_recipe
from captioner.training.schedule import best_of, evaluations
from captioner.training.trainable import open_trainable

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]


def test_a_collapse_is_said_by_the_second_evaluation_and_is_in_the_report(
    tmp_path: Path, data: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    job.run(
        train_config(data, out, tiny, max_new_tokens=8, learning_rate=10, max_steps=4, eval_steps=2), LocalTrainEngine()
    )

    history = json.loads((out / "history.json").read_text())["history"]
    warned = [index for index, entry in enumerate(evaluations(history)) if "warning" in entry]
    assert warned == [1]
    message = r"collapsed: at step 2 \d+% of the eval images have the same one, .*--learning-rate below 10"
    assert re.search(message, capsys.readouterr().err)
    assert re.search(
        "<strong>Warning:</strong> the captions have collapsed: at step 2", (out / "report.html").read_text()
    )


def test_a_run_can_be_stopped_at_a_collapse(tmp_path: Path, data: Path, tiny: Path) -> None:
    settings = {"learning_rate": 10, "max_steps": 40, "eval_steps": 2, "stop_on_collapse": True}
    with pytest.raises(TrainingError, match=r"collapsed at step 2; .*lower --learning-rate into another OUT"):
        job.run(train_config(data, tmp_path / "out", tiny, max_new_tokens=8, **settings), LocalTrainEngine())

    assert not (tmp_path / "out" / "model").exists()


def evaluation(step: int, equal: float, references: float = 0.1) -> dict:
    captions = [{"caption": "a dog"}, {"caption": "a cat"}, {"caption": "a dog"}]
    shares = {"eval_equal_share": equal, "eval_equal_references_share": references}
    return {"step": step, "eval_loss": 1.0, "eval_captions": captions} | shares


@pytest.mark.parametrize(
    ("entry", "collapsed"),
    [
        (evaluation(10, 0.51), True),
        (evaluation(10, 0.5), False),
        (evaluation(0, 1.0), False),  # before training
        (evaluation(10, 0.9, references=0.8), False),  # so people described them
        ({"step": 10, "eval_loss": 1.0}, False),  # of an earlier version
    ],
)
def test_captions_have_collapsed_where_most_are_equal_and_references_are_not(entry: dict, collapsed: bool) -> None:
    assert is_collapsed(entry) is collapsed


def test_a_collapse_is_said_once_until_the_captions_recover() -> None:
    config = TrainConfig.model_validate({"training": {"learning_rate": 0.1}})
    history = [evaluation(step, share) for step, share in enumerate([1.0, 0.9, 0.8, 0.2, 0.7])]

    warning_steps = [step for step in range(len(history)) if collapse_warning(history[: step + 1], config)]

    assert warning_steps == [1, 4]
    assert '90% of the eval images have the same one, "a dog"' in collapse_warning(history[:2], config)


def test_captions_much_longer_than_usual_are_said() -> None:
    config = TrainConfig()
    long = pa.table({"reference_captions": [["word " * 30], ["word " * 28, "word " * 35]]})
    short = pa.table({"reference_captions": [["word " * 12], ["word " * 15]]})

    assert "30 words at the median, those that git models were trained on about 10" in length_warning(
        long, config, "git"
    )
    assert not length_warning(short, config, "git")
    assert not length_warning(long, config, "qwen2_vl")


FAMILIES = ["git", "blip", "blip-2", "vision-encoder-decoder", "florence2", "idefics3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_that_are_not_given_are_the_familys_and_the_docs_have_them(family: str) -> None:
    recipe, settings = recipe_of(family), with_recipe(TrainConfig(), family).training

    assert (settings.learning_rate, settings.lr_scheduler_type) == (recipe.learning_rate, recipe.lr_scheduler_type)
    assert settings.warmup_steps == recipe.warmup_steps
    rate = f"{recipe.learning_rate:g}".replace("e-0", "e-")
    row = f"| {rate} | {recipe.lr_scheduler_type} | {recipe.warmup_steps:g} | {recipe.source} |"
    assert row in (ROOT / "docs" / "train.md").read_text()


def test_settings_that_are_given_stay_and_adapters_have_a_rate_of_their_own() -> None:
    given = TrainConfig.model_validate({"training": {"learning_rate": 0.5, "warmup_steps": 3}})
    adapters = TrainConfig.model_validate({"model": {"lora_rank": 4}})

    assert with_recipe(given, "blip").training.learning_rate == 0.5
    assert with_recipe(given, "blip").training.warmup_steps == 3
    assert with_recipe(adapters, "blip").training.learning_rate == LORA_LEARNING_RATE


def test_the_highest_cider_is_best() -> None:
    history = [
        {"step": step, "eval_loss": 1.0, "eval_cider": value} for step, value in enumerate([0.2, 0.9, None, 0.9])
    ]

    assert best_of(history, "eval_cider")["step"] == 1


class Fixed:
    """In place of a captioner's search: of image n, numbered by its first pixel, the n-th caption."""

    def __init__(self, captions: list[str]) -> None:
        self.captions = captions

    def __call__(self, pixels: np.ndarray) -> Captions:
        texts = [self.captions[number] for number in pixels[:, 0, 0, 0]]
        return Captions(texts, [1] * len(texts), [0.0] * len(texts), [text != "cut" for text in texts])


def test_figures_of_two_workers_are_those_of_one(tiny: Path) -> None:
    captioner = open_trainable(
        resolve(ModelConfig(name=str(tiny), max_new_tokens=2)), TrainModelConfig(), torch.device("cpu"), 64, None
    )
    texts = [["a red ring", "a blue cross on a small table", "", "cut", "A red ring!"][n % 5] for n in range(150)]
    references = [[f"a red ring number {n}", "a ring"] for n in range(150)]
    captioner.caption = Fixed(texts)  # type: ignore[method-assign]
    pairs = pa.table({"image_id": list(map(str, range(150))), "reference_captions": references, "n": range(150)})

    def decode(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        size = TINY_SIDE * TINY_SIDE * 3
        for table in tables:
            pixels = [bytes([n]) * size for n in table["n"].to_pylist()]
            yield table.append_column("_pixels", pa.array(pixels, pa.binary(size)))

    sums: list[torch.Tensor] = []

    def evaluate(rank: int, world_size: int, reduce) -> dict:
        loss, collate = CaptionLoss(captioner), make_collate(captioner)
        options = {"scores_cider": True, "all_reduce": reduce}
        return Evaluator(captioner, loss, collate, decode, 64, rank, world_size, **options)(pairs)

    def keep(values: torch.Tensor) -> torch.Tensor:
        sums.append(values)
        return values

    alone = evaluate(0, 1, lambda values: values)
    evaluate(1, 2, keep)
    together = evaluate(0, 2, lambda values: values + sums[0])

    assert len(pairs) > 2 * WINDOW
    assert together["cider"] == pytest.approx(alone["cider"])
    tokens = [list(map(caption_tokens, image)) for image in references]
    assert alone["cider"] == pytest.approx(np.mean(cider_d(list(map(caption_tokens, texts)), tokens)))
    for name, share in {
        "equal_share": 0.4,
        "equal_references_share": 1 / 150,
        "empty_share": 0.2,
        "cut_share": 0.2,
    }.items():
        assert together[name] == alone[name] == pytest.approx(share)
