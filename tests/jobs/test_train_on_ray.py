"""Training on Ray Train: the same curve as in one process, whatever is killed on the way."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow.fs import FileSystem
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from captioner.config import ClusterConfig, TrainConfig
from captioner.errors import ClusterError, InterruptedRunError, ModelError, SourceError
from captioner.models.devices import cpu_only_build
from captioner.store.directory import Directory
from captioner.testing import make_folder, make_tiny_model
from captioner.training import job
from captioner.training.local import LocalTrainEngine
from ray_jobs.cluster import Resources, share_out
from ray_jobs.process_group import ProcessGroup
from ray_jobs.train import RayTrainEngine, num_threads
from ray_jobs.train_workers import map_tables
from ray_jobs.trainer import UNUSED_CALLBACKS, Trainer

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"), 60, seed=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout: what is random differs between workers."""
    return make_tiny_model("git", tmp_path_factory.mktemp("tiny"))


def settings(
    data: Path,
    out: Path | str,
    model: Path,
    workers: int,
    gpus: float = 0,
    batch: int | None = None,
    fsdp: bool = False,
    address: str | None = None,
) -> TrainConfig:
    """`gpus`: of each worker, which computes on the CPU all the same; 0 as the demo has it, with --device auto.
    `batch`: of each, by default of 8 in all."""
    return TrainConfig.model_validate(
        {
            "data": {"path": str(data), "eval_fraction": 0.2},
            "model": {"name": str(model), "max_new_tokens": 8, "device": "cpu" if gpus else "auto"},
            "cluster": {"num_workers": workers, "gpus_per_worker": gpus, "address": address},
            "training": {
                "per_device_train_batch_size": batch or 8 // workers,
                "fsdp": fsdp,
                "max_steps": STEPS,
                "eval_steps": 2,
                "logging_steps": 1,
                "learning_rate": 1e-3,
            },
            "output": {"path": str(out)},
        }
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Path, tiny: Path) -> Path:
    """The run of one worker in one process."""
    import torch

    out, threads = tmp_path_factory.mktemp("alone") / "out", torch.get_num_threads()
    torch.set_num_threads(1)  # many threads on a tiny model wait for each other more than they work
    job.run(settings(data, out, tiny, workers=1), LocalTrainEngine("cpu"))
    torch.set_num_threads(threads)
    return out


def curve(out: Path | str, name: str) -> list[tuple[int, float]]:
    history = Directory(str(out)).read_json("history.json")["history"]
    return [(entry["step"], pytest.approx(entry[name], rel=1e-3)) for entry in history if name in entry]


Signal = tuple[int, int | None, signal.Signals]


def signalling_loop(starts: Path, out: str, *signals: Signal | None) -> Callable[[dict], dict]:
    """The loop of a worker that notes in `starts` from which checkpoint each start goes on.

    `signals`: of each start with this loop, the step at which rank 0 sends which signal to which process (`None`:
    itself) and waits for its own end, once the checkpoint of the step before is kept. Defined here in whole, so that it
    travels to workers by value.
    """
    before = len(started_from(starts))

    def loop(config: dict) -> dict:
        import os
        import threading
        import time
        from itertools import islice

        import ray.train

        from captioner.store.directory import Directory
        from ray_jobs.train_workers import RayWorker, train_loop

        own_signal = None
        if ray.train.get_context().get_world_rank() == 0:
            restored = ray.train.get_checkpoint()
            with open(starts, "a+") as notes:
                notes.write("new\n" if restored is None else f"{os.path.basename(restored.path)}\n")
                notes.seek(0)
                own_signal = next(islice(signals, sum(1 for _ in notes) - before - 1, None), None)

        def is_kept(checkpoint: str) -> bool:
            directory = Directory(out)
            folders = [f"checkpoints/{name}" for name in directory.list_folders("checkpoints")]
            files = [f"{folder}/{name}" for folder in folders for name in directory.list_names(folder)]
            return any(checkpoint.encode() in directory.read_bytes(file) for file in files)

        class Signalling(RayWorker):
            def show_progress(self, progress: dict) -> None:
                super().show_progress(progress)
                if own_signal is not None and progress["step"] == own_signal[0]:
                    step, victim, sent = own_signal
                    while not is_kept(f"step-{step - 1:08d}"):
                        time.sleep(0.05)
                    os.kill(victim or os.getpid(), sent)
                    threading.Event().wait()

        return train_loop(config, Signalling)

    return loop


def started_from(starts: Path) -> list[str]:
    """The checkpoint from which each start went on, or "new"."""
    return starts.read_text().split() if starts.exists() else []


