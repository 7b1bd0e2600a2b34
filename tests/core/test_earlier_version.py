"""Tables, review journals and training runs that an earlier version wrote open, go on and are exported."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from helpers import caption_config

from captioner import pipeline
from captioner.config import ExportConfig, ModelConfig, TrainConfig
from captioner.errors import DamagedFileError, OutputError
from captioner.models import resolve
from captioner.publishing.exports.command import export_texts
from captioner.store.directory import Directory
from captioner.store.journal import latest_reviews, read_reviews
from captioner.store.read import read_parts
from captioner.store.table import CaptionsTable, open_table
from captioner.store.verify import verify
from captioner.training import job
from captioner.training.local import LocalTrainEngine

WRITTEN = Path(__file__).parents[1] / "data/earlier_version"
WRITTEN_AT = "/tmp/captioner"
LATER = ["000012.png", "000013.png"]
RECAPTION = {"only": "failed", "fingerprint": "a", "model": {}, "why": "weak"}  # with a setting of a later version

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy of what the earlier version wrote, as if it had been written here."""
    home = tmp_path / "home"
    shutil.copytree(WRITTEN, home)
    for file in (*home.glob("*/*.json"), *home.glob("*/runs/*.json")):
        file.write_text(file.read_text().replace(WRITTEN_AT, str(home)))
    return home


def caption(home: Path, out: str, **output: object) -> CaptionsTable:
    """Go on with the table, and return it."""
    assert pipeline.run(caption_config(home / "archive", home / out, rows_per_file=4, **output)) == 0
    return open_table(str(home / out))


def rows_of(table: CaptionsTable) -> list[dict]:
    return pa.concat_tables(read_parts(table)).to_pylist()


