"""Captions judged on Ray: the same scores as in one process."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import caption_config

from captioner import pipeline
from captioner.config import JudgeTableConfig
from captioner.run.judging import JudgeEngine, JudgeHere, judge
from captioner.scoring.judgements import JUDGE_FOLDER, judge_name
from captioner.store.table import open_table
from captioner.testing import make_tar
from captioner.testing.tiny_clip import make_tiny_clip
from ray_jobs.judge import RayJudge

pytestmark = pytest.mark.usefixtures("ray_instance")


def test_ray_gives_the_scores_of_one_process(tmp_path: Path) -> None:
    out, archive = tmp_path / "out", make_tar(tmp_path / "archive.tar", 40)
    pipeline.run(caption_config(archive, out))  # parts of 16 rows
    settings = JudgeTableConfig.model_validate(
        {
            "judge": {"name": str(make_tiny_clip(tmp_path / "clip", num_steps=40)), "device": "cpu"},
            "cluster": {"num_workers": 2, "decode_cpus": 1},
        }
    )

    def rows_of(engine: JudgeEngine) -> list[dict[str, Any]]:
        shutil.rmtree(out / JUDGE_FOLDER, ignore_errors=True)
        judge(str(out), settings, engine)
        directory = open_table(str(out)).directory
        return [row for part in range(3) for row in directory.read_table(judge_name(part)).to_pylist()]

    here, on_ray = rows_of(JudgeHere()), rows_of(RayJudge(settings.cluster))

    assert len({row["clip_score"] for row in here}) > 5
    assert len(on_ray) == len(here) == 40
    for name in ("image_id", "created_at", "num_others", "error"):
        assert [row[name] for row in on_ray] == [row[name] for row in here], name
    for name in ("clip_score", "clip_score_others", "lift", "ref_clip_score"):
        assert [row[name] for row in on_ray] == pytest.approx([row[name] for row in here], abs=1e-5), name
