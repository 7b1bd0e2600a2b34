"""From DATA to usable pairs: every kind of source, what is skipped and why, and the split."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import caption_config
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner import pipeline
from captioner.config import ModelConfig, TrainDataConfig
from captioner.data import PixelSpec
from captioner.errors import SourceError, UsageError
from captioner.models import ModelRef, resolve
from captioner.testing import ABORT_MARKER, decoder_faults, make_folder, make_parquet, make_tar
from captioner.training.collate import Decode
from captioner.training.pair_sources import PAIRS_SCHEMA, list_pairs, open_pair_sources
from captioner.training.pairs import Examine, Pairs, join_captions, make_pairs, split

SPEC = PixelSpec(32, 32)
MODEL = resolve(ModelConfig(name="starter"))


def pairs_of(
    max_positions: int | None = None, prompt: str = "", seed: int = 0, model: ModelRef = MODEL, **data
) -> Pairs:
    config = TrainDataConfig(**data)
    sources = open_pair_sources(config)
    examine = Examine(sources, replace(model, spec=SPEC, max_positions=max_positions, prompt=prompt))
    examined = map(examine, list_pairs(sources, config.limit))
    return make_pairs(config, examined, seed)


def rows_of(pairs: Pairs) -> list[dict]:
    return [row for table in pairs.tables.values() for row in table.to_pylist()]


def folder_with_csv(root: Path) -> Path:
    make_folder(root, 12)
    lines = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    (root / "metadata.jsonl").unlink()
    text = "".join(f'{line["file_name"]},"{line["captions"][0]}"\n' for line in lines)
    (root / "metadata.csv").write_text("file_name,text\n" + text)
    return root


def folder_with_parquet(root: Path) -> Path:
    make_folder(root, 12)
    lines = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    (root / "metadata.jsonl").unlink()
    rows = [{"file_name": line["file_name"], "caption": line["captions"][0]} for line in lines]
    pq.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")
    return root


def folder_with_texts(root: Path) -> Path:
    """As tools for training write them: a text file beside each image."""
    make_folder(root, 12)
    for number, line in enumerate((root / "metadata.jsonl").read_text().splitlines()):
        image, suffix = json.loads(line), ".caption" if number % 2 else ".txt"
        (root / image["file_name"]).with_suffix(suffix).write_text(image["captions"][0])
    (root / "metadata.jsonl").unlink()
    return root


def parquet_with_a_row_for_each_caption(root: Path) -> Path:
    table = pq.read_table(make_parquet(root / "scenes.parquet", 12)).drop_columns(["captions"])
    captions = pa.array([f"caption {number} with a background" for number in range(24)])
    pq.write_table(pa.concat_tables([table, table]).append_column("caption", captions), root / "scenes.parquet")
    return root / "scenes.parquet"


def saved_dataset(root: Path) -> Path:
    import datasets

    table = pq.read_table(make_parquet(root / "rows.parquet", 12))
    dataset = datasets.Dataset(table).cast_column("image", datasets.Image())
    dataset.save_to_disk(root / "dataset")
    return root / "dataset"


def captions_table(root: Path) -> Path:
    source, out = make_folder(root / "archive", 12), root / "captions"
    pipeline.run(caption_config(source, out))
    return out


FORMS = {
    "jsonl": lambda root: make_folder(root, 12),
    "csv": folder_with_csv,
    "metadata-parquet": folder_with_parquet,
    "texts": folder_with_texts,
    "parquet-rows": parquet_with_a_row_for_each_caption,
    "webdataset": lambda root: make_tar(root / "scenes.tar", 12),
    "parquet": lambda root: make_parquet(root / "scenes.parquet", 12),
    "dataset": saved_dataset,
    "captions-table": captions_table,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_source_gives_its_pairs(tmp_path: Path, form: str) -> None:
    pairs = pairs_of(path=str(FORMS[form](tmp_path)), eval_fraction=0.25)

    assert {name: len(table) for name, table in pairs.tables.items()} == {"train": 9, "eval": 3}
    assert all(row["reference_captions"] and len(row["sha256"]) == 64 for row in rows_of(pairs))
    assert "background" in pairs.tables["train"].to_pylist()[0]["reference_captions"][0]
    assert pairs.skipped == {}


def test_unusable_images_are_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    root = make_folder(tmp_path, 12)
    (root / "000003.png").write_bytes(b"no image")
    (root / "000004.png").write_bytes(b"")
    (root / "000005.png").unlink()
    shutil.copy(make_folder(tmp_path.with_name("other"), 1, seed=9) / "000000.png", root / "without.png")

    pairs = pairs_of(path=str(root), max_failed=0.5)

    assert pairs.skipped == {"not_an_image": 1, "empty_file": 1, "no_caption": 1}
    assert len(rows_of(pairs)) == 9
    assert any(line.startswith("without.png: no_caption") for line in pairs.examples)


def test_an_image_that_crashes_its_decoder_costs_one_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in decoder_faults().items():
        monkeypatch.setenv(name, value)
    root = make_folder(tmp_path, 6)
    with (root / "000003.png").open("ab") as file:
        file.write(ABORT_MARKER)

    # Decoders of processes without the faults are kept: another limit needs a decoder of its own.
    pairs = pairs_of(path=str(root), max_failed=0.5, max_pixels=10**6)

    assert pairs.skipped == {"decoder_crashed": 1}
    assert len(rows_of(pairs)) == 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.sampled_from("abcd"), min_size=1, max_size=3)), min_size=1))
def test_joining_rows_keeps_each_caption_of_each_image_once(listed: list[tuple[int, list[str]]]) -> None:
    table = table_of([f"{image:064d}" for image, _ in listed])
    captions = pa.array([texts for _, texts in listed], pa.list_(pa.string()))
    index = table.schema.get_field_index("reference_captions")
    table = table.set_column(index, PAIRS_SCHEMA.field("reference_captions"), captions)

    joined = join_captions(table).to_pylist()

    expected: dict[str, dict[str, None]] = {}
    for image, texts in listed:
        expected.setdefault(f"{image:064d}", {}).update(dict.fromkeys(texts))
    assert [(row["sha256"], row["reference_captions"]) for row in joined] == [
        (sha, list(texts)) for sha, texts in expected.items()
    ]
    assert join_captions(join_captions(table)).equals(join_captions(table))


def test_too_many_unusable_images_are_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path, 5)
    (root / "000003.png").write_bytes(b"no image")

    with pytest.raises(SourceError, match=r"1 of 5 images unusable \(1 not_an_image\).*--max-failed"):
        pairs_of(path=str(root))


def test_images_without_captions_are_not_pairs(tmp_path: Path) -> None:
    root = make_folder(tmp_path, 3)
    (root / "metadata.jsonl").unlink()

    with pytest.raises(SourceError, match=r"no pairs: 3 images \(3 no_caption\)"):
        pairs_of(path=str(root))


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no images"):
        pairs_of(path=str(tmp_path))


def test_rows_of_one_image_are_one_image_with_several_captions(tmp_path: Path) -> None:
    table = pq.read_table(make_parquet(tmp_path / "scenes.parquet", 4))
    images = table["image"].to_pylist()
    images[3]["bytes"] = b"no image"
    index = table.schema.get_field_index("image")
    table = table.set_column(index, "image", pa.array(images, table.schema.field("image").type))
    table = table.drop_columns(["captions"])
    rows = pa.concat_tables([table, table]).append_column("caption", pa.array([f"caption {n}" for n in range(8)]))
    pq.write_table(rows, tmp_path / "scenes.parquet")

    pairs = pairs_of(path=str(tmp_path / "scenes.parquet"), id_column="id", eval_fraction=0.3, max_failed=0.5)

    assert sorted(row["reference_captions"] for row in rows_of(pairs)) == [
        ["caption 0", "caption 4"],
        ["caption 1", "caption 5"],
        ["caption 2", "caption 6"],
    ]
    assert pairs.skipped == {"not_an_image": 1}
    assert (pairs.num_listed, pairs.num_rows) == (4, 8)


def test_an_image_with_a_caption_in_another_row_is_not_unusable(tmp_path: Path) -> None:
    """One of an image's three rows has no caption; the last image has none in any of its rows."""
    table = pq.read_table(make_parquet(tmp_path / "scenes.parquet", 12)).drop_columns(["captions", "id"])
    captions = [None if n // 12 == 1 or n % 12 == 11 else f"caption {n}" for n in range(36)]
    rows = pa.concat_tables([table] * 3).append_column("caption", pa.array(captions, pa.string()))
    pq.write_table(rows, tmp_path / "scenes.parquet")

    pairs = pairs_of(path=str(tmp_path / "scenes.parquet"))

    assert pairs.skipped == {"no_caption": 1}
    assert (pairs.num_listed, pairs.num_rows, len(rows_of(pairs))) == (12, 36, 11)
    assert {len(row["reference_captions"]) for row in rows_of(pairs)} == {2}


def test_an_id_of_two_images_is_named(tmp_path: Path) -> None:
    table = pq.read_table(make_parquet(tmp_path / "scenes.parquet", 3))
    ids = pa.array(["scene-0", "scene-1", "scene-1"])
    table = table.set_column(table.schema.get_field_index("id"), "id", ids)
    pq.write_table(table, tmp_path / "scenes.parquet")

    with pytest.raises(SourceError, match="'scene-1' occurs more than once, with different images"):
        pairs_of(path=str(tmp_path / "scenes.parquet"), id_column="id")


@pytest.mark.parametrize(("prompt", "num_truncated"), [("", 1), ("a", 1), ("a small red", 2)])
def test_captions_longer_than_the_model_allows_after_the_prompt_are_counted(
    tmp_path: Path, prompt: str, num_truncated: int
) -> None:
    root = make_folder(tmp_path, 4)
    (root / "metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": f"{index:06d}.png", "captions": ["a ring", "a ring " * index]}) + "\n"
            for index in range(4)
        )
    )

    assert pairs_of(7, prompt, path=str(root), eval_fraction=0.3).num_truncated == num_truncated
    elsewhere = replace(MODEL, path="/gone")  # as of a machine that resolved the model
    assert pairs_of(7, prompt, path=str(root), eval_fraction=0.3, model=elsewhere).num_truncated == num_truncated


