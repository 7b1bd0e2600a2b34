"""Every path that asks Ray for a GPU, with GPUs that Ray only counts."""

import json
import queue
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers import caption_config, rows_of

from captioner import pipeline
from captioner.config import ClusterConfig
from captioner.errors import ModelError
from captioner.run.job import open_job
from captioner.steps import ChunkRows
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder, num_committed_chunks
from captioner.training.local import LocalTrainEngine
from ray_jobs import caption, demo, train
from ray_jobs.cli import main
from ray_jobs.cluster import Resources, Sizes, accelerator_of, share_out
from ray_jobs.gpus import device_kind, worker_device
from ray_jobs.stages import CaptionStage, _put

pytestmark = pytest.mark.usefixtures("ray_instance")

ONE_DECODER = {"decode_cpus": 1}  # each actor is a process that takes seconds to start
ONE_GPU = {"num_workers": 1, "gpus_per_worker": 1, **ONE_DECODER}
# The GPUs are only counted; decoders that need not import torch start in a tenth of the time.
ON_CPU = {"device": "cpu", "preprocess": "processor"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("archive"), 60)
    (root / "broken.png").write_bytes(b"no image")
    return root


def captions(out: Path) -> list[tuple]:
    return [(row["image_id"], row["status"], row["error_code"], row["caption"]) for row in rows_of(out)]


