"""docs/python.md, run as it stands, and tables as Arrow datasets."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from helpers import caption_config, rows_of

import captioner
from captioner import pipeline
from captioner.errors import OutputError
from captioner.run.job import open_job
from captioner.testing import make_folder

PAGE = Path(__file__).parents[2] / "docs/python.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def is_installed(block: str) -> bool:
    return all(importlib.util.find_spec(name) for name in re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE))


def test_the_page_works_block_after_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images", 12)
    (tmp_path / "images/broken.png").write_bytes(b"no image")
    names: dict[str, object] = {}

    for block in filter(is_installed, BLOCKS):  # Polars and DuckDB need not be
        exec(compile(block, str(PAGE), "exec"), names)

    assert names["exit_code"] == 0
    assert len(names["weakest"]) == 10
    assert names["reasons"].to_dict() == {"not_an_image": 1}
    assert len(rows_of("captions")) == 13


def test_a_table_as_datasets_has_the_committed_rows_at_any_time(tmp_path: Path) -> None:
    archive, out = make_folder(tmp_path / "archive", 40), tmp_path / "out"
    (archive / "000003.png").write_bytes(b"")
    config = caption_config(archive, out)
    engine = pipeline.LocalEngine(config)
    job = open_job(config, engine, lambda line: None)
    list(engine.caption_chunks(job.work, job.missing_chunks(job.table.open_plans()[0])[:1]))

    unfinished = captioner.open_table(str(out))
    assert unfinished.rows.to_table().to_pylist() == rows_of(out)
    assert unfinished.rows.count_rows() == 16
    assert unfinished.history.count_rows() == 0

    pipeline.run(config)
    (archive / "000003.png").write_bytes((archive / "000004.png").read_bytes())
    pipeline.run(caption_config(archive, out, retry_failed=True))

    table = captioner.open_table(str(out))
    assert table.rows.to_table().to_pylist() == rows_of(out)
    assert (table.captions.count_rows(), table.failed.count_rows()) == (40, 0)
    assert table.history.to_table()["image_id"].to_pylist() == ["000003.png"]


def test_a_folder_without_a_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no captions table"):
        captioner.open_table(str(tmp_path))
