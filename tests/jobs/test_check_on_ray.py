"""The spot-check in the distributed job: the same rows and the same figures, however the work is shared out."""

from pathlib import Path

import pytest
from helpers import caption_config

from captioner import pipeline
from captioner.config import CaptionConfig
from captioner.errors import CheckFailedError
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder, make_tiny_model
from ray_jobs.caption import RayEngine, run

pytestmark = pytest.mark.usefixtures("ray_instance")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("archive"), 60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("git", tmp_path_factory.mktemp("model"))


def settings(archive: Path, out: Path, model: Path, workers: int, batch: int, **check: object) -> CaptionConfig:
    return caption_config(
        archive,
        out,
        model={"name": str(model), "batch_size": batch, "max_new_tokens": 8},
        cluster={"num_workers": workers, "decode_cpus": 1, "gpus_per_worker": 0},
        check={"sample": 25, "seed": 2, **check},
        rows_per_file=16 * workers,
    )


def test_one_process_or_two_workers_any_batch_size_the_same_sample_and_scores(
    tmp_path: Path, archive: Path, model: Path
) -> None:
    checks = []
    for engine, workers, batch in ((pipeline.run, 1, 16), (run, 2, 5)):
        out = tmp_path / str(workers)
        assert engine(settings(archive, out, model, workers, batch)) == 0
        table = open_table(str(out))
        names = [name for name in table.directory.list_names("checks") if name.startswith("part-")]
        rows = [row for name in names for row in table.directory.read_table(f"checks/{name}").to_pylist()]
        check = table.directory.read_json("checks/check.json")
        checks.append(({row["image_id"]: row for row in rows if row["words"]}, check))

    (sampled, check), (sampled_again, check_again) = checks
    assert sampled == sampled_again
    assert len(sampled) == check["num_rows"] == 25
    for figure in ("wer", "interval", "wer_single", "mer", "cer", "shuffled_wer", "lift", "cider_d", "bleu", "rouge_l"):
        assert check[figure] == check_again[figure] is not None, figure
    assert check["wer"] > 0
    assert len({row["reference"] for row in sampled.values()}) > 12


def test_receipts_of_a_cluster_carry_the_scores(tmp_path: Path, archive: Path, model: Path) -> None:
    scored = []

    class Recording(RayEngine):
        def caption_chunks(self, work, chunks):
            for receipt in super().caption_chunks(work, chunks):
                scored.extend(receipt.scored)
                yield receipt

    config = settings(archive, tmp_path / "out", model, 1, 16, max_wer=0.01)
    with pytest.raises(CheckFailedError, match=r"is above --max-wer 0.01"):
        pipeline.run(config, Recording(config))

    table = open_table(str(tmp_path / "out"))
    wer = sum(edits for edits, _ in scored) / sum(words for _, words in scored)
    assert len(scored) == 25
    assert table.directory.read_json("checks/check.json")["wer"] == wer
    assert verify(table).proven
