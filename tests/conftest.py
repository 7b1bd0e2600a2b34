"""Shared by all tests."""

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import caption_config

from captioner import pipeline
from captioner.config import AltTextConfig
from captioner.console import phases
from captioner.publishing.alt_text.command import make_alt_texts
from captioner.store.table import open_table
from captioner.testing import make_folder

# GPU kernels are tested by Triton's interpreter; it has to know before torch first imports triton.
os.environ.setdefault("TRITON_INTERPRET", "1")
# No test needs a network, also where pytest is called without make.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# How long an example takes says nothing on a machine that does other work as well.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

# The files whose tests take longest, begun first: else one process of `pytest -n 2` ends long after the other.
# fmt: off
SLOWEST = [
    "test_models_families", "test_training_run", "test_storage_faults", "test_damage", "test_resume",
    "test_models_convert", "test_decoder_faults", "test_training_families", "test_fuzz_table", "test_judging",
    "test_check", "test_models_check", "test_scale", "test_git_fast", "test_triton_network", "test_package",
    "test_models_captions", "test_endpoint_serve", "test_training_options", "test_review_page",
]
# fmt: on


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the garbage collector from searching the half a million objects that collection makes and keeps."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(SLOWEST)))


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # C extensions complain of objects that live longer than they


MakeReviewable = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> Iterator[None]:
    """Let tests and their child processes get Ctrl-C, which a shell ignores for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def no_lines_about_waiting() -> Iterator[None]:
    """Say nothing of what this process waits for: on a slow machine such lines were among those that tests expect."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "INTERVAL_S", 3600.0)
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `archive`, 30 images, and `out`, their finished table."""
    root = tmp_path_factory.mktemp("finished")
    assert pipeline.run(caption_config(make_folder(root / "archive", 30), root / "out", rows_per_file=100)) == 0
    return root


@pytest.fixture
def make_reviewable(finished: Path, tmp_path: Path) -> MakeReviewable:
    """Makes `tmp_path/out`, a finished table with alt texts, of `tmp_path/archive`.

    `captions`, `logprobs`, `flags`, `errors`: of its first images, by their number; the others keep "image CRC".
    """

    def make(
        captions: Sequence[str | None] = (),
        logprobs: Sequence[float] = (),
        flags: Sequence[list[str]] = (),
        errors: Sequence[str] = (),
        alt_text: AltTextConfig | None = None,
    ) -> Path:
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
        out = tmp_path / "out"
        (part,) = (out / "captions").iterdir()
        rows = pq.read_table(part)
        given = {"caption": captions, "logprob_mean": logprobs, "flags": flags, "error_code": errors}
        for name, values in given.items():
            column = [*values, *rows[name].to_pylist()[len(values) :]]
            rows = rows.set_column(
                rows.schema.get_field_index(name),
                rows.schema.field(name),
                pa.array(column, rows.schema.field(name).type),
            )
        pq.write_table(rows, part)
        table = open_table(str(out))
        table = table.update(source=table.info["source"] | {"path": str(tmp_path / "archive")})
        make_alt_texts(table, alt_text or AltTextConfig())
        return out

    return make
