"""The rendered archive is the same in each form, and each form is read back by its source."""

from __future__ import annotations

import pyarrow as pa
import pytest

from captioner.config import SourceConfig
from captioner.errors import OutputError
from captioner.sources import open_source
from captioner.starter.render import render_scenes
from captioner.starter.scenes import make_scene


def read_back(path):
    source = open_source(SourceConfig(path=str(path)))
    rows = pa.concat_tables(listing.rows for unit in source.units() for listing in source.list_unit(unit))
    return rows, [image.data for image in source.read(rows)]


@pytest.mark.parametrize("format", ["folder", "webdataset", "parquet"])
def test_each_form_holds_the_scenes_and_their_captions(tmp_path, format):
    render_scenes(tmp_path / "a", 12, seed=5, format=format, width=16)
    render_scenes(tmp_path / "b", 12, seed=5, format=format, width=16)
    rows, images = read_back(tmp_path / "a")
    assert rows["reference_captions"].to_pylist() == [make_scene(5, index).captions for index in range(12)]
    assert all(data.startswith(b"\x89PNG") for data in images)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_a_directory_with_anything_in_it_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="not empty"):
        render_scenes(tmp_path, 1)
    render_scenes(tmp_path / "new" / "deep", 1, width=16)
    assert (tmp_path / "new" / "deep" / "images" / "00000.png").is_file()
