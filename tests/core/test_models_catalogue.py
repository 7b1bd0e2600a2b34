"""`captioner models` lists what can be used."""

from __future__ import annotations

import pytest

from captioner.models import FAMILIES
from captioner.models.catalogue import CATALOGUE
from ray_jobs import cli


def test_every_family_is_listed_with_a_checkpoint() -> None:
    assert tuple(family.name for family in CATALOGUE) == FAMILIES
    assert all(family.checkpoints for family in CATALOGUE)


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["models"])

    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert all(one.name in shown and one.licence in shown for family in CATALOGUE for one in family.checkpoints)
    assert max(map(len, shown.splitlines())) <= 120
