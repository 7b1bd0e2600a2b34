"""The spot-check in the distributed job: the same rows and the same figures, however the work is shared out."""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import caption_config

from captioner import pipeline
from captioner.config import CaptionConfig
from captioner.data import Chunk, Receipt
from captioner.errors import CheckFailedError
from captioner.steps import Work
from captioner.store.table import CaptionsTable, open_table
from captioner.store.verify import verify
from captioner.testing import make_folder, make_tiny_model
from ray_jobs.caption import RayEngine

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


def checked(table: CaptionsTable) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the rows of the sample by their image, and the figures."""
    names = [name for name in table.directory.list_names("checks") if name.startswith("part-")]
    rows = [row for name in names for row in table.directory.read_table(f"checks/{name}").to_pylist()]
    return {row["image_id"]: row for row in rows if row["words"]}, table.directory.read_json("checks/check.json")


class Recording(RayEngine):
    """Keeps what the receipts say about the sample: edits and words of each image."""

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__(config)
        self.scored: list[Sequence[int]] = []

    def caption_chunks(self, work: Work, chunks: list[Chunk]) -> Generator[Receipt, None, None]:
        for receipt in super().caption_chunks(work, chunks):
            self.scored.extend(receipt.scored)
            yield receipt


def test_one_process_or_two_workers_any_batch_size_the_same_sample_and_scores(
    tmp_path: Path, archive: Path, model: Path
) -> None:
    """The receipts of the cluster carry the scores, by which the run is found to be too bad."""
    assert pipeline.run(settings(archive, tmp_path / "one", model, 1, 16)) == 0
    config = settings(archive, tmp_path / "two", model, 2, 5, max_wer=0.01)
    engine = Recording(config)
    with pytest.raises(CheckFailedError, match=r"is above --max-wer 0.01"):
        pipeline.run(config, engine)

    tables = [open_table(str(tmp_path / out)) for out in ("one", "two")]
    (sampled, check), (sampled_again, check_again) = map(checked, tables)
    assert verify(tables[1]).proven
    assert len(engine.scored) == 25
    assert sum(edits for edits, _ in engine.scored) / sum(words for _, words in engine.scored) == check["wer"]
    assert sampled == sampled_again
    assert len(sampled) == check["num_rows"] == 25
    for figure in ("wer", "interval", "wer_single", "mer", "cer", "shuffled_wer", "lift", "cider_d", "bleu", "rouge_l"):
        assert check[figure] == check_again[figure] is not None, figure
    assert check["wer"] > 0
    assert len({row["reference"] for row in sampled.values()}) > 12