def test_an_eval_set_of_zero_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the eval set is empty"):
        pairs_of(path=str(make_folder(tmp_path, 1)), eval_fraction=0.5)


def test_eval_images_are_removed_from_training_images(tmp_path: Path) -> None:
    train, held_out = make_folder(tmp_path / "train", 10), make_folder(tmp_path / "eval", 3, seed=9)
    shutil.copy(train / "000004.png", held_out / "000000.png")

    pairs = pairs_of(path=str(train), eval_data=str(held_out))

    assert {name: len(table) for name, table in pairs.tables.items()} == {"train": 9, "eval": 3}
    assert pairs.skipped == {"also_in_another_split": 1}


def test_separate_eval_and_test_images_are_in_one_set_each(tmp_path: Path) -> None:
    """The last eval images are copies of the first test images, and count as test images."""
    roots = [make_folder(tmp_path / name, 8, seed=seed) for name, seed in (("train", 1), ("eval", 2), ("test", 3))]
    for number in range(3):
        shutil.copy(roots[2] / f"00000{number}.png", roots[1] / f"00000{5 + number}.png")

    pairs = pairs_of(path=str(roots[0]), eval_data=str(roots[1]), test_data=str(roots[2]))

    sides = {name: set(table["sha256"].to_pylist()) for name, table in pairs.tables.items()}
    assert {name: len(side) for name, side in sides.items()} == {"train": 8, "eval": 5, "test": 8}
    assert not sides["eval"] & sides["test"]
    assert pairs.skipped == {"also_in_another_split": 3}


