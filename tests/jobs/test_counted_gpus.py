"""Every path that asks Ray for a GPU, with GPUs that Ray only counts."""

import queue
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from captioner import pipeline
from captioner.config import CaptionConfig
from captioner.errors import ModelError
from captioner.steps import ChunkRows
from captioner.store.read import read_parts
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder
from ray_jobs import caption
from ray_jobs.stages import CaptionStage, _put

pytestmark = pytest.mark.usefixtures("ray_instance")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("archive"), 60)
    (root / "broken.png").write_bytes(b"no image")
    return root


def settings(archive: Path, out: Path, **cluster: Any) -> CaptionConfig:
    return CaptionConfig.model_validate(
        {
            "source": {"path": str(archive)},
            "model": {"name": "fake"},
            "cluster": {"decode_cpus": 1, **cluster},
            "output": {"path": str(out), "rows_per_file": 16},
        }
    )


def captions(out: Path) -> list[tuple]:
    rows = pa.concat_tables(read_parts(open_table(str(out)))).to_pylist()
    return [(row["image_id"], row["status"], row["error_code"], row["caption"]) for row in rows]


@pytest.fixture(scope="module")
def local_captions(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> list[tuple]:
    out = tmp_path_factory.mktemp("local") / "out"
    pipeline.run(settings(archive, out))
    return captions(out)


def noting_stage(notes: Path, num_workers: int) -> type[CaptionStage]:
    """A caption stage whose workers write down which GPU Ray gave them, and caption nothing before all have. Defined
    here in whole, so that it travels to workers by value."""

    class NotingStage(CaptionStage):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            import ray

            super().__init__(*arguments, **named)
            worker = ray.get_runtime_context()
            share, (gpu,) = worker.get_assigned_resources()["GPU"], worker.get_accelerator_ids()["GPU"]
            (notes / worker.get_actor_id()).write_text(f"{share:g} of {gpu}")

        def __call__(self, block: pa.Table) -> pa.Table:
            import time

            while len(list(notes.iterdir())) < num_workers:
                time.sleep(0.05)
            return super().__call__(block)

    return NotingStage


@pytest.mark.parametrize(
    ("cluster", "held"),
    [
        ({"num_workers": 1}, [{"1 of 0"}, {"1 of 1"}]),
        ({}, [{"1 of 0", "1 of 1"}]),
        ({"num_workers": 2, "gpus_per_worker": 0.5}, [{"0.5 of 0"}, {"0.5 of 1"}]),
        ({"num_workers": "1:2"}, [{"1 of 0", "1 of 1"}]),
    ],
)
def test_workers_hold_the_gpus_that_were_asked_for_and_a_chunk_stays_whole(
    tmp_path: Path,
    archive: Path,
    local_captions: list[tuple],
    monkeypatch: pytest.MonkeyPatch,
    cluster: dict[str, Any],
    held: list[set[str]],
) -> None:
    notes, num_workers = tmp_path / "notes", 1 if cluster.get("num_workers") == 1 else 2
    notes.mkdir()
    monkeypatch.setattr(caption, "CaptionStage", noting_stage(notes, num_workers))

    code = caption.run(settings(archive, tmp_path / "out", **cluster))

    assert code == 0
    gpus = [note.read_text() for note in notes.iterdir()]
    assert len(gpus) == num_workers
    assert set(gpus) in held
    assert captions(tmp_path / "out") == local_captions
    assert verify(open_table(str(tmp_path / "out"))).proven


def failing_stage() -> type[CaptionStage]:
    """A caption stage of which two calls at once meet an error in the same moment."""

    class FailingStage(CaptionStage):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            import threading

            super().__init__(*arguments, **named)
            self.both = threading.Barrier(2)

        def _caption(self, decoded: ChunkRows) -> ChunkRows:
            self.both.wait()
            raise ModelError("model: gone")

    return FailingStage


def test_two_calls_of_a_gpu_worker_that_fail_together_end_the_run(
    tmp_path: Path, archive: Path, local_captions: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(archive, tmp_path / "out", num_workers=1)
    with monkeypatch.context() as patched:
        patched.setattr(caption, "CaptionStage", failing_stage())
        with pytest.raises(ModelError, match="model: gone"):
            caption.run(config)

    assert caption.run(config) == 0
    assert captions(tmp_path / "out") == local_captions


def test_what_the_first_worker_says_while_it_starts_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("weights in 2.0 s", "batch size 64, tried out in 1.0 s")
    shown: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(caption, "say", shown.put)

    with caption.shown_messages() as messages:
        for worker in ("first", "second"):
            for line in lines:
                _put(messages, worker, line)
        _put(messages, "first", "the end")
        assert [shown.get(timeout=60) for _ in range(3)] == [f"caption worker: {line}" for line in (*lines, "the end")]

    _put(messages, "third", "a worker that starts again goes on although nobody listens any more")
