"""What tests of several files need: a Ray that starts, settings of runs, the rows of a table, what a source lists."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import pyarrow as pa

from captioner.config import CaptionConfig, SourceConfig, TrainConfig
from captioner.data import PLAN_SCHEMA, Source
from captioner.sources import open_source
from captioner.store.read import read_parts
from captioner.store.table import open_table
from captioner.testing.tiny_chat_models import TINY_CHATS
from captioner.testing.tiny_parts import END, PAD

Settings = Mapping[str, Any]
DEFAULTS: Settings = MappingProxyType({})


STARTED_WITHIN_S = 600.0
REPORTS_EVERY_S = 3  # how often the processes of a head report their metrics, which costs CPU; by default 10


@contextmanager
def ray_start_lock() -> Iterator[None]:
    """Wait until no other process of this user starts a Ray: each has a limited time, and they would share the CPU."""
    with open(f"{tempfile.gettempdir()}/captioner-ray-starts-{os.getuid()}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, also by SIGKILL
        yield


def started_in_time(start: Callable[[], object], clean_up: Callable[[], object]) -> None:
    """Start a Ray, again where it fails: each node has 30 s to join it, which a busy machine may not have.

    Ray leaves the processes of a node that did not join until this process ends; each would slow the next start.
    """
    with ray_start_lock():
        deadline, own = time.monotonic() + STARTED_WITHIN_S, psutil.Process()
        others = set(own.children(recursive=True))
        while True:
            try:
                start()
                return
            except Exception:
                if time.monotonic() > deadline:
                    raise
                clean_up()
                for left in set(own.children(recursive=True)) - others:
                    with suppress(psutil.NoSuchProcess):
                        left.kill()


def caption_config(
    archive: Path | str,
    out: Path | str,
    /,
    *,
    source: Settings = DEFAULTS,
    model: Settings = DEFAULTS,
    cluster: Settings = DEFAULTS,
    check: Settings = DEFAULTS,
    **output: Any,
) -> CaptionConfig:
    """Return the settings of a run with the fake model and 16 rows in a file.

    `source`, `model`, `cluster`, `check`, `output`: settings that differ from these.
    """
    return CaptionConfig.model_validate(
        {
            "source": {"path": str(archive), **source},
            "model": {"name": "fake", **model},
            "cluster": cluster,
            "check": check,
            "output": {"path": str(out), "rows_per_file": 16, **output},
        }
    )


def train_config(
    data: Path | str,
    out: Path | str,
    model: Path | str = "starter",
    groups: dict[str, Settings] | None = None,
    max_new_tokens: int = 24,
    **training: Any,
) -> TrainConfig:
    """Return the settings of a short training run. `groups`: settings that differ in other groups than `training`."""
    training = {"per_device_train_batch_size": 8, "max_steps": 4, "logging_steps": 1} | training
    tree = {
        "data": {"path": str(data), "eval_fraction": 0.2},
        "model": {"name": str(model), "max_new_tokens": max_new_tokens},
        "training": training,
        "output": {"path": str(out)},
    }
    for name, settings in (groups or {}).items():
        tree[name] = tree.get(name, {}) | dict(settings)
    return TrainConfig.model_validate(tree)


def training_losses(out: Path) -> list[float]:
    """Return the training losses in the history of a finished run."""
    history = json.loads((out / "history.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def rows_of(out: Path | str) -> list[dict[str, Any]]:
    """Return the current rows of a table, in order."""
    return pa.concat_tables(read_parts(open_table(str(out)))).to_pylist()


def contents(out: Path | str) -> list[dict[str, Any]]:
    """Return the rows of a table without the columns that differ from run to run."""
    return [
        {name: value for name, value in row.items() if name not in ("run_id", "created_at")} for row in rows_of(out)
    ]


def source_at(path: Path | str, **settings: Any) -> Source:
    return open_source(SourceConfig(path=str(path), **settings))


def listed(source: Source) -> tuple[pa.Table, list[str]]:
    """Return all rows that a source lists, and the names that it ignores."""
    listings = [listing for unit in source.units() for listing in source.list_unit(unit)]
    rows = pa.concat_tables([listing.rows for listing in listings] or [PLAN_SCHEMA.empty_table()])
    return rows, [name for listing in listings for name in listing.ignored]


def listed_rows(source: Source) -> pa.Table:
    return listed(source)[0]


def use_t5(directory: Path) -> Path:
    """Replace the text decoder of a tiny BLIP-2, an OPT, by a T5 with random weights; return the directory."""
    import torch
    from transformers import Blip2ForConditionalGeneration, T5Config

    tiny = Blip2ForConditionalGeneration.from_pretrained(directory)
    ids = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD, "vocab_size": 385}
    text = T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0, **ids)
    settings = tiny.config.to_dict() | {"text_config": text.to_dict()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Blip2ForConditionalGeneration(type(tiny.config).from_dict(settings))
    model.save_pretrained(directory)
    return directory


def chats_to_test() -> tuple[str, ...]:
    """Return the chat model types to test: some of each kind of processor; with ALL_FAMILIES (`make families`) all."""
    sample = "qwen3_vl", "gemma3", "llava", "internvl", "vipllava", "paligemma"
    return tuple(TINY_CHATS) if "ALL_FAMILIES" in os.environ else sample


def with_few_references(archive: Path, count: int = 5) -> Path:
    """Keep the captions of the first images only, since scoring all would take half of the time of a run."""
    metadata = archive / "metadata.jsonl"
    metadata.write_text("".join(metadata.read_text().splitlines(keepends=True)[:count]))
    return archive


# Pages in a browser

READY = "#card[data-state=ready][data-image]:not([data-image=loading])"  # an image, or why there is none


def violations(page: Any) -> list[str]:
    """Return in words what axe-core finds against WCAG 2.2 A and AA and its best practices."""
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate("Promise.all(document.getAnimations().map((one) => one.finished)).then(() => 0)")
    violations = Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {node['target']} {node['failureSummary']}"
        for violation in violations
        for node in violation["nodes"]
    ]


def press_and_wait(page: Any, key: str) -> None:
    """Press a key that decides, and wait for the next image or the end."""
    shown = int(page.get_attribute("#card", "data-shown"))
    page.keyboard.press(key)
    page.wait_for_selector(f"#card[data-shown='{shown + 1}']", state="attached")