@pytest.fixture(scope="module")
def local_captions(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> list[tuple]:
    out = tmp_path_factory.mktemp("local") / "out"
    pipeline.run(caption_config(archive, out, model=ON_CPU))
    return captions(out)


def noting_stage(notes: Path, num_workers: int) -> type[CaptionStage]:
    """A caption stage whose workers write down which GPU Ray gave them, and caption nothing before all have. Defined
    here in whole, so that it travels to workers by value."""

    class NotingStage(CaptionStage):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            import ray

            super().__init__(*arguments, **named)
            worker = ray.get_runtime_context()
            share, gpus = worker.get_assigned_resources()["GPU"], worker.get_accelerator_ids()["GPU"]
            (notes / worker.get_actor_id()).write_text(f"{share:g} of {' and '.join(sorted(gpus))}")

        def __call__(self, block: pa.Table) -> pa.Table:
            import time

            while len(list(notes.iterdir())) < num_workers:
                time.sleep(0.05)
            return super().__call__(block)

    return NotingStage


@pytest.mark.parametrize(
    ("cluster", "num_workers", "held"),
    [
        ({"gpus_per_worker": 1}, 2, [{"1 of 0", "1 of 1"}]),
        ({"num_workers": 2, "gpus_per_worker": 0.5}, 2, [{"0.5 of 0"}, {"0.5 of 1"}]),
        ({"num_workers": 1, "gpus_per_worker": 2}, 1, [{"2 of 0 and 1"}]),
        ({"num_workers": "1:2", "gpus_per_worker": 1}, 2, [{"1 of 0", "1 of 1"}]),
    ],
)
def test_workers_hold_the_gpus_that_were_asked_for_and_a_chunk_stays_whole(
    tmp_path: Path,
    archive: Path,
    local_captions: list[tuple],
    monkeypatch: pytest.MonkeyPatch,
    cluster: dict[str, Any],
    num_workers: int,
    held: list[set[str]],
) -> None:
    (notes := tmp_path / "notes").mkdir()
    monkeypatch.setattr(caption, "CaptionStage", noting_stage(notes, num_workers))

    code = caption.run(caption_config(archive, tmp_path / "out", model=ON_CPU, cluster=ONE_DECODER | cluster))

    assert code == 0
    gpus = [note.read_text() for note in notes.iterdir()]
    assert len(gpus) == num_workers
    assert set(gpus) in held
    assert captions(tmp_path / "out") == local_captions
    assert verify(open_table(str(tmp_path / "out"))).proven


def failing_stage() -> type[CaptionStage]:
    """A caption stage of which the first two calls meet an error in the same moment. A later one waits for no other: an
    actor whose call never ends keeps its CPU and its GPU after the run."""

    class FailingStage(CaptionStage):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            import itertools
            import threading

            super().__init__(*arguments, **named)
            self.both, self.calls = threading.Barrier(2), itertools.count()

        def _caption(self, decoded: ChunkRows) -> ChunkRows:
            if next(self.calls) < 2:
                self.both.wait()
            raise ModelError("model: gone")

    return FailingStage


def test_a_run_on_one_gpu_fails_goes_on_and_retries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls of its worker fail together; part of the table is there when it goes on; a bad image is retried."""
    archive, out, notes = make_folder(tmp_path / "archive", 60), tmp_path / "out", tmp_path / "notes"
    whole = (archive / "000007.png").read_bytes()
    (archive / "000007.png").write_bytes(b"no image")
    config = caption_config(archive, out, model=ON_CPU, cluster=ONE_GPU)
    with monkeypatch.context() as patched:
        patched.setattr(caption, "CaptionStage", failing_stage())
        with pytest.raises(ModelError, match="model: gone"):
            caption.run(config)

    engine = pipeline.LocalEngine(config)
    job = open_job(config, engine, lambda line: None)
    (plan,) = job.table.open_plans()
    assert len(list(engine.caption_chunks(job.work, job.missing_chunks(plan)[:2]))) == 2
    notes.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(caption, "CaptionStage", noting_stage(notes, num_workers=1))
        assert caption.run(config) == 0
    assert [note.read_text() for note in notes.iterdir()] in (["1 of 0"], ["1 of 1"])
    assert json.loads((out / "run.json").read_text())["counts"]["skipped"] == 32

    (archive / "000007.png").write_bytes(whole)
    output = config.output.model_copy(update={"retry_failed": True})
    assert caption.run(config.model_copy(update={"output": output})) == 0
    assert {status for _, status, *_ in captions(out)} == {"ok"}
    assert json.loads((out / "run.json").read_text())["hardware"]["devices"] == "cpu"
    assert verify(open_table(str(out))).proven


def stage_without_room() -> type[CaptionStage]:
    """A caption stage on a GPU that has memory for the weights, and for no image."""

    class StageWithoutRoom(CaptionStage):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            from captioner.testing import with_room_for

            super().__init__(*arguments, **named)
            with_room_for(self.captioner, 0)

    return StageWithoutRoom


def stage_with_a_fault() -> type[CaptionStage]:
    """A caption stage on a GPU that fails for good."""

    class StageWithAFault(CaptionStage):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            from captioner.models import devices
            from captioner.testing import with_failing_gpu

            super().__init__(*arguments, **named)
            devices.is_usable = lambda device: False
            with_failing_gpu(self.captioner)

    return StageWithAFault


@pytest.mark.parametrize(
    ("make_stage", "message"),
    [
        (stage_without_room, "model starter: not one image, "),
        (stage_with_a_fault, "the GPU of a worker on node "),
    ],
    ids=["without room", "with a fault"],
)
def test_a_gpu_that_can_caption_nothing_stops_the_run_in_one_line_and_the_same_command_resumes(
    tmp_path: Path, archive: Path, local_captions: list[tuple], monkeypatch: pytest.MonkeyPatch, make_stage, message
) -> None:
    out = tmp_path / "out"
    config = caption_config(archive, out, model=ON_CPU | {"name": "starter"}, cluster=ONE_GPU)
    with monkeypatch.context() as patched:
        patched.setattr(caption, "CaptionStage", make_stage())
        with pytest.raises(ModelError, match=rf"^{message}[^\n]+$"):
            caption.run(config)
    assert num_committed_chunks(out) == 0

    assert caption.run(config) == 0
    assert [row[:3] for row in captions(out)] == [row[:3] for row in local_captions]
    assert verify(open_table(str(out))).proven


def test_what_the_first_worker_says_while_it_starts_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("weights in 2.0 s", "batch size 64, tried out in 1.0 s")
    shown: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(caption, "notify", shown.put)

    with caption.shown_messages() as messages:
        for worker in ("first", "second"):
            for line in lines:
                _put(messages, worker, line)
        _put(messages, "first", "the end")
        assert [shown.get(timeout=60) for _ in range(3)] == [f"caption worker: {line}" for line in (*lines, "the end")]

    _put(messages, "third", "a worker that starts again goes on although nobody listens any more")


def test_on_a_cluster_with_gpus_device_cpu_alone_captions_every_image(tmp_path: Path) -> None:
    words = ["caption", str(make_folder(tmp_path / "archive", 20)), str(tmp_path / "out"), "--model", "starter"]

    with pytest.raises(SystemExit) as ended:
        main([*words, "--device", "cpu", "--num-workers", "1", "--decode-cpus", "1"])

    assert ended.value.code == 0
    rows = captions(tmp_path / "out")
    assert [row[:3] for row in rows] == [(f"{number:06d}.png", "ok", None) for number in range(20)]
    assert len({text for *_, text in rows}) > 10


def test_a_gpu_that_torch_cannot_use_stops_the_run_before_anything_is_captioned(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    with pytest.raises(SystemExit) as ended:
        main(["caption", str(archive), str(out), "--model", "starter"])

    assert ended.value.code == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"captioner: error: the GPU that was reserved cannot be used on node \S+ \(torch [^\n]+\); "
        "install torch with CUDA there, or give --device cpu",
        line,
    )
    assert not list(out.glob("chunks/*/*"))


def test_a_worker_looks_at_its_own_gpu_and_without_one_takes_the_cpu() -> None:
    import ray

    with pytest.raises(ModelError, match="the GPU that was reserved cannot be used on node"):
        ray.get(ray.remote(num_gpus=0.5)(worker_device).remote("auto"))
    assert ray.get(ray.remote(num_gpus=0)(worker_device).remote("auto")) == "cpu"
    assert ray.get(ray.remote(num_gpus=0.5)(worker_device).remote("cpu")) == "cpu"


def test_the_demo_trains_and_reserves_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; test_train_on_ray.py trains on Ray with the shares of the demo."""
    config = demo.demo_config(tmp_path / "images", tmp_path / "run")
    cluster, two_gpus = ClusterConfig(**config.cluster.model_dump()), Resources(4, 2, 1, 4)
    assert share_out(two_gpus, cluster, device=config.model.device).gpus_per_worker == 0
    short = {"max_steps": 1, "eval_steps": 1, "per_device_train_batch_size": 4}
    config = config.model_copy(update={"training": config.training.model_copy(update=short)})
    monkeypatch.setattr(demo, "IMAGES", 40)
    monkeypatch.setattr(demo, "demo_config", lambda images, out: config)
    monkeypatch.setattr(train, "RayTrainEngine", lambda config: LocalTrainEngine(config.model.device))

    assert demo.train(tmp_path) == 0
    assert (tmp_path / "run/model/model.safetensors").exists()


@pytest.mark.parametrize(
    ("kinds", "device"),
    [
        (["H100"], "cuda"),
        (["Intel-GPU-Max-1550"], "xpu"),
        (["M2-Pro"], "mps"),
        (["M4"], "mps"),
        (["Intel-GPU-Max-1100", "H100"], "cuda"),
        ([], "cuda"),
    ],
)
def test_what_torch_calls_the_gpus_of_a_cluster(kinds: list[str], device: str) -> None:
    resources = Resources(8, 2, 1, accelerator=accelerator_of(["CPU", *(f"accelerator_type:{kind}" for kind in kinds)]))
    on_gpus, on_cpus = Sizes(2, 1.0, 1.0, 1, 1, 1), Sizes(2, 1.0, 0.0, 1, 1, 1)

    assert device_kind(resources, on_gpus, "auto") == device
    assert device_kind(resources, on_cpus, "auto") == device_kind(resources, on_gpus, "cpu") == "cpu"


@pytest.mark.parametrize("num_workers", ["auto", "1:2"])
@pytest.mark.parametrize(
    ("device", "given", "gpus"), [("auto", None, 1), ("cpu", None, 0), ("cpu", 1, 1), ("mps", 0, 0)]
)
def test_workers_on_the_cpu_reserve_no_gpu_unless_told(device, given, gpus, num_workers) -> None:
    cluster = ClusterConfig(num_workers=num_workers, gpus_per_worker=given)

    assert share_out(Resources(8, 2, 1, 8), cluster, device=device).gpus_per_worker == gpus