def training(home: Path, out: str) -> TrainConfig:
    settings = {
        "data": {"path": str(home / "archive"), "eval_fraction": 0.2, "max_failed": 0.5},
        "model": {"name": "starter", "max_new_tokens": 8},
        "training": {"per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1},
        "output": {"path": str(home / out)},
    }
    # The run belongs to the starter that this version ships, whether or not it is the one of that version.
    record = json.loads((home / out / "train.json").read_text())
    record["bound"]["model"]["sha256"] = resolve(ModelConfig(name="starter"), "float32").sha256
    (home / out / "train.json").write_text(json.dumps(record))
    return TrainConfig.model_validate(settings)


def test_a_finished_table_is_proven(home: Path) -> None:
    result = verify(open_table(str(home / "finished")))

    assert result.proven
    assert result.unchecked == 4 + 4 + 4 + 4  # captions, plan, alt texts and checks: it recorded no checksums
    assert (result.counts.ok, result.counts.failed_by_reason) == (12, {"not_an_image": 1})


def test_a_stopped_run_goes_on_where_it_stopped(home: Path) -> None:
    before = rows_of(open_table(str(home / "stopped")))
    finished = rows_of(open_table(str(home / "finished")))

    table = caption(home, "stopped")

    assert verify(table).proven
    rows = rows_of(table)
    assert len(before) == 8
    assert rows[:8] == before
    assert [(row["image_id"], row["caption"], row["error_code"]) for row in rows] == [
        (row["image_id"], row["caption"], row["error_code"]) for row in finished
    ]


def test_damage_to_a_published_part_is_noticed_and_repaired(home: Path) -> None:
    finished = rows_of(open_table(str(home / "finished")))
    file = home / "finished/captions/part-00001.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)

    assert not verify(open_table(str(home / "finished"))).proven
    table = caption(home, "finished")

    assert verify(table).proven
    assert [(row["image_id"], row["caption"]) for row in rows_of(table)] == [
        (row["image_id"], row["caption"]) for row in finished
    ]


def test_new_images_are_added(home: Path) -> None:
    before = rows_of(open_table(str(home / "finished")))

    table = caption(home, "finished", extend=True)

    assert verify(table).proven
    assert rows_of(table)[:13] == before
    assert [row["image_id"] for row in rows_of(table)[13:]] == LATER


def test_failed_images_are_captioned_again(home: Path) -> None:
    shutil.copy(home / "archive/000000.png", home / "archive/broken.png")

    table = caption(home, "finished", retry_failed=True)

    assert verify(table).proven
    captions = {row["image_id"]: row["caption"] for row in rows_of(table)}
    assert captions["broken.png"] == captions["000000.png"] is not None


def test_the_review_journals_are_read(home: Path) -> None:
    reviews, damaged = read_reviews(Directory(str(home / "finished")))

    assert damaged == 0
    assert {image_id: (review.decision, review.reviewer) for image_id, review in latest_reviews(reviews).items()} == {
        "000000.png": ("approved", "Ana"),
        "000001.png": ("approved", "Åsa"),
        "000002.png": ("rejected", "Ana"),
        "000003.png": ("decorative", "Ana"),
        "000005.png": ("expert", "Åsa"),
    }


@pytest.mark.parametrize(
    ("file", "changed", "setting"),
    [
        ("table.json", lambda value: value["source"].update(tile_size=3), "source.tile_size"),
        ("plan/g000/plan.json", lambda value: value.update(recaption=RECAPTION), "recaption.why"),
    ],
)
def test_a_table_of_a_newer_version_is_not_called_damaged(
    home: Path, file: str, changed: Callable[[dict], None], setting: str
) -> None:
    directory = Directory(str(home / "finished"))
    value = directory.read_json(file)
    changed(value)
    directory.write_json(file, value, checksum=True)

    with pytest.raises(OutputError) as caught:
        caption(home, "finished")

    expected = (
        f"{home}/finished/{file} was written by a newer captioner (setting '{setting}'); use that version, or give"
    )
    assert str(caught.value).startswith(expected)
    assert directory.read_json(file) == value


def test_a_wrong_setting_of_a_table_is_one_line(home: Path) -> None:
    file = home / "finished/table.json"
    file.write_text(file.read_text().replace('"max_pixels": ', '"max_pixels": -'))

    with pytest.raises(DamagedFileError, match=r"damaged: source.max_pixels: Input should be greater than") as caught:
        open_table(str(home / "finished"))

    assert not {"\n", "pydantic"} & {*str(caught.value), *str(caught.value).split(".")}


def test_reviewed_texts_are_exported(home: Path) -> None:
    export_texts(open_table(str(home / "finished")), ExportConfig(to="csv", path=str(home / "texts.csv")))

    with (home / "texts.csv").open(encoding="utf-8-sig", newline="") as file:
        texts = {row["image_id"]: row["alt_text"] for row in csv.DictReader(file)}
    assert texts == {
        "000000.png": "A red circle.",
        "000001.png": "A text that Åsa approved later.",
        "000003.png": "",
    }


def test_a_stopped_training_run_goes_on_with_its_pairs(home: Path) -> None:
    pairs = {file.name: file.read_bytes() for file in (home / "training_stopped/pairs").iterdir()}
    run_id = json.loads((home / "training_stopped/train.json").read_text())["training_run_id"]

    assert job.run(training(home, "training_stopped"), LocalTrainEngine()) == 0

    record = json.loads((home / "training_stopped/train.json").read_text())
    assert (record["state"], record["training_run_id"]) == ("finished", run_id)
    assert {file.name: file.read_bytes() for file in (home / "training_stopped/pairs").iterdir()} == pairs
    assert (home / "training_stopped/model/model.safetensors").exists()


def test_a_finished_training_run_has_nothing_to_do(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class NoTraining(LocalTrainEngine):
        def train(self, opened: job.PreparedRun) -> job.TrainOutcome:
            raise AssertionError("the run is finished")

    assert job.run(training(home, "training_finished"), NoTraining()) == 0
    assert "nothing to train" in capsys.readouterr().err
