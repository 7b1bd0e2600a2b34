"""The estimate: a uniform sample, a rate bounded by the slower stage, and not one row written."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.config import CaptionConfig, ModelConfig, SourceConfig
from captioner.data import Chunk
from captioner.models import resolve
from captioner.sources import open_source
from captioner.testing import make_folder
from ray_jobs.cluster import Sizes
from ray_jobs.doctor import Finding, findings
from ray_jobs.estimate import Prediction, draw_sample, predict, prediction_lines, run
from ray_jobs.sampling import Piece, cut, num_repeats, sample_work
from ray_jobs.stages import CaptionStage, DecodeStage, from_block


def piece(prepare: float, generate: float, gap: float = 0.0) -> Piece:
    return Piece(0, 16, 16, prepare, generate, source_bytes=1_600, output_bytes=160, gap=gap)


def test_without_gaps_the_rate_is_that_of_the_slower_stage() -> None:
    slow_model = predict([piece(1.0, 8.0)] * 8, 1_000, num_workers=2, decoders=1)
    slow_decoding = predict([piece(8.0, 1.0)] * 8, 1_000, num_workers=1, decoders=2)

    assert (slow_model.rate, slow_model.bound_by) == (4.0, "model")
    assert (slow_decoding.rate, slow_decoding.bound_by) == (4.0, "decoding")
    assert (slow_model.source_bytes, slow_model.output_bytes) == (100_000, 10_000)


def test_the_rate_is_that_of_the_pipeline_and_its_interval_reaches_up_to_the_capacity_of_the_stages() -> None:
    prediction = predict([piece(1.0, 2.0), *[piece(1.0, 2.0, gap=4.0)] * 9], 1_000, num_workers=1, decoders=1)

    assert (prediction.rate, prediction.low, prediction.high) == (4.0, 4.0, 8.0)


def test_time_and_cost_are_shown_with_their_intervals() -> None:
    prediction = Prediction(1_000_000, 100.0, 80.0, 125.0, "model", 2e11, 3.4e8, 0.999)
    shown = "\n".join(prediction_lines(prediction, Sizes(4, 1.0, 1.0, 1, 8, 1), price_per_gpu_hour=1.5))

    assert "1,000,000, 200.0 GB" in shown
    assert "100.0 (80.0 to 125.0), bottleneck: model" in shown
    assert "2.8 h (2.2 h to 3.5 h)" in shown
    assert "11.11 GPU h (8.89 to 13.89) on 4 GPUs" in shown
    assert "16.67 (13.33 to 20.83)" in shown
    assert "340.0 MB" in shown
    assert "GPU" not in "\n".join(prediction_lines(prediction, Sizes(4, 1.0, 0.0, 1, 8, 1), price_per_gpu_hour=1.5))


def test_a_sampled_image_with_a_header_of_any_size_is_not_ok_and_costs_no_other(tmp_path: Path) -> None:
    make_folder(tmp_path, 3)
    (tmp_path / "zz.ppm").write_bytes(b"P6\n4294967296 1\n255\n")
    source, config = open_source(SourceConfig(path=str(tmp_path))), CaptionConfig(model=ModelConfig(device="cpu"))
    _, rows = draw_sample(source, None, 10, 0)
    work = sample_work(source, [rows], resolve(ModelConfig(name="fake")), config)

    decoded = DecodeStage(work)(pa.Table.from_pylist([asdict(Chunk(0, 0, 0, 4))]))
    piece = Piece.from_captioned(from_block(CaptionStage(work, 4, 1)(decoded), work), gap=0.0)

    assert (piece.num_rows, piece.num_ok) == (4, 3)


SECONDS = st.floats(0.1, 10)


@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=2, max_size=20), st.integers(1, 8))
def test_the_rate_lies_in_its_interval(seconds: list[tuple[float, float, float]], workers: int) -> None:
    prediction = predict([piece(*triple) for triple in seconds], 1_000, workers, 1)
    slowest = min(16 / gap for _, _, gap in seconds)

    assert slowest * 0.999 <= prediction.low <= prediction.rate <= prediction.high


def pipeline(random: np.random.Generator, pieces: int, workers: int, decoders: int) -> list[Piece]:
    """Two stages with a queue between them: what `measure` would see, without Ray and without waiting."""
    decoder, worker = [0.0] * decoders, [0.0] * workers
    ended = []
    for _ in range(pieces):
        prepare, generate = 0.5 * random.gamma(9, 1 / 9), 1.0 * random.gamma(9, 1 / 9)
        first_decoder, first_worker = int(np.argmin(decoder)), int(np.argmin(worker))
        decoder[first_decoder] += prepare
        start = max(decoder[first_decoder], worker[first_worker])
        worker[first_worker] = start + generate
        ended.append((worker[first_worker], prepare, generate))
    ended.sort()
    gaps = [0.0] * workers + [ended[k][0] - ended[k - 1][0] for k in range(workers, pieces)]
    return [piece(prepare, generate, gap) for (_, prepare, generate), gap in zip(ended, gaps, strict=True)]


@pytest.mark.parametrize(("workers", "decoders"), [(1, 1), (2, 1), (4, 1), (4, 4)])
def test_the_true_rate_of_a_pipeline_lies_in_the_interval_nine_times_of_ten(workers: int, decoders: int) -> None:
    random = np.random.default_rng(7)
    truth = 16 * min(workers / 1.0, decoders / 0.5)
    predictions = [
        predict(pipeline(random, 16 + 4 * workers, workers, decoders), 1_000, workers, decoders) for _ in range(100)
    ]

    num_right = sum(prediction.low <= truth <= prediction.high for prediction in predictions)
    assert num_right >= 80  # of 90 expected
    assert np.median([prediction.high / prediction.low for prediction in predictions]) < 2.2


def test_the_sample_is_the_same_for_a_seed_and_without_repetition(tmp_path: Path) -> None:
    source = open_source(SourceConfig(path=str(make_folder(tmp_path / "archive", 60, width=32))))

    drawn = [draw_sample(source, None, 20, seed)[1]["image_id"].to_pylist() for seed in (0, 0, 1)]

    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 20
    assert draw_sample(source, None, 500, 0)[0] == 60


@pytest.mark.parametrize(
    ("rows", "gpus", "workers", "batch", "sizes", "count"),
    [
        (256, 0.0, 1, "auto", {16}, 16),
        (256, 0.0, 8, "auto", {16}, 32),
        (256, 1.0, 2, "auto", {128}, 16),
        (41, 0.0, 1, "auto", {13, 14}, 18),
        (100, 0.0, 1, 8, {7, 8}, 26),
        (3, 0.0, 1, "auto", {1, 2}, 16),
        (1, 0.0, 1, "auto", {1}, 16),
    ],
)
def test_every_worker_gets_pieces_of_a_batch_each_and_the_sample_is_whole(
    rows: int, gpus: float, workers: int, batch: int | str, sizes: set[int], count: int
) -> None:
    settings = Sizes(workers, 1.0, gpus, 1, 1, 1)
    pieces = cut(pa.table({"n": range(rows)}), settings, batch)

    assert {piece.num_rows for piece in pieces} == sizes
    assert num_repeats(len(pieces), settings) * len(pieces) == count
    assert [number for piece in pieces for number in piece["n"].to_pylist()] == list(range(rows))


@pytest.mark.usefixtures("ray_instance")
def test_the_sample_is_captioned_on_the_cluster_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_folder(tmp_path / "archive", 40, width=32)
    (archive / "broken.png").write_bytes(b"no image")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)

    settings = {
        "source": {"path": str(archive)},
        "model": {"name": "fake", "device": "cpu"},
        "cluster": {"num_workers": 1, "gpus_per_worker": 0.5, "decode_cpus": 1},
    }
    code = run(CaptionConfig.model_validate(settings), 41, 0, 2.5)

    shown = capsys.readouterr().out
    assert code == 0
    assert re.search(r"images +41", shown)
    assert "captioned       97.6% of the sample" in shown
    assert "on 0.5 GPUs" in shown
    assert re.search(r"cost +\d", shown)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("ray_instance")
def test_the_doctor_names_faults(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    config = CaptionConfig.model_validate(
        {"model": {"name": str(tmp_path / "nothing")}, "cluster": {"num_workers": 50}}
    )

    results: list[Finding] = list(findings(config, str(tmp_path / "file")))

    assert {finding.name for finding in results if finding.passed is False} == {"gpu", "sizes", "model", "out"}
    assert {finding.name for finding in results if finding.passed} >= {"cluster", "versions"}
    (model,) = [finding for finding in results if finding.name == "model"]
    assert str(tmp_path / "nothing") in model.message
    (gpu,) = [finding for finding in results if finding.name == "gpu"]
    assert "install torch with CUDA there, or give --device cpu" in gpu.message


@pytest.mark.usefixtures("ray_instance")
def test_the_doctor_captions_on_a_worker_with_the_settings_of_a_run() -> None:
    settings = {"model": {"name": "fake", "device": "cpu"}, "cluster": {"gpus_per_worker": 0.5}}

    results = {finding.name: finding for finding in findings(CaptionConfig.model_validate(settings), None)}

    assert not [finding for finding in results.values() if finding.passed is False]
    assert "gpu" not in results
    assert "4 caption workers with 0.5 GPUs" in results["sizes"].message
    assert "fake loads in" in results["model"].message
