"""The caption stage in somebody's own Ray Data pipeline."""

from pathlib import Path

import pytest

from captioner import CaptionBatches
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
