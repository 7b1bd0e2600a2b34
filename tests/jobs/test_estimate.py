"""The estimate: a uniform sample, a rate bounded by the slower stage, and not one row written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.config import CaptionConfig, SourceConfig
from captioner.sources import open_source
from captioner.testing import make_folder
from ray_jobs.doctor import Finding, findings
from ray_jobs.estimate import Piece, draw_sample, predict, run


def piece(prepare: float, generate: float) -> Piece:
    return Piece(16, 16, prepare, generate, source_bytes=1_600, output_bytes=160)


def test_the_rate_is_that_of_the_slower_stage() -> None:
    slow_model = predict([piece(1.0, 8.0)] * 8, 1_000, num_workers=2, decoders=1)
    slow_decoding = predict([piece(8.0, 1.0)] * 8, 1_000, num_workers=1, decoders=2)

    assert (slow_model.rate, slow_model.bound_by) == (4.0, "the model")
    assert (slow_decoding.rate, slow_decoding.bound_by) == (4.0, "decoding")
    assert (slow_model.source_bytes, slow_model.output_bytes) == (100_000, 10_000)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=20), st.integers(1, 8))
def test_the_rate_lies_in_its_interval(seconds: list[tuple[float, float]], workers: int) -> None:
    found = predict([piece(*one) for one in seconds], 1_000, workers, 1)
    every = [min(16 / prepare, 16 * workers / generate) for prepare, generate in seconds]

    assert min(every) * 0.999 <= found.low <= found.high <= max(16 / min(p for p, _ in seconds), found.rate) * 1.001


def test_the_sample_is_the_same_for_a_seed_and_without_repetition(tmp_path: Path) -> None:
    source = open_source(SourceConfig(path=str(make_folder(tmp_path / "archive", 60, width=32))))

    drawn = [draw_sample(source, SourceConfig(), 20, seed)[1]["image_id"].to_pylist() for seed in (0, 0, 1)]

    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 20
    assert draw_sample(source, SourceConfig(), 500, 0)[0] == 60


@pytest.mark.usefixtures("ray_instance")
def test_the_sample_is_captioned_on_the_cluster_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_folder(tmp_path / "archive", 40, width=32)
    (archive / "broken.png").write_bytes(b"no picture")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)

    code = run(CaptionConfig.model_validate({"source": {"path": str(archive)}, "model": {"name": "fake"}}), 41, 0, 2.5)

    shown = capsys.readouterr().out
    assert code == 0
    assert re.search(r"pictures +41", shown)
    assert "captioned       97.6% of the sample" in shown
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("ray_instance")
def test_the_doctor_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    config = CaptionConfig.model_validate(
        {"model": {"name": str(tmp_path / "nothing")}, "cluster": {"num_workers": 50}}
    )

    found: list[Finding] = list(findings(config, str(tmp_path / "file")))

    assert {one.name for one in found if one.fine is False} == {"sizes", "model", "out"}
    assert {one.name for one in found if one.fine} >= {"cluster", "versions"}
    (model,) = [one for one in found if one.name == "model"]
    assert str(tmp_path / "nothing") in model.said