def test_an_empty_set_of_its_own_data_is_an_error_that_says_why(tmp_path: Path) -> None:
    train, held_out, damaged = (make_folder(tmp_path / name, 8, seed=n) for n, name in enumerate(("a", "b", "c")))
    for file in damaged.glob("*.png"):
        file.write_bytes(b"x")
    paths = {"path": str(train), "eval_data": str(held_out)}

    with pytest.raises(
        UsageError, match=r"the eval set is empty: --eval-data .*b: every one of its images is in the test"
    ):
        pairs_of(test_data=str(held_out), **paths)
    with pytest.raises(UsageError, match=r"the test set is empty: --test-data .*c: none of its images can be used"):
        pairs_of(test_data=str(damaged), max_failed=0.5, **paths)


def test_max_eval_samples_takes_the_same_images_each_time(tmp_path: Path) -> None:
    root = str(make_folder(tmp_path, 40))
    whole = pairs_of(path=root, eval_fraction=0.5).tables["eval"]["image_id"].to_pylist()

    few = pairs_of(path=root, eval_fraction=0.5, max_eval_samples=5).tables["eval"]["image_id"].to_pylist()

    assert len(few) == 5
    assert set(few) < set(whole)
    assert few == pairs_of(path=root, eval_fraction=0.5, max_eval_samples=5).tables["eval"]["image_id"].to_pylist()


