"""Google Cloud Storage as pyarrow lists it: files, and no folders. Nothing of an archive or a table is missed there."""

from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers import caption_config

from captioner import pipeline
from captioner.sources.root import Root
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder


class FlatFileSystem(MemoryFileSystem):
    """fsspec's memory as flat://, whose listings name no folder."""

    protocol = "flat"
    store: dict = {}  # noqa: RUF012

    def ls(self, path, detail=True, **options):
        files = [file for file in super().ls(path, detail=True, **options) if file["type"] == "file"]
        return files if detail else [file["name"] for file in files]

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **options):
        root = self._strip_protocol(path)
        files = {name: self.info(name) for name in sorted(self.store) if name.startswith(f"{root}/")}
        return files if detail else list(files)


def test_an_archive_and_a_table_without_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("flat", FlatFileSystem, clobber=True)
    archive = make_folder(tmp_path / "archive", 6)
    store = fsspec.filesystem("flat")
    source, out = f"flat://bucket{tmp_path}/in", f"flat://bucket{tmp_path}/out"
    for number, file in enumerate(sorted(archive.glob("*.png"))):
        store.pipe_file(f"{source}/{'sub/' * (number % 3)}{file.name}", file.read_bytes())
    monkeypatch.setattr(Root, "without_folders", ("py::fsspec+flat",))

    assert pipeline.run(caption_config(source, out)) == 0

    verification = verify(open_table(out))
    assert verification.proven
    assert verification.counts.ok == 6

    store.pipe_file(f"{out}/overwrite/table.json", b"{}")  # of an overwrite that was killed
    assert pipeline.run(caption_config(source, out, source={"limit": 4}, overwrite=True)) == 0
    assert (verify(open_table(out)).proven, verify(open_table(out)).counts.ok) == (True, 4)
    assert [name for name in FlatFileSystem.store if "overwrite" in name.removeprefix(f"/bucket{tmp_path}")] == []
