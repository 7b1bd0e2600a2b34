"""The distributed job: the same table and spot-check as one process makes, and none of Ray's traps."""

import io
import pickle
import tarfile
import time
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers import caption_config, rows_of

from captioner import pipeline
from captioner.config import CaptionConfig, ClusterConfig
from captioner.data import Chunk, Receipt
from captioner.errors import CheckFailedError, ClusterError, ModelError, SourceError
from captioner.imaging.sandbox import decoder
from captioner.run.job import ROWS_PER_CHUNK, open_job, plan_images
from captioner.steps import Work
from captioner.store.table import CaptionsTable, open_table
from captioner.store.verify import verify
from captioner.testing import make_folder, make_tar, make_tiny_model
from ray_jobs import caption
from ray_jobs.caption import RayEngine, configure_ray_data, make_dataset, no_progress_timeout, run
from ray_jobs.cluster import Resources, share_out
from ray_jobs.stages import DecodeStage

pytestmark = pytest.mark.usefixtures("ray_instance")
DEADLINE_S = 600.0


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("archive"), 60)
    (root / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("git", tmp_path_factory.mktemp("model"))


def settings(archive: Path, out: Path, model="fake", **cluster) -> CaptionConfig:
    network = {"name": str(model), "batch_size": cluster.pop("batch_size", "auto"), "max_new_tokens": 8}
    if model == "fake":
        network["preprocess"] = "processor"  # decoders that need not import torch start in a tenth of the time
    shares = {"gpus_per_worker": 0, "num_workers": 1, "decode_cpus": 1, **cluster}
    return caption_config(archive, out, model=network, cluster=shares, rows_per_file=32)


def captions(out: Path) -> list[tuple]:
    names = ("image_id", "status", "error_code", "caption", "num_tokens")
    return [tuple(row[name] for name in names) for row in rows_of(out)]


class Recording(RayEngine):
    """Keeps what the receipts say about the sample: edits and words of each image."""

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__(config)
        self.scored: list[Sequence[int]] = []

    def caption_chunks(self, work: Work, chunks: list[Chunk]) -> Generator[Receipt, None, None]:
        for receipt in super().caption_chunks(work, chunks):
            self.scored.extend(receipt.scored)
            yield receipt


def checked(table: CaptionsTable) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the rows of the sample by their image, and the figures."""
    names = [name for name in table.directory.list_names("checks") if name.startswith("part-")]
    rows = [row for name in names for row in table.directory.read_table(f"checks/{name}").to_pylist()]
    return {row["image_id"]: row for row in rows if row["words"]}, table.directory.read_json("checks/check.json")


def test_one_process_or_two_workers_any_batch_size_the_same_captions_sample_and_scores(
    tmp_path: Path, archive: Path, model: Path
) -> None:
    """Sampled captions. The receipts of the cluster carry the scores, by which the run is found to be too bad."""

    def sampled(out: Path, batch: int, max_wer: float | None = None, **cluster) -> CaptionConfig:
        config = settings(archive, out, model, batch_size=batch, **cluster)
        drawn = config.model.model_copy(update={"temperature": 4.0, "num_captions": 2, "seed": 5})
        check = config.check.model_copy(update={"sample": 25, "seed": 2, "max_wer": max_wer})
        return config.model_copy(update={"model": drawn, "check": check})

    assert pipeline.run(sampled(tmp_path / "one", 16)) == 0
    config = sampled(tmp_path / "two", 5, max_wer=0.01, num_workers=2)
    engine = Recording(config)
    with pytest.raises(CheckFailedError, match=r"is above --max-wer 0.01"):
        pipeline.run(config, engine)

    tables = [open_table(str(tmp_path / out)) for out in ("one", "two")]
    assert verify(tables[1]).proven
    assert captions(tmp_path / "two") == captions(tmp_path / "one")
    both = [{row["image_id"]: row["captions"] for row in rows_of(table.directory.location)} for table in tables]
    assert both[0] == both[1]
    assert len({text for texts in both[0].values() for text in texts or []}) >= 100
    (sampled_rows, check), (sampled_again, check_again) = map(checked, tables)
    assert len(engine.scored) == 25
    assert sum(edits for edits, _ in engine.scored) / sum(words for _, words in engine.scored) == check["wer"]
    assert sampled_rows == sampled_again
    assert len(sampled_rows) == check["num_rows"] == 25
    for figure in ("wer", "interval", "wer_single", "mer", "cer", "shuffled_wer", "lift", "cider_d", "bleu", "rouge_l"):
        assert check[figure] == check_again[figure] is not None, figure
    assert check["wer"] > 0
    assert len({row["reference"] for row in sampled_rows.values()}) > 12


def test_the_most_probable_captions_on_ray_are_those_of_one_process(tmp_path: Path, archive: Path, model: Path) -> None:
    assert pipeline.run(settings(archive, tmp_path / "one", model, batch_size=16)) == 0
    assert run(settings(archive, tmp_path / "ray", model, batch_size=5)) == 0

    texts = [row[3] for row in captions(tmp_path / "one") if row[1] == "ok"]
    assert len(set(texts)) >= len(texts) / 2  # a model that says the same of everything would prove nothing
    assert captions(tmp_path / "ray") == captions(tmp_path / "one")


def make_faulty_tars(root: Path) -> Path:
    """Tars with a header that claims 2^31 pixels, and one with bytes in which no member is found."""
    for number in range(4):
        make_tar(root / f"{number}.tar", 20, seed=number)
    with tarfile.open(root / "0.tar", "a") as tar:
        data = b"P6\n4294967296 1\n255\n"
        member = tarfile.TarInfo("extreme.ppm")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    damaged = bytearray((root / "3.tar").read_bytes())
    damaged[5120:5632] = bytes(range(256)) * 2
    (root / "3.tar").write_bytes(damaged)
    return root


def test_faults_of_a_source_are_the_same_rows_on_ray_and_in_one_process(tmp_path: Path) -> None:
    tars = make_faulty_tars(tmp_path / "tars")
    configs = {engine: settings(tars, tmp_path / engine.__module__) for engine in (run, pipeline.run)}
    for config in configs.values():
        plan_images(config, lambda line: None)
    (tars / "1.tar").unlink()
    make_tar(tars / "2.tar", 20, seed=9)  # other images under the same names

    for engine, config in configs.items():
        assert engine(config) == 0
        assert verify(open_table(config.output.path)).proven

    of_ray, of_one_process = (captions(Path(config.output.path)) for config in configs.values())
    assert of_ray == of_one_process
    codes = Counter((image_id[:5], error_code) for image_id, _, error_code, *_ in of_ray)
    assert codes["0.tar", None] == codes["1.tar", "not_found"] == codes["2.tar", "changed"] == 20
    assert codes["0.tar", "too_many_pixels"] == codes["3.tar", "damaged"] == 1


def test_weak_rows_are_recaptioned_alike_on_ray_and_in_one_process(tmp_path: Path, archive: Path) -> None:
    tables = []
    for engine in (run, pipeline.run):
        config = settings(archive, tmp_path / engine.__module__)
        pipeline.run(config)
        model = config.model.model_copy(update={"prompt": "another"})
        output = config.output.model_copy(update={"only": "logprob<30% or failed"})
        engine(config.model_copy(update={"model": model, "output": output}))
        assert verify(open_table(config.output.path)).proven
        tables.append(captions(Path(config.output.path)))

    assert tables[0] == tables[1]
    assert len([row for row in tables[0] if (row[3] or "").startswith("another")]) >= 18


def test_decoding_captioning_and_commits_stay_separate_operators(tmp_path: Path, archive: Path) -> None:
    config = settings(archive, tmp_path / "out")
    engine = RayEngine(config)
    job = open_job(config, engine, lambda line: None)
    (plan,) = job.table.open_plans()
    chunks = job.missing_chunks(plan)
    configure_ray_data(job.work)
    sizes = share_out(Resources(num_cpus=2, num_gpus=0, num_nodes=1), config.cluster)

    dataset = make_dataset(job.work, chunks, sizes, "auto").materialize()

    operators = [line.split(":")[0] for line in dataset.stats().splitlines() if line.startswith("Operator")]
    assert operators == [
        "Operator 0 FromItems",
        "Operator 1 MapBatches(DecodeStage)",
        "Operator 2 MapBatches(CaptionStage)",
        "Operator 3 MapBatches(CommitStage)",
    ]
    assert job.table.committed_chunks(0) == {chunk.chunk_id for chunk in chunks}


def wait_until_cpus_are_free() -> None:
    import ray

    deadline = time.monotonic() + DEADLINE_S
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "an actor of the run is left"
        time.sleep(0.1)


def test_a_fault_of_the_source_stops_the_run_and_resumes(tmp_path: Path) -> None:
    archive, out = make_folder(tmp_path / "archive", 20), tmp_path / "out"
    engine = RayEngine(settings(archive, out))
    job = open_job(settings(archive, out), engine, lambda line: None)
    (plan,) = job.table.open_plans()
    archive.rename(tmp_path / "gone")

    with pytest.raises(SourceError) as fault:
        list(engine.caption_chunks(job.work, job.missing_chunks(plan)))
    assert str(archive) in str(fault.value)
    assert len(str(fault.value).splitlines()) == 1
    assert pickle.loads(pickle.dumps(fault.value)).args == fault.value.args
    wait_until_cpus_are_free()  # while the error is kept
    (tmp_path / "gone").rename(archive)

    assert pipeline.run(settings(archive, out)) == 0
    assert verify(open_table(str(out))).proven


def waiting_stage(gate: Path) -> type[DecodeStage]:
    """A decode stage whose calls return nothing before `gate` is there. Defined here, so that it travels by value."""

    class WaitingStage(DecodeStage):
        def __call__(self, block: pa.Table) -> pa.Table:
            import time

            while not gate.exists():
                time.sleep(0.05)
            return super().__call__(block)

    return WaitingStage


def test_a_run_without_progress_ends_with_one_line_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(make_folder(tmp_path / "archive", 20), tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(caption, "no_progress_timeout", lambda decode_timeout, endpoint: 2.0)
        patched.setattr(caption, "DecodeStage", waiting_stage(tmp_path / "gate"))
        with pytest.raises(ClusterError, match=r"^no stage has finished a chunk for 2 s; progress is saved"):
            run(config)
    (tmp_path / "gate").touch()

    assert pipeline.run(config) == 0
    assert verify(open_table(config.output.path)).proven


def test_a_worker_that_cannot_load_the_model_stops_the_run_with_one_line(tmp_path: Path, archive: Path) -> None:
    """Its files are there when the run starts and gone when a worker looks for them, as on a node without that disk."""
    model, out = make_tiny_model("git", tmp_path / "model"), tmp_path / "out"
    config = settings(archive, out, model)
    engine = RayEngine(config)
    job = open_job(config, engine, lambda line: None)
    (plan,) = job.table.open_plans()
    model.rename(tmp_path / "gone")

    with pytest.raises(ModelError) as fault:
        list(engine.caption_chunks(job.work, job.missing_chunks(plan)))
    assert str(model) in str(fault.value)
    assert len(str(fault.value).splitlines()) == 1
    (tmp_path / "gone").rename(model)

    assert pipeline.run(config) == 0
    assert verify(open_table(str(out))).proven


def test_a_chunk_of_images_that_hang_is_no_stall() -> None:
    for timeout in (1.0, 60.0, 600.0):
        most = decoder.HANGS_AT_FULL_TIME * timeout + ROWS_PER_CHUNK * min(timeout, decoder.SHORT_TIMEOUT_S)
        assert no_progress_timeout(timeout) > most


@pytest.mark.parametrize(
    ("resources", "cluster", "expected"),
    [
        (Resources(2, 0, 1), {"num_workers": 2}, (2, 0.5, 0.0, 1)),
        (Resources(2, 0, 1), {}, (1, 1.0, 0.0, 1)),
        (Resources(8, 0, 1), {}, (1, 6.0, 0.0, 2)),
        (Resources(16, 4, 1), {}, (4, 1.0, 1.0, 12)),
        (Resources(16, 4, 1), {"gpus_per_worker": 2}, (2, 1.0, 2.0, 14)),
        (Resources(16, 5, 3, node_gpus=(3, 2, 0)), {"gpus_per_worker": 2}, (2, 1.0, 2.0, 14)),
        (Resources(16, 1, 1), {"gpus_per_worker": 0.5}, (2, 1.0, 0.5, 14)),
        (Resources(16, 2, 1), {"gpus_per_worker": 0.4}, (4, 1.0, 0.4, 12)),
        (Resources(16, 3, 2, node_gpus=(2, 1)), {"gpus_per_worker": 0.6}, (3, 1.0, 0.6, 13)),
        (Resources(16, 1, 1), {"gpus_per_worker": 0}, (1, 12.0, 0.0, 4)),
    ],
)
def test_every_share_leaves_room_to_decode(resources: Resources, cluster: dict, expected: tuple) -> None:
    sizes = share_out(resources, ClusterConfig(**cluster))

    assert (sizes.num_workers, sizes.cpus_per_worker, sizes.gpus_per_worker, sizes.decode_cpus) == expected
    assert sizes.num_workers * sizes.cpus_per_worker + sizes.decode_cpus <= resources.num_cpus


@pytest.mark.parametrize(
    ("resources", "cluster", "expected"),
    [
        (Resources(2, 0, 1), {}, (1, 1.0, 1)),
        (Resources(4, 0, 1), {}, (2, 1.0, 2)),
        (Resources(4, 0, 1), {"num_workers": 1}, (1, 1.0, 3)),
        (Resources(8, 0, 2, 4), {}, (4, 1.0, 4)),
        (Resources(16, 4, 1), {}, (4, 1.0, 12)),
    ],
)
def test_a_small_model_captions_on_one_cpu_and_as_many_prepare(resources: Resources, cluster: dict, expected) -> None:
    sizes = share_out(resources, ClusterConfig(**cluster), one_thread=True)

    assert (sizes.num_workers, sizes.cpus_per_worker, sizes.decode_cpus) == expected


@pytest.mark.parametrize(("num_nodes", "concurrency", "workers"), [(16, 4, 4), (3, 32, 3), (1, 1, 1)])
def test_workers_together_keep_the_concurrency_of_servers(num_nodes: int, concurrency: int, workers: int) -> None:
    resources = Resources(4 * num_nodes, 0, num_nodes, 4)

    assert share_out(resources, ClusterConfig(), device="cpu", concurrency=concurrency).num_workers == workers
    for more in (concurrency + 1, f"1:{concurrency + 1}"):
        with pytest.raises(ClusterError, match=f"--num-workers {more} with --concurrency {concurrency}: each worker"):
            share_out(resources, ClusterConfig(num_workers=more), device="cpu", concurrency=concurrency)


@pytest.mark.parametrize(
    ("resources", "cluster", "one_thread", "threads"),
    [
        (Resources(2, 0, 1), {}, False, 2),
        (Resources(4, 0, 1), {}, False, 4),
        (Resources(8, 0, 2, 4), {}, False, 4),
        (Resources(4, 0, 1), {}, True, 1),
        (Resources(8, 2, 1), {}, False, 1),
    ],
)
def test_a_large_model_without_a_gpu_has_a_thread_on_each_cpu_of_its_share(
    resources, cluster, one_thread, threads
) -> None:
    assert share_out(resources, ClusterConfig(**cluster), one_thread).threads_per_worker == threads


@pytest.mark.parametrize(
    ("resources", "cluster", "words"),
    [
        (Resources(2, 0, 1), {"gpus_per_worker": 1}, "0 GPUs"),
        (Resources(4, 2, 1), {"num_workers": 3}, "2 GPUs"),
        (
            Resources(8, 3, 3, node_gpus=(1, 2, 0)),
            {"num_workers": 2, "gpus_per_worker": 2},
            "3 GPUs, 1 and 2 on",
        ),
        (
            Resources(8, 2, 2, node_gpus=(1, 1)),
            {"gpus_per_worker": 2},
            r"no node .*2 GPUs, 1 and 1 on 2 nodes",
        ),
        (Resources(8, 2, 1), {"num_workers": 3, "gpus_per_worker": 0.6}, "3 workers with 0.6 GPUs .*2 GPUs"),
        (Resources(2, 0, 1), {"decode_cpus": 2}, "--decode-cpus"),
        (Resources(2, 0, 1), {"num_workers": 50}, "--num-workers"),
    ],
)
def test_a_request_that_cannot_be_met_is_an_error_before_any_actor(
    resources: Resources, cluster: dict, words: str
) -> None:
    with pytest.raises(ClusterError, match=words):
        share_out(resources, ClusterConfig(**cluster))
