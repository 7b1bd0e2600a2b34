"""A real model server: `transformers serve` with a tiny chat model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import caption_config, rows_of

from captioner import pipeline
from captioner.config import ModelConfig
from captioner.errors import EndpointError
from captioner.models import resolve
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder, make_tiny_model
from ray_jobs.demo import QUESTIONS, DemoServer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("smolvlm", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with DemoServer(model) as server:
        yield server.url


def test_transformers_serve_captions_a_table(tmp_path: Path, url: str, model: Path) -> None:
    archive = make_folder(tmp_path / "images", 6)
    (archive / "broken.png").write_bytes(b"no image")
    questions = tmp_path / "questions.yaml"
    questions.write_text(QUESTIONS)
    settings = {"name": str(model), "endpoint": [url], "concurrency": 2, "max_new_tokens": 8}
    settings |= {"questions": str(questions), "system": "Answer in one sentence."}

    assert pipeline.run(caption_config(archive, tmp_path / "out", model=settings, cluster={"local": True})) == 0

    assert verify(open_table(str(tmp_path / "out"))).proven
    rows = {row["image_id"]: row for row in rows_of(tmp_path / "out")}
    assert rows.pop("broken.png")["error_code"] == "not_an_image"
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert len({row["caption"] for row in rows.values()}) > 3
    assert all((row["shape"] is None) != (row["shape_error"] is None) for row in rows.values())
    assert {row["num_tokens"] <= 8 for row in rows.values()} == {True}
    assert {row["logprob_mean"] for row in rows.values()} == {None}


def test_a_model_that_transformers_serve_cannot_load_is_one_line(url: str, tmp_path: Path) -> None:
    with pytest.raises(EndpointError) as refused:
        resolve(ModelConfig(name=str(tmp_path / "none"), endpoint=[url], request_timeout=30))

    assert url in str(refused.value)
    assert "\n" not in str(refused.value)
