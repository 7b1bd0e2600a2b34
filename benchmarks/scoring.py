"""What checking a table costs: rows a second and memory, for a sample and for every row.

    python -m benchmarks.scoring [--small 100000] [--large 1000000]

Writes captions tables of synthetic captions with two references each, without pictures, and runs the check that ends a
caption run (500 rows scored, all rows surveyed and flagged) and the check of every row (`--sample all`), each in a
process of its own. The last line is one JSON object:

    rows_per_second    of each check, at each size
    peak_uss_mb        private memory of the process, its peak
    growth             peak at the large size / peak at the small one
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime

import pyarrow as pa

ROWS_PER_PART, ROWS_PER_CHUNK = 50_000, 500


def make_table(out: str, count: int) -> None:
    """A published table of `count` captioned rows; nearly all captions differ."""
    from captioner.starter.scenes import COLOURS, SHAPES
    from captioner.store.creating import create_table
    from captioner.store.table import captions_name, plan_folder, published_name

    table = create_table(out, {"path": "/nowhere"}, [])
    rng = random.Random(0)
    words = [*COLOURS, *SHAPES, "small", "large", "left", "right", "above", "dog", "cat", "table", "grass", "man"]
    parts = {}
    for part, first in enumerate(range(0, count, ROWS_PER_PART)):
        rows = min(ROWS_PER_PART, count - first)
        parts[str(part)] = rows
        texts = ["a " + " ".join(rng.choices(words, k=10)) + " on the table" for _ in range(rows)]
        table.directory.write_table(captions_name(part), _rows(table.schema, part, first, texts, rng))
    plan = {
        "kind": "archive",
        "rows_per_chunk": ROWS_PER_CHUNK,
        "parts": parts,
        "num_ignored": 0,
        "ignored_examples": [],
    }
    table.directory.write_json(f"{plan_folder(0)}/plan.json", plan)
    table.directory.write_json(published_name(0), {"files": {}})


def _rows(schema: pa.Schema, part: int, first: int, texts: list[str], rng: random.Random) -> pa.Table:
    count = len(texts)
    references = [[text.replace("a ", "one ", 1), text.replace("table", "grass")] for text in texts]
    columns: dict[str, list[object]] = {
        "image_id": [f"images/{first + number:09d}.jpg" for number in range(count)],
        "uri": [""] * count,
        "sha256": [f"{first + number:064x}" for number in range(count)],
        "status": ["ok"] * count,
        "caption": texts,
        "num_tokens": [14] * count,
        "logprob_mean": [-abs(rng.gauss(0, 0.5)) for _ in range(count)],
        "flags": [[] for _ in range(count)],
        "reference_captions": references,
        "model": ["none"] * count,
        "model_sha256": [""] * count,
        "fingerprint": [""] * count,
        "generation": [0] * count,
        "run_id": [""] * count,
        "chunk_id": [f"g000-{part:05d}-{number // ROWS_PER_CHUNK:04d}" for number in range(count)],
        "chunk_row": [number % ROWS_PER_CHUNK for number in range(count)],
        "created_at": [
            datetime.fromtimestamp(1_700_000_000 + (first + number) // ROWS_PER_CHUNK, UTC) for number in range(count)
        ],
    }
    arrays = [pa.array(columns.get(field.name, [None] * count), field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def measure(out: str, sample: str) -> dict[str, float]:
    """Check one table in this process."""
    import psutil

    from captioner.config import CheckConfig
    from captioner.run import quality
    from captioner.store.table import open_table

    stop, peak, process = threading.Event(), [0], psutil.Process()

    def watch() -> None:
        while not stop.wait(0.2):
            peak[0] = max(peak[0], process.memory_full_info().uss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    started = time.perf_counter()
    report = quality.check(open_table(out), CheckConfig.model_validate({"sample": sample}))
    seconds = time.perf_counter() - started
    stop.set()
    thread.join()
    rows = report.survey.num_rows
    return {
        "rows": rows,
        "scored": report.scores.num_rows,
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds),
        "peak_uss_mb": round(peak[0] / 1e6),
    }


def in_own_process(out: str, sample: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scoring", "--measure", out, sample]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result: dict[str, float] = json.loads(shown.splitlines()[-1])
    print(result, file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", type=int, default=100_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--measure", nargs=2, metavar=("OUT", "SAMPLE"))
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("small", "large"):
            make_table(f"{folder}/{name}", getattr(options, name))
        for sample in ("500", "all"):
            small, large = (in_own_process(f"{folder}/{name}", sample) for name in ("small", "large"))
            growth = round(large["peak_uss_mb"] / small["peak_uss_mb"], 2)
            results[f"sample {sample}"] = {"small": small, "large": large, "growth": growth}
    print(json.dumps(results | {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()}))


if __name__ == "__main__":
    main()
