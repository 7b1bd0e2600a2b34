"""The caption stage in somebody's own Ray Data pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from captioner import CaptionBatches
from captioner.errors import UsageError
from captioner.testing import make_folder


@pytest.mark.usefixtures("ray_instance")
def test_the_stage_captions_bytes_in_any_dataset(tmp_path: Path) -> None:
    import ray

    archive = make_folder(tmp_path / "archive", 6)
    (archive / "metadata.jsonl").unlink()
    (archive / "zz.png").write_bytes(b"no image")
    files = ray.data.read_binary_files(str(archive), include_paths=True)

    rows = files.map_batches(
        CaptionBatches,
        fn_constructor_kwargs={"model": "starter", "batch_size": 4, "device": "cpu"},
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_gpus=1,
    ).take_all()

    by_name = {Path(row["path"]).name: row for row in rows}
    assert (
        by_name["000000.png"]["caption"] == "a large orange square left of a large orange circle on a white background"
    )
    assert (by_name["000000.png"]["error_code"], by_name["zz.png"]["error_code"]) == ("", "not_an_image")
    assert by_name["zz.png"]["caption"] is None
    assert len(rows) == 7


@pytest.mark.usefixtures("ray_instance")
def test_a_gpu_that_torch_cannot_use_is_an_error_and_no_slow_run_on_the_cpu() -> None:
    import ray

    worker = ray.remote(num_gpus=0.5)(CaptionBatches).remote("starter")

    with pytest.raises(ray.exceptions.RayError, match=r"the GPU .* cannot be used .* or give --device cpu"):
        ray.get(worker.__ray_ready__.remote())


@pytest.fixture(scope="module")
def png(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (make_folder(tmp_path_factory.mktemp("one"), 1) / "000000.png").read_bytes()


@pytest.fixture(scope="module")
def captioned() -> CaptionBatches:
    return CaptionBatches("fake")


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), {"bytes": None, "path": "a.png"}])
def test_a_missing_image_is_a_row_with_an_error(captioned: CaptionBatches, png: bytes, missing: Any) -> None:
    batch = captioned({"bytes": [png, missing]})

    assert [code == "" for code in batch["error_code"]] == [True, False]


@pytest.mark.parametrize("cell", ["/a/b.png", 7, np.zeros((3, 3, 3), np.uint8)])
def test_a_cell_that_is_not_bytes_is_a_row_with_an_error(captioned: CaptionBatches, png: bytes, cell: Any) -> None:
    batch = captioned({"bytes": [png, cell]})

    assert list(batch["error_code"]) == ["", "not_an_image"]
    assert f"the cell holds {type(cell).__name__}, not bytes" in batch["error_message"][1]


def test_bytes_may_be_in_the_cells_of_hugging_face_images(captioned: CaptionBatches, png: bytes) -> None:
    cells = [{"bytes": png, "path": None}, bytearray(png), memoryview(png)]

    assert list(captioned({"bytes": cells})["error_code"]) == [""] * 3


@pytest.mark.parametrize("name", ["caption", "error_code"])
def test_a_column_of_the_user_is_never_replaced(captioned: CaptionBatches, png: bytes, name: str) -> None:
    with pytest.raises(UsageError, match=f"has a column '{name}' already"):
        captioned({"bytes": [png], name: ["by hand"]})


def test_a_batch_that_cannot_be_captioned_is_refused_before_any_work(captioned: CaptionBatches, png: bytes) -> None:
    with pytest.raises(UsageError, match="no column 'bytes'; it has: image, id"):
        captioned({"image": [png], "id": [1]})
    with pytest.raises(UsageError, match="a batch is a Table; give batch_format='numpy'"):
        captioned(pa.table({"bytes": [png]}))


@pytest.mark.parametrize("limit", [{"max_pixels": 0}, {"max_pixels": -1}, {"decode_timeout": 0}])
def test_limits_are_checked_as_those_of_the_command(limit: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(limit))):
        CaptionBatches("fake", **limit)