@pytest.fixture
def bucket() -> Iterator[str]:
    """URI of a directory in a bucket of an S3 server on this machine, with the keys in it: Ray's processes are older
    than this test and do not have its environment."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    FileSystem.from_uri(f"s3://key:secret@models/?{options}&allow_bucket_creation=true")[0].create_dir("models")
    yield f"s3://key:secret@models/out?{options}"
    server.stop()


def train_in_own_process(data: Path, out: str, model: Path, address: str, starts: Path) -> int:
    """Train with two sharded workers in a process of its own, killed at step 3; return its exit code."""
    code = f"""
import importlib.util, os, signal, sys
from pathlib import Path
from captioner.training import job
from ray_jobs.train import RayTrainEngine
spec = importlib.util.spec_from_file_location("killed_driver", {__file__!r})
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
data, model, starts, out = Path({str(data)!r}), Path({str(model)!r}), Path({str(starts)!r}), {out!r}
config = tests.settings(data, out, model, workers=2, fsdp=True, address={address!r})
job.run(config, RayTrainEngine(config, tests.signalling_loop(starts, out, (3, os.getpid(), signal.SIGKILL))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.returncode < 0, done.stderr
    return done.returncode


def test_the_curve_is_that_of_one_worker_whatever_is_killed_or_stopped_and_out_is_an_object_store(
    tmp_path: Path, data: Path, tiny: Path, alone: Path, bucket: str, ray_instance
) -> None:
    """One run of four starts: of two sharded workers the driver is killed; of two with a GPU each one worker is killed,
    and Ctrl-C stops the next two; one worker with half a GPU ends it."""
    starts, out = tmp_path / "starts", Directory(bucket)
    address = ray_instance.get_runtime_context().gcs_address
    assert train_in_own_process(data, bucket, tiny, address, starts) == -signal.SIGKILL
    assert not out.exists("model/config.json")

    config = settings(data, bucket, tiny, workers=2, gpus=1)
    killed, stopped = (5, None, signal.SIGKILL), (5, os.getpid(), signal.SIGINT)
    with pytest.raises(
        InterruptedRunError, match=r"stopped by Ctrl-C; checkpoints are saved in .*; run the same command to continue"
    ) as ended:
        job.run(config, RayTrainEngine(config, signalling_loop(starts, bucket, killed, stopped)))
    assert "secret" not in str(ended.value)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    config = settings(data, bucket, tiny, workers=1, gpus=0.5, batch=4)
    job.run(config, RayTrainEngine(config, signalling_loop(starts, bucket)))

    assert started_from(starts) == ["new", "step-00000002", "step-00000004", "step-00000004"]
    assert curve(bucket, "loss") == curve(alone, "loss")
    assert curve(bucket, "eval_loss") == curve(alone, "eval_loss")
    assert curve(bucket, "eval_wer") == curve(alone, "eval_wer")
    assert [step for step, _ in curve(alone, "loss")] == list(range(1, STEPS + 1))
    assert {"config.json", "model.safetensors", "training_run.json"} < set(out.list_names("model"))
    assert out.exists("report.html")
    assert not [name for name in ("train.json", "model/training_run.json") if b"secret" in out.read_bytes(name)]


@pytest.mark.usefixtures("ray_instance")
def test_ray_train_starts_nothing_for_datasets() -> None:
    """Where Ray renames what is left out, runs start as before, with one more process."""

    def names(kind: type[DataParallelTrainer]) -> set[str]:
        return {type(callback).__name__ for callback in kind(lambda: None)._create_default_callbacks()}

    assert names(DataParallelTrainer) - names(Trainer) == UNUSED_CALLBACKS


@pytest.mark.usefixtures("ray_instance")
def test_the_thread_that_trains_has_the_gpu_of_its_worker_as_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA keeps a current device for each thread, and Ray Train calls the training function in a new one."""
    import torch

    current, devices = threading.local(), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    monkeypatch.setattr("ray_jobs.process_group.training_device", lambda device: torch.device("cuda:1"))
    group = ProcessGroup("auto", "cuda", num_workers=2, gpus_per_worker=1)
    trainer = Trainer(lambda: devices.append(getattr(current, "device", None)), backend_config=group)

    thread = threading.Thread(target=trainer._get_train_func())
    thread.start()
    thread.join()

    assert devices == [torch.device("cuda:1")]


@pytest.mark.usefixtures("ray_instance")
def test_a_gpu_that_torch_cannot_use_stops_training_before_pairs_are_read(tmp_path: Path, data: Path) -> None:
    words = {"cluster": {"num_workers": 2}, "data": {"path": str(data)}, "output": {"path": str(tmp_path / "out")}}
    config = TrainConfig.model_validate(words)

    with pytest.raises(
        ModelError, match=r"the GPU that was reserved cannot be used on node \S+ \(torch .*\); install torch"
    ):
        job.run(config, RayTrainEngine(config))
    if cpu_only_build():  # a file of torch says so; a missing driver is seen by the workers, later
        assert not (tmp_path / "out").exists()


def test_workers_that_cannot_use_their_gpus_leave_them_to_what_comes_next(
    tmp_path: Path, data: Path, ray_instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_jobs.train.check_gpu_nodes", lambda *_: None)  # as with a CUDA build without a driver
    words = {"data": {"path": str(data)}, "output": {"path": str(tmp_path / "out")}}
    config = TrainConfig.model_validate(words | {"cluster": {"num_workers": 2, "gpus_per_worker": 1}})

    with pytest.raises(ModelError, match="the GPU that was reserved cannot be used"):
        job.run(config, RayTrainEngine(config))

    gpus = ray_instance.cluster_resources()["GPU"]
    assert ray_instance.get(ray_instance.remote(num_cpus=0, num_gpus=gpus)(lambda: "runs").remote(), timeout=600)


@pytest.mark.usefixtures("ray_instance")
def test_a_worker_that_always_dies_while_it_joins_ends_the_training_with_its_error(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(ProcessGroup):  # defined here, so that it travels to workers by value
        @property
        def backend(self) -> str:
            import os
            import sys

            if sys._getframe(1).f_code.co_name == "_join":
                os.abort()
            return "gloo"

    monkeypatch.setattr("ray_jobs.process_group.ProcessGroup", Dying)
    config = settings(make_folder(tmp_path / "data", 8), tmp_path / "out", tiny, workers=1)

    with pytest.raises(
        ClusterError, match="worker died 3 times while it joined the others: Fatal Python error: Aborted"
    ):
        job.run(config, RayTrainEngine(config))


@pytest.mark.usefixtures("ray_instance")
def test_tables_come_back_in_order_whichever_is_done_first(tmp_path: Path) -> None:
    done = tmp_path / "done"

    def slow_first(table: pa.Table) -> pa.Table:
        import time

        number = table["number"][0].as_py()
        while number == 0 and not done.exists():
            time.sleep(0.01)
        if number == 1:
            done.touch()
        return table.append_column("doubled", pa.array([2 * number] * len(table)))

    tables = (pa.table({"number": [number] * (1 + number % 3)}) for number in range(60))

    results = list(map_tables(slow_first, tables))

    assert [table.to_pydict() for table in results] == [
        {"number": [n] * (1 + n % 3), "doubled": [2 * n] * (1 + n % 3)} for n in range(60)
    ]


@pytest.mark.usefixtures("ray_instance")
def test_what_a_task_says_of_the_archive_reaches_the_person(tmp_path: Path, tiny: Path) -> None:
    (make_folder(tmp_path / "data", 3) / "metadata.jsonl").unlink()
    config = settings(tmp_path / "data", tmp_path / "out", tiny, workers=1)

    with pytest.raises(SourceError, match=r"no pairs: 3 images \(3 no_caption\)"):
        job.run(config, RayTrainEngine(config))


def test_more_gpu_workers_than_gpus_are_refused() -> None:
    with pytest.raises(ClusterError, match="4 workers with 1 GPU each do not fit; the cluster has 2 GPUs"):
        share_out(Resources(num_cpus=16, num_gpus=2, num_nodes=1), ClusterConfig(num_workers=4))


def test_two_workers_on_two_cpus_leave_one_for_decoding() -> None:
    sizes = share_out(Resources(num_cpus=2, num_gpus=0, num_nodes=1), ClusterConfig(num_workers=2))

    assert 2 - sizes.num_workers * sizes.cpus_per_worker >= 1


def test_workers_without_a_gpu_compute_on_all_cpus_but_a_small_model_on_one() -> None:
    machine, large, small = Resources(num_cpus=8, num_gpus=0, num_nodes=1, least_cpus=8), 10**9, 10**7
    one_worker, two_workers = (share_out(machine, ClusterConfig(num_workers=number)) for number in (1, 2))

    assert (num_threads(one_worker, machine, large), num_threads(two_workers, machine, large)) == (8, 4)
    assert num_threads(one_worker, machine, small) == 1
