"""Images are decoded once: later epochs take their pixels from the disk, and never from a damaged file."""

import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.config import ModelConfig, TrainDataConfig
from captioner.data import PixelSpec
from captioner.models import resolve
from captioner.testing import make_folder
from captioner.training.collate import Decode, pixels_of
from captioner.training.pair_sources import PairSources, list_pairs, open_pair_sources
from captioner.training.pairs import Examine
from captioner.training.pixel_cache import PixelCache

SPEC = PixelSpec(32, 24)
SPECS = [SPEC, PixelSpec(64, 64, resize="own_edge", limit=64, multiple=8)]
MODEL = resolve(ModelConfig(name="starter"))
SHA256 = "ab" * 32


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def open_pairs(data: Path, spec: PixelSpec, cache: PixelCache) -> tuple[PairSources, pa.Table]:
    """Return the examined pairs of a folder, whose pixels are in the cache from then on."""
    sources = open_pair_sources(TrainDataConfig(path=str(data)))
    (rows,) = map(Examine(sources, replace(MODEL, spec=spec), cache), list_pairs(sources, None))
    captions = [texts[0] for texts in rows["reference_captions"].to_pylist()]
    return sources, rows.append_column("caption", pa.array(captions))


def same(left: pa.Table, right: pa.Table, spec: PixelSpec) -> bool:
    pairs = zip(pixels_of(left, spec), pixels_of(right, spec), strict=True)
    return all(np.array_equal(pixels, other) for pixels, other in pairs)


@pytest.mark.parametrize("spec", SPECS, ids=["fixed", "variable"])
def test_images_that_were_examined_are_not_decoded_again_and_have_the_same_pixels(tmp_path: Path, spec) -> None:
    cache = PixelCache("run", 10**8)
    sources, rows = open_pairs(make_folder(tmp_path / "data", 5), spec, cache)
    decoded = Decode(sources, spec)(rows)

    shutil.rmtree(tmp_path / "data")

    assert same(Decode(sources, spec, cache)(rows), decoded, spec)
    cache.remove()
    assert not cache.folder.exists()


def test_an_image_whose_entry_is_damaged_is_decoded_again(tmp_path: Path) -> None:
    cache = PixelCache("run", 10**8)
    sources, rows = open_pairs(make_folder(tmp_path / "data", 4), SPEC, cache)
    decoded = Decode(sources, SPEC)(rows)
    cut, flipped, foreign = sorted(cache.folder.glob("*-*"))[:3]
    cut.write_bytes(cut.read_bytes()[:-1])
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x07")
    foreign.write_bytes(b"")

    for _ in range(2):
        assert same(Decode(sources, SPEC, cache)(rows), decoded, SPEC)
    assert all(cache.read(sha256, SPEC) is not None for sha256 in rows["sha256"].to_pylist())


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_no_changed_byte_of_an_entry_goes_unnoticed(height: int, width: int, data: st.DataObject) -> None:
    cache, pixels = PixelCache("run", 10**6), np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    cache.write(SHA256, SPEC, pixels)
    entry = next(cache.folder.glob("*-*"))
    written = entry.read_bytes()
    assert np.array_equal(cache.read(SHA256, SPEC), pixels)

    index, change = data.draw(st.integers(0, len(written) - 1)), data.draw(st.integers(1, 255))
    entry.write_bytes(written[:index] + bytes([written[index] ^ change]) + written[index + 1 :])

    assert cache.read(SHA256, SPEC) is None
    entry.unlink()


def test_the_cache_takes_no_more_than_its_size_and_other_fittings_have_other_entries(tmp_path: Path) -> None:
    cache, pixels = PixelCache("run", 10_000), np.zeros((32, 24, 3), np.uint8)

    for number in range(9):
        cache.write(f"{number:064x}", SPEC, pixels)

    entries = list(cache.folder.glob("*-*"))
    assert len(entries) == 4
    assert sum(entry.stat().st_size for entry in entries) <= 10_000
    assert cache.read(f"{0:064x}", SPEC) is not None
    assert cache.read(f"{0:064x}", SPECS[1]) is None


@pytest.mark.parametrize("content", [b"\0\0\0\0\0", b"", b"12", b"9" * 21])
def test_a_damaged_count_of_used_bytes_is_made_again_and_the_limit_kept(content: bytes) -> None:
    cache, pixels = PixelCache("run", 10_000), np.zeros((32, 24, 3), np.uint8)
    for number in range(2):
        cache.write(f"{number:064x}", SPEC, pixels)
    (cache.folder / "used").write_bytes(content)

    for number in range(2, 9):
        cache.write(f"{number:064x}", SPEC, pixels)

    assert len(list(cache.folder.glob("*-*"))) == 4
    assert int((cache.folder / "used").read_bytes()) == sum(e.stat().st_size for e in cache.folder.glob("*-*"))


def test_a_run_removes_what_another_left_a_day_ago() -> None:
    caches, pixels = [PixelCache(run, 10_000) for run in ("old", "recent", "new")], np.zeros((2, 2, 3), np.uint8)
    for cache in caches[:2]:
        cache.write(SHA256, SPEC, pixels)
    day_ago = time.time() - 25 * 3600
    os.utime(caches[0].folder / "used", (day_ago, day_ago))

    caches[2].write(SHA256, SPEC, pixels)

    assert [cache.folder.exists() for cache in caches] == [False, True, True]


def test_a_folder_that_others_can_write_to_is_not_used(temporary_folder: Path) -> None:
    cache = PixelCache("run", 10_000)
    cache.folder.parent.mkdir()
    cache.folder.parent.chmod(0o777)

    cache.write(SHA256, SPEC, np.zeros((2, 2, 3), np.uint8))

    assert list(cache.folder.parent.rglob("*-*")) == []


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="a size, such as 4GB or 500MB"):
        TrainDataConfig(pixel_cache="much")