@settings(max_examples=60, deadline=None)
@given(
    shas=st.lists(st.integers(0, 30), min_size=4, max_size=60).filter(lambda many: len(set(many)) >= 4),
    eval_fraction=st.floats(0.05, 0.5),
    test_fraction=st.one_of(st.just(0.0), st.floats(0.05, 0.3)),
    seed=st.integers(0, 5),
)
def test_no_image_and_no_copy_of_it_is_in_two_sets(shas, eval_fraction, test_fraction, seed) -> None:
    table = table_of([f"{sha:064d}" for sha in shas])
    config = TrainDataConfig(eval_fraction=eval_fraction, test_fraction=test_fraction)

    tables = split(table, config, seed)

    sides = {name: set(part["sha256"].to_pylist()) for name, part in tables.items()}
    assert sum(map(len, tables.values())) == len(table)
    assert sum(map(len, sides.values())) == len(set(shas))
    assert len(sides["eval"]) == max(1, round(eval_fraction * len(set(shas))))
    assert split(table.take(list(reversed(range(len(table))))), config, seed)["eval"]["sha256"].to_pylist() == list(
        reversed(tables["eval"]["sha256"].to_pylist())
    )


def table_of(shas: list[str]) -> pa.Table:
    count = len(shas)
    values = {
        "image_id": [f"image-{number}" for number in range(count)],
        "file": [b"x"] * count,
        "reference_captions": [["a ring"]] * count,
        "data": [0] * count,
        "sha256": shas,
        "num_truncated": [0] * count,
        "error_code": [""] * count,
        "error_message": [""] * count,
    }
    columns = [values.get(field.name, [None] * count) for field in PAIRS_SCHEMA]
    return pa.table([pa.array(v, f.type) for v, f in zip(columns, PAIRS_SCHEMA, strict=True)], schema=PAIRS_SCHEMA)


def test_an_image_that_has_changed_or_gone_since_the_pairs_were_fixed_is_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path, 3)
    pairs = pairs_of(path=str(root)).tables["train"]
    decode = Decode(open_pair_sources(TrainDataConfig(path=str(root))), SPEC)
    assert len(decode(pairs)) == 2
    file = root / pairs["image_id"][0].as_py()

    shutil.copyfile(root / pairs["image_id"][1].as_py(), file)
    with pytest.raises(SourceError, match=f"{file.name}: is another image than when the pairs were fixed; restore it"):
        decode(pairs)
    file.unlink()
    with pytest.raises(SourceError, match=f"{file.name}: could be read before and cannot now"):
        decode(pairs)
