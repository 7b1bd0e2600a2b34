"""`captioner estimate --images`: figures that were measured before, multiplied."""

from __future__ import annotations

import pytest

from captioner.console.cost import CARDS, Card, estimate_lines, run
from captioner.errors import UsageError
from ray_jobs.cli import main

CARD = Card(images_per_second=1_000, decoded_per_cpu=100, source="a test")


def figures(*args: object, **settings: object) -> dict[str, str]:
    labels = ("images/s", "CPUs", "time", "GPU time", "cost of GPUs")
    shown = estimate_lines(*args, **settings)
    return {label: line[16:].strip() for line in shown for label in labels if line.startswith(f"{label}  ")}


def test_time_and_cost_follow_from_the_rate_of_a_card() -> None:
    assert figures(36_000_000, CARD, num_gpus=4, price=2.5) == {
        "images/s": "4,000 on 4 GPUs, bottleneck: the GPU",
        "CPUs": "40 for decoding, 10 for each GPU (10 keep it busy)",
        "time": "2.5 h",
        "GPU time": "10.0 GPU h",
        "cost of GPUs": "25.00 at 2.5 an hour",
    }


def test_too_few_cpus_are_the_bottleneck_and_cost_gpu_hours() -> None:
    shown = figures(36_000_000, CARD, cpus_per_gpu=5)

    assert shown["images/s"] == "500 on 1 GPU, bottleneck: decoding"
    assert shown["GPU time"] == "20.0 GPU h"
    assert "cost of GPUs" not in shown


def test_every_card_says_where_its_figures_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    for name, card in CARDS.items():
        assert run(100_000_000, name, 8, None, 2.5) == 0
        assert card.source in capsys.readouterr().out
    with pytest.raises(UsageError, match="--gpu abacus: nothing was measured on it; give one of h100"):
        run(1, "abacus", 1, None, None)


def test_the_command_needs_no_source_and_takes_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["estimate", "--images", "100000000", "--gpu", "h100", "--price-gpu", "2.5"])
    assert ended.value.code == 0
    assert "images           100,000,000" in capsys.readouterr().out

    with pytest.raises(SystemExit) as ended:
        main(["estimate", "photos/", "--images", "10"])
    assert ended.value.code == 1
    assert "--images and SOURCE (photos/) exclude each other" in capsys.readouterr().err
