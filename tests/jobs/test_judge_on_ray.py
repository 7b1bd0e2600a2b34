"""Captions judged on Ray: the same scores and verdicts as in one process."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import caption_config

from captioner import pipeline
from captioner.config import JudgeTableConfig
from captioner.errors import EndpointError
from captioner.run.judging import JudgeEngine, LocalJudgeEngine, judge
from captioner.run.object_judge import LocalObjectJudgeEngine, ObjectJudgeEngine, judge_objects
from captioner.scoring.judgements import JUDGE_FOLDER, OBJECTS_FOLDER, judge_name, objects_name
from captioner.store.table import open_table
from captioner.testing import make_tar
from captioner.testing.model_server import Answer, ModelServer, Request, saying
from captioner.testing.tiny_clip import make_tiny_clip
from ray_jobs.cluster import Resources, share_out
from ray_jobs.judge import RayJudgeEngine, Stages, make_dataset

pytestmark = pytest.mark.usefixtures("ray_instance")


def test_ray_gives_the_scores_of_one_process(tmp_path: Path) -> None:
    out, archive = tmp_path / "out", make_tar(tmp_path / "archive.tar", 40)
    pipeline.run(caption_config(archive, out, model={"preprocess": "processor"}))  # parts of 16 rows
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

    here, on_ray = rows_of(LocalJudgeEngine()), rows_of(RayJudgeEngine(settings.cluster))

    assert len({row["clip_score"] for row in here}) > 5
    assert len(on_ray) == len(here) == 40
    for name in ("image_id", "created_at", "num_others", "error"):
        assert [row[name] for row in on_ray] == [row[name] for row in here], name
    for name in ("clip_score", "clip_score_others", "lift", "ref_clip_score"):
        assert [row[name] for row in on_ray] == pytest.approx([row[name] for row in here], abs=1e-5), name


def test_pools_grow_to_the_largest_number_of_workers() -> None:
    resources = Resources(num_cpus=4, num_gpus=0, num_nodes=1)
    sizes = share_out(resources, JudgeTableConfig.model_validate({"cluster": {"num_workers": "2:8"}}).cluster)

    judged = make_dataset([{"part": part} for part in range(20)], Stages((dict, {}), (dict, {})), sizes)

    judge_pool = judged._logical_plan.dag.compute
    decode_pool = judged._logical_plan.dag.input_dependencies[0].compute
    assert (judge_pool.min_size, judge_pool.max_size) == (2, 8)
    assert (decode_pool.min_size, decode_pool.max_size) == (sizes.decode_cpus, sizes.max_decode_cpus)
    assert sizes.max_decode_cpus > sizes.decode_cpus


def test_ray_gives_the_verdicts_of_one_process_and_resumes(tmp_path: Path, capsys) -> None:
    out, archive = tmp_path / "out", make_tar(tmp_path / "archive.tar", 40)
    pipeline.run(caption_config(archive, out, model={"preprocess": "processor"}))

    def answer(asked: Request) -> Answer | None:
        code = asked.caption[-1]
        if "another" in broken and asked.number > 20:
            return Answer(changes={"model": "another"})
        return saying(json.dumps({"objects": [{"name": code, "seen": code.isdigit()}]}))

    def verdicts_of(engine: ObjectJudgeEngine) -> list[dict[str, Any]]:
        judge_objects(str(out), settings, engine)
        directory = open_table(str(out)).directory
        rows = [row for part in range(3) for row in directory.read_table(objects_name(part)).to_pylist()]
        return sorted(rows, key=lambda row: row["image_id"])

    broken: set[str] = set()
    with ModelServer(answer) as server:
        judge_settings = {"name": server.model, "endpoint": [server.url], "concurrency": 4, "sample": "all"}
        settings = JudgeTableConfig.model_validate({"judge": judge_settings, "cluster": {"decode_cpus": 1}})
        here = verdicts_of(LocalObjectJudgeEngine())
        shutil.rmtree(out / OBJECTS_FOLDER)
        broken.add("another")
        server.asked.clear()
        with pytest.raises(EndpointError, match="the answers now come from model 'another'"):
            verdicts_of(RayJudgeEngine(settings.cluster))
        broken.clear()
        capsys.readouterr()
        on_ray = verdicts_of(RayJudgeEngine(settings.cluster))

    assert len({row["num_unseen"] for row in here}) == 2
    assert on_ray == here
    assert re.search(r"^judged \d+/\d+ \(100%\) in [0-9:]+  failed 0$", capsys.readouterr().err, re.MULTILINE)
    assert server.most_at_once <= 4
