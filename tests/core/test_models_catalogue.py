"""`captioner models` lists the supported families and their checkpoints."""

from __future__ import annotations

import pytest

from captioner.models import FAMILIES
from captioner.models.catalogue import CATALOGUE
from captioner.models.families import FAMILY_BY_NAME
from captioner.models.loading import CLASSES
from ray_jobs import cli


def test_every_family_is_listed_with_a_checkpoint_and_has_a_class() -> None:
    assert set(CLASSES) <= set(CATALOGUE) <= set(FAMILIES)
    assert all(CATALOGUE.values())


def test_the_command_prints_all_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["models"])

    shown = capsys.readouterr().out
    assert end.value.code == 0
    checkpoints = [checkpoint for listed in CATALOGUE.values() for checkpoint in listed]
    assert all(checkpoint.name in shown and checkpoint.licence in shown for checkpoint in checkpoints)
    assert all(task in shown for task in FAMILY_BY_NAME["florence2"].tasks)
    assert max(map(len, shown.splitlines())) <= 120
