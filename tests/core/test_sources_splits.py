"""Splits of a dataset's clone: files are of the split that `datasets` would put them in."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from helpers import caption_config, listed_rows, source_at, train_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from captioner.errors import SourceError, UsageError
from captioner.run.job import plan_images
from captioner.sources import describe, reopen_source
from captioner.sources.root import Root
from captioner.sources.splits import splits_of
from captioner.store.table import open_table
from captioner.testing import make_folder, make_parquet, make_tar
from captioner.training.pair_sources import list_pairs, open_pair_sources

LAYOUTS = {
    "push_to_hub": "data/{}-00000-of-00001.parquet",
    "several shards": "{}-00000-of-00005.parquet",
    "file": "{}.parquet",
    "part of a name": "my_{}_file_1.parquet",
    "folder": "{}/0000.parquet",
    "convert branch": "default/{}/0000.parquet",
    "folder of folders": "{}/part/shard_0001.parquet",
    "tars": "data/{}-00000-of-00001.tar",
}


def make_clone(path: Path, layout: str, *splits: str) -> Path:
    for number, split in enumerate(splits):
        file = path / LAYOUTS[layout].format(split)
        (make_tar if file.suffix == ".tar" else make_parquet)(file, 2 + number, seed=number)
    (path / "README.md").write_text("# A dataset")
    return path


def num_images(path: Path, **flags: object) -> int:
    return listed_rows(source_at(path, **flags)).num_rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_is_followed_in_every_layout(tmp_path: Path, layout: str) -> None:
    make_clone(tmp_path, layout, "train", "test")

    assert num_images(tmp_path, split="train") == 2
    assert num_images(tmp_path, split="test") == 3
    assert num_images(tmp_path, split="all") == 5
    assert num_images(tmp_path) == 2
    assert "split 'train', 1 of 2 files; left out are the files of test (1), which --split all takes" in describe(
        source_at(tmp_path)
    )
    with pytest.raises(SourceError, match="no split 'dev'; choose one of train, test with --split"):
        source_at(tmp_path, split="dev")


def test_without_the_flag_nothing_is_left_out_of_files_without_splits(tmp_path: Path) -> None:
    make_clone(tmp_path, "file", "train", "more")
    assert num_images(tmp_path) == 5
    assert num_images(tmp_path, split="train") == 2
    assert num_images(make_clone(tmp_path / "b", "file", "test", "validation")) == 5


def test_split_is_refused_where_no_name_says_one(tmp_path: Path) -> None:
    make_parquet(tmp_path / "t/0.parquet", 1)
    with pytest.raises(UsageError, match=r"--split train: no file name in .* says a split"):
        source_at(tmp_path / "t", split="train")
    make_folder(tmp_path / "images", 1)
    with pytest.raises(UsageError, match=r"--split train: .* is a folder of images; choose images with --include"):
        source_at(tmp_path / "images", split="train")


@pytest.mark.parametrize(
    "data_files",
    [
        "data_files: [{split: train, path: a/*.parquet}, {split: extra, path: [b/0.parquet, 'c/**']}]",
        "default: true\n  data_files:\n  - split: extra\n    path: '[bc]/**'\n  - split: train\n    path: a/0.parquet",
    ],
)
def test_splits_that_the_readme_configures(tmp_path: Path, data_files: str) -> None:
    for number, folder in enumerate("abc"):
        make_parquet(tmp_path / folder / "0.parquet", 1 + number)
    readme = f"---\nlicense: mit\nconfigs:\n- config_name: x\n  {data_files}\n---\n# A dataset\n"
    (tmp_path / "README.md").write_text(readme)

    assert num_images(tmp_path, split="extra") == 5
    assert num_images(tmp_path) == 1


def test_brackets_in_the_globs_of_a_readme_are_those_of_globs(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "test", "train")):
        make_parquet(tmp_path / "data" / f"{name}.parquet", 1 + number)
    globs = (
        "[{split: train, path: 'data/[!t]*'}, {split: test, path: 'data/te[!a-r]t*'}, {split: none, path: '[z-a]*'}]"
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: x\n  data_files: {globs}\n---\n")

    assert num_images(tmp_path, split="train") == 1
    assert num_images(tmp_path, split="test") == 2


@pytest.mark.parametrize(
    "readme", ["---\nconfigs: 3\n---", "---\n[: \n---", "---\nconfigs: [{data_files: 4}]\n---", ""]
)
def test_a_readme_of_something_else_changes_nothing(tmp_path: Path, readme: str) -> None:
    make_clone(tmp_path, "push_to_hub", "train", "test")
    (tmp_path / "README.md").write_text(readme)
    assert num_images(tmp_path) == 2


PARTS = st.text("trainevl-_. 0d", min_size=1, max_size=3)
WORDS = st.sampled_from(["train", "training", "test", "val", "dev", "eval", "validation", "trainer", "data", "x"])
NAMES = st.one_of(WORDS, st.builds("{}{}".format, WORDS, PARTS), st.builds("{}{}".format, PARTS, WORDS))
FOLDERS = NAMES.map(lambda name: name.strip(". ")).filter(bool)
FILES = st.one_of(
    st.builds("{}.parquet".format, NAMES),
    st.builds("{}/{}.parquet".format, FOLDERS, NAMES),
    st.builds("data/{}-0000{}-of-00009.parquet".format, WORDS, st.integers(0, 9)),
)


@example(files={"__train/train.parquet"})
@example(files={"__train/train.parquet", "train.parquet", "__test.parquet"})
@given(files=st.sets(FILES.filter(lambda file: "/." not in f"/{file}"), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_files_are_of_the_split_that_datasets_puts_them_in(files: set[str]) -> None:
    data_files = pytest.importorskip("datasets.data_files")
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            Path(folder, file).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, file).touch()
        try:
            patterns = data_files.get_data_patterns(folder)
        except data_files.EmptyDatasetError:  # all are below folders of no data
            patterns = {}
        resolved = {
            split: {path for pattern in of_split for path in resolve(data_files, pattern, folder)}
            for split, of_split in patterns.items()
        }
    splits = splits_of(Root.at(folder), [os.fsencode(file) for file in sorted(files)])
    ours = {split: {os.fsdecode(file) for file in of_split} for split, of_split in splits.items()}
    if not ours:  # `datasets` then has one split of everything
        assert set().union(*resolved.values()) == {file for file in files if "/__" not in f"/{os.path.dirname(file)}"}
        assert resolved.keys() <= {"train"}
    # `datasets` puts a file in two splits where folder and name, or two words of a name, differ; here it has one.
    assert set().union(*ours.values()) == set().union(*resolved.values()) or not ours
    assert all(of_split <= resolved[split] for split, of_split in ours.items())


def resolve(data_files, pattern: str, folder: str) -> set[str]:
    try:
        return {os.path.relpath(path, folder) for path in data_files.resolve_pattern(pattern, folder)}
    except FileNotFoundError:
        return set()


@pytest.mark.parametrize(("split", "num_pairs"), [(None, 2), ("test", 3)])
def test_training_follows_the_split(tmp_path: Path, split: str | None, num_pairs: int) -> None:
    make_clone(tmp_path / "clone", "push_to_hub", "train", "test")
    config = train_config(tmp_path / "clone", tmp_path / "run", groups={"data": {"split": split}})
    assert sum(len(rows) for rows in list_pairs(open_pair_sources(config.data), None)) == num_pairs


def test_a_flag_that_only_another_source_of_the_run_takes_is_no_error(tmp_path: Path) -> None:
    make_clone(tmp_path / "clone", "push_to_hub", "train", "test")
    make_folder(tmp_path / "eval", 4)
    data = {"split": "test", "eval_data": str(tmp_path / "eval")}
    config = train_config(tmp_path / "clone", tmp_path / "run", groups={"data": data})
    assert sum(len(rows) for rows in list_pairs(open_pair_sources(config.data), None)) == 3 + 4


def test_a_table_of_an_earlier_version_has_a_split_whatever_its_source_is(tmp_path: Path) -> None:
    archive, out = make_folder(tmp_path / "archive", 2), tmp_path / "out"
    plan_images(caption_config(archive, out), lambda line: None)
    table = open_table(str(out))
    table = table.update(source=table.info["source"] | {"split": "train"})

    plan_images(caption_config(archive, out), lambda line: None)
    assert reopen_source(table.info["source"]).name == str(archive)
    config = train_config(out, tmp_path / "run", groups={"data": {"split": "train"}})
    with pytest.raises(UsageError, match=r"--split: .* is a captions table"):
        open_pair_sources(config.data)
