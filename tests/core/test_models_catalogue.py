"""`captioner models` lists the supported families and their checkpoints."""

from __future__ import annotations

import re

import pytest

from captioner.models import FAMILIES
from captioner.models.catalogue import CATALOGUE, RECOMMENDED
from captioner.models.families import FAMILY_BY_NAME
from captioner.models.loading import CLASSES
from ray_jobs import cli

CHECKPOINTS = [checkpoint for listed in CATALOGUE.values() for checkpoint in listed]


def test_the_families_of_the_tables_exist() -> None:
    assert set(CLASSES) | set(CATALOGUE) <= set(FAMILIES)
    assert all(CATALOGUE.values())


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_command_prints_all_checkpoints(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as end:
        cli.main(["models"])

    shown = capsys.readouterr().out
    assert end.value.code in (0, None)
    assert all(line in shown for checkpoint in CHECKPOINTS for line in checkpoint.lines)
    assert all(f"\n{name}: search" in shown for name in CATALOGUE)
    assert all(task in shown for task in FAMILY_BY_NAME["florence2"].tasks)
    assert max(map(len, shown.splitlines())) <= width


def test_every_checkpoint_has_its_facts() -> None:
    for checkpoint in CHECKPOINTS:
        assert 2021 < checkpoint.year <= 2026
        assert checkpoint.memory == 2 * checkpoint.parameters > 0
        assert checkpoint.licence
        assert "card" not in checkpoint.licence


def test_the_size_is_that_of_the_whole_model_and_not_the_round_number_of_its_name() -> None:
    named = {checkpoint: re.search(r"-([\d.]+)b\b", checkpoint.name, re.IGNORECASE) for checkpoint in CHECKPOINTS}
    sizes = {checkpoint: float(size.group(1)) for checkpoint, size in named.items() if size}

    assert len(sizes) > 8
    assert all(checkpoint.parameters > size for checkpoint, size in sizes.items())


@pytest.mark.parametrize(("use", "gigabytes"), [("8", 8), ("24", 24), ("80", 80)])
def test_what_is_recommended_for_a_gpu_fits_it(use: str, gigabytes: int) -> None:
    by_name = {checkpoint.name: checkpoint for checkpoint in CHECKPOINTS}

    assert set(RECOMMENDED.values()) <= set(by_name)
    recommended = by_name[RECOMMENDED[f"a GPU of {use} GB"]]
    assert gigabytes / 3 < recommended.memory < 0.85 * gigabytes
    assert all(by_name[name].safetensors for name in RECOMMENDED.values())
