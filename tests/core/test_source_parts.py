"""A part of a source that cannot be read is rows; the source as a whole is an error that writes none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import caption_config, rows_of

from captioner import pipeline
from captioner.errors import SourceError
from captioner.sources.root import Root
from captioner.testing import make_folder, make_parquet, make_tar


def plan(root: Path) -> None:
    assert pipeline.run(caption_config(root / "images", root / "out", plan_only=True)) == 0


def run(root: Path) -> dict[str, str | None]:
    """Error codes by id."""
    assert pipeline.run(caption_config(root / "images", root / "out")) == 0
    return {row["image_id"]: row["error_code"] for row in rows_of(root / "out")}


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_file_of_several_that_is_gone_is_rows(tmp_path: Path, kind: str) -> None:
    make = {"tar": make_tar, "parquet": make_parquet}[kind]
    for number in range(4):
        make(tmp_path / f"images/{number}.{kind}", 20, seed=number)
    plan(tmp_path)
    (tmp_path / f"images/2.{kind}").unlink()

    codes = run(tmp_path)

    assert {name: code for name, code in codes.items() if code} == {
        name: "not_found" for name in codes if name.startswith("2.")
    }
    assert len(codes) == 80


def test_refused_files_in_a_row_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "images", 64)
    plan(tmp_path)
    read = Root.read

    def refuse(self: Root, file: bytes, *where: int) -> bytes:
        if b"000016" <= file < b"000032":
            raise PermissionError(13, "Permission denied")
        return read(self, file, *where)

    monkeypatch.setattr(Root, "read", refuse)
    codes = run(tmp_path)

    assert {name for name, code in codes.items() if code == "permission"} == {f"{n:06d}.png" for n in range(16, 32)}
    assert sum(code is None for code in codes.values()) == 48


@pytest.mark.parametrize("kind", ["tar", "parquet", "folder"])
def test_a_source_that_is_gone_is_an_error_and_not_one_row(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        make_folder(tmp_path / "images", 40)
    else:
        for number in range(4):
            {"tar": make_tar, "parquet": make_parquet}[kind](tmp_path / f"images/{number}.{kind}", 20, seed=number)
    config = caption_config(tmp_path / "images", tmp_path / "out")
    plan(tmp_path)
    engine = pipeline.LocalEngine(config)
    caption_chunks = engine.caption_chunks

    def gone(work, chunks):
        shutil.rmtree(tmp_path / "images")
        (tmp_path / "images").mkdir()  # as an unmounted disk leaves it
        return caption_chunks(work, chunks)

    engine.caption_chunks = gone  # type: ignore[method-assign]

    with pytest.raises(SourceError, match="the source is missing"):
        pipeline.run(config, engine)

    assert rows_of(tmp_path / "out") == []
