"""A table of any size, everything real but pixels and model: what each command takes, and what it costs on a store.

    python -m benchmarks.scale --rows 1000000 [--out DIR] [--verbs plan,caption,...] [--s3]

The images exist in a listing only (`captioner.testing.synthetic`). Plan, chunks, receipts, publishing and all that
comes after are those of a run; each verb has a process of its own. `--s3`: OUT is on a server of this machine that
speaks S3 (moto), and requests are counted. The last line is one JSON object; for each verb

    seconds, rows_per_second   of its rows: those of the table, or those it adds
    peak_mb                    private memory (USS) of the process and its children together, the most at any time
    files, mb                  of OUT afterwards
    requests                   with --s3: LIST, GET, HEAD, PUT, POST (multipart uploads; bulk deletes apart), DELETE
    ...                        and what the verb itself measured
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

Facts = dict[str, Any]
KEEP = 0.9  # share of the chunks that the first run commits before it is stopped
# S3 Standard, us-east-1, list prices of November 2026 in dollars for 1,000 requests; deletes are free.
PRICES = {"LIST": 0.005, "PUT": 0.005, "POST": 0.005, "GET": 0.0004, "HEAD": 0.0004, "DELETE": 0.0, "BULK DELETE": 0.0}
TARGET_ROWS = 100_000_000


# --- the verbs: each takes OUT and the number of images, and returns what it measured itself ---------------------


def plan(out: str, rows: int) -> Facts:
    _run(out, rows, plan_only=True)
    return {}


def caption(out: str, rows: int) -> Facts:
    """Until KEEP of the chunks are committed, then stopped."""
    from captioner.errors import InterruptedRunError
    from captioner.store.table import open_table
    from captioner.testing.synthetic import InstantEngine

    num_chunks = open_table(out).plans()[0].num_chunks
    with contextlib.suppress(InterruptedRunError):
        _run(out, rows, InstantEngine(stop_after=int(KEEP * num_chunks)))
    return {"rows": int(KEEP * rows)}


def link(out: str, rows: int) -> Facts:
    """In place of `plan` and `caption`, where their time is not there: all parts hold the images of the first one.

    Published parts are links to one file: `status` and `restart` read none, only names, sizes, times and the record.
    """
    from dataclasses import replace

    from captioner.errors import InterruptedRunError
    from captioner.store.table import captions_name, open_table, plan_part_mark, plan_part_name
    from captioner.testing.synthetic import InstantEngine

    rows_per_part = 50_176
    with contextlib.suppress(InterruptedRunError):
        _run(out, 2 * rows_per_part, InstantEngine(stop_after=rows_per_part // 512))
    table = open_table(out)
    directory, (plan,), (file,) = table.directory, table.plans(), table.files_so_far(0).values()
    parts = range(rows // rows_per_part)
    published = range(int(KEEP * len(parts)))
    rows_of_part = directory.read_table(plan_part_name(0, 0))
    for part in parts[1:]:
        name = plan_part_name(0, part)
        marked = rows_of_part.replace_schema_metadata(plan_part_mark(table, name))
        directory.write_table(name, marked, plan.rows_per_chunk)
    table.write_plan(replace(plan, parts=dict.fromkeys(parts, rows_per_part)))
    for part in published[1:]:
        os.link(directory.path(captions_name(0)), directory.path(captions_name(part)))
    table.write_files_so_far(0, dict.fromkeys(published, file))
    return {"rows": 2 * rows_per_part}


def status(out: str, rows: int) -> Facts:
    from captioner.console import commands

    commands.status(out)
    return {}


def restart(out: str, rows: int) -> Facts:
    """The same command again, stopped after ten chunks."""
    from captioner.errors import InterruptedRunError
    from captioner.testing.synthetic import InstantEngine

    engine, started = InstantEngine(stop_after=10), time.perf_counter()
    with contextlib.suppress(InterruptedRunError):
        _run(out, rows, engine)
    return {"rows": 5_120, "first_chunk_seconds": round((engine.first_chunk_at or started) - started, 2)}


def resume(out: str, rows: int) -> Facts:
    from captioner.testing.synthetic import InstantEngine

    engine, started = InstantEngine(), time.perf_counter()
    facts = _run(out, rows, engine)
    first = (engine.first_chunk_at or started) - started
    return {"rows": rows - int(KEEP * rows), "first_chunk_seconds": round(first, 2), **facts}


def finished_run(out: str, rows: int) -> Facts:
    """The same command on a finished table."""
    return _run(out, rows)


def verify(out: str, rows: int) -> Facts:
    from captioner.console import commands

    if commands.verify(out):
        raise SystemExit("the table is not proven")
    return {}


def report(out: str, rows: int) -> Facts:
    from captioner.console import commands

    commands.report(out, open_page=False)
    return {}


def check(out: str, rows: int) -> Facts:
    from captioner.config import CheckConfig
    from captioner.console import commands

    commands.check(out, CheckConfig())
    return {}


def extend(out: str, rows: int) -> Facts:
    """One image in a hundred is new."""
    added = max(1, rows // 100)
    return {"rows": added, **_run(out, rows + added, extend=True)}


def retry(out: str, rows: int) -> Facts:
    """One image in a thousand has failed."""
    from captioner.testing.synthetic import FAILURE_EVERY

    return {"rows": rows // FAILURE_EVERY, **_run(out, rows, retry_failed=True)}


def alt_text(out: str, rows: int) -> Facts:
    from captioner.config import AltTextConfig
    from captioner.publishing.alt_text import command

    command.run(out, AltTextConfig(language="en"))
    return {}


def review(out: str, rows: int) -> Facts:
    """Open the queue and show the first image."""
    from captioner.publishing.review.session import ReviewSession
    from captioner.store.table import open_table

    with ReviewSession(open_table(out), "benchmark", "flagged") as session:
        return {"images": len(session)}


def export(out: str, rows: int) -> Facts:
    from captioner.config import ExportConfig
    from captioner.publishing.exports import command

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        command.run(out, ExportConfig(path=str(path), to="jsonl", include_unreviewed=True))
        return {"export_mb": round(path.stat().st_size / 1e6, 1)}


VERBS: dict[str, Callable[[str, int], Facts]] = {
    "plan": plan,
    "caption": caption,
    "status of 90 %": status,
    "restart": restart,
    "resume": resume,
    "status": status,
    "again": finished_run,
    "verify": verify,
    "report": report,
    "check": check,
    "extend": extend,
    "retry": retry,
    "verify at the end": verify,
    "alt-text": alt_text,
    "review": review,
    "export": export,
}


def publishing(out: str, rows: int) -> Facts:
    """Publish and verify one generation beside pyarrow's writing of the same rows: CPU seconds, the least of 3 rounds.

    By itself: OUT must be empty. Both take turns, since others may load the machine.
    """
    import pyarrow.parquet as pq

    from captioner.config import CaptionConfig
    from captioner.run import job
    from captioner.store.publish import publish
    from captioner.store.table import captions_name, open_table
    from captioner.store.verify import verify
    from captioner.testing.synthetic import InstantEngine, SyntheticSource

    settings = {"source": {"path": "synthetic://"}, "model": {"name": "fake"}, "output": {"path": f"{out}/captioned"}}
    with mock.patch.object(job, "open_source", return_value=SyntheticSource(rows)):
        opened = job.open_job(CaptionConfig.model_validate(settings), InstantEngine(), lambda line: None)
    (plan,) = opened.generations()
    for _ in InstantEngine().caption_chunks(opened.work, opened.missing_chunks(plan)):
        pass
    ours, plain = [], []
    for number in range(3):
        table = open_table(shutil.copytree(f"{out}/captioned", f"{out}/{number}"))
        started = time.process_time()
        assert publish(table, plan) == []
        assert verify(table).proven
        ours.append(time.process_time() - started)
        parts = [table.directory.read_table(captions_name(part)) for part in plan.parts]
        started = time.process_time()
        for part in parts:
            pq.write_table(part, f"{out}/plain")
        plain.append(time.process_time() - started)
    least = min(ours), min(plain)
    return {"ours_cpu": round(least[0], 3), "pyarrow_cpu": round(least[1], 3), "ratio": round(least[1] / least[0], 3)}


def _run(out: str, rows: int, engine: Any = None, **output: Any) -> Facts:
    """Run the whole flow, with the SyntheticSource in the place of SOURCE."""
    from captioner import pipeline
    from captioner.config import CaptionConfig
    from captioner.run import job
    from captioner.store import publish
    from captioner.testing.synthetic import InstantEngine, SyntheticSource

    config = CaptionConfig.model_validate(
        {
            "source": {"path": "synthetic://"},
            "model": {"name": "fake"},
            "output": {"path": out, **output},
        }
    )
    with (
        mock.patch.object(job, "open_source", return_value=SyntheticSource(rows)),
        _timed(publish, "_publish_part") as publishing,
    ):
        pipeline.run(config, engine or InstantEngine())
    return {"publish_seconds": round(publishing[0], 2)} if publishing[0] else {}


@contextlib.contextmanager
def _timed(module: Any, name: str) -> Iterator[list[float]]:
    """Yield a list whose one number grows by the seconds that each call of a function takes."""
    function, seconds = getattr(module, name), [0.0]

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[0] += time.perf_counter() - started

    with mock.patch.object(module, name, timed):
        yield seconds


# --- a process for each verb --------------------------------------------------------------------------------------


def measure(verb: str, out: str, rows: int) -> Facts:
    """Run one verb in this process."""
    with _peak_memory() as peak:
        started, cpu = time.perf_counter(), time.process_time()
        facts = (VERBS | {"link": link, "publishing": publishing})[verb](out, rows)
        seconds = time.perf_counter() - started
        cpu_seconds = time.process_time() - cpu
    done = facts.get("rows", rows)
    return {
        "rows": done,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "rows_per_second": round(done / seconds),
        "peak_mb": round(peak[0] / 1e6),
        **facts,
    }


@contextlib.contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Yield a list whose one number is the largest private memory of this process and its children so far, in bytes."""
    import psutil

    stop, peak, process = threading.Event(), [0], psutil.Process()

    def watch() -> None:
        while not stop.wait(0.2):
            total = 0
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += each.memory_full_info().uss
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def in_own_process(verb: str, out: str, rows: int) -> Facts:
    command = [sys.executable, "-m", "benchmarks.scale", "--run", verb, "--out", out, "--rows", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{verb}: {done.stdout}{done.stderr}")
    facts: Facts = json.loads(done.stdout.splitlines()[-1])
    return facts


def size_of(out: str) -> Facts:
    """Return how many files OUT has, and their bytes."""
    from pyarrow.fs import FileSelector

    from captioner.files import open_filesystem

    filesystem, path = open_filesystem(out)
    sizes = [info.size for info in filesystem.get_file_info(FileSelector(path, recursive=True)) if info.is_file]
    return {"files": len(sizes), "mb": round(sum(sizes) / 1e6, 1)}


# --- S3 --------------------------------------------------------------------------------------------------------


class CountedStore:
    """An S3 server of this machine in a thread, and its requests by kind."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()

    def __enter__(self) -> CountedStore:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *_: Any) -> None:
                pass

        application = DomainDispatcherApplication(create_backend_app)

        def counted(environ: dict[str, Any], start_response: Any) -> Any:
            self.requests[_kind_of(environ)] += 1
            return application(environ, start_response)

        self._server = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_EC2_METADATA_DISABLED="true")
        self._address = f"127.0.0.1:{self._server.server_port}"
        import pyarrow.fs

        pyarrow.fs.S3FileSystem(
            endpoint_override=self._address, scheme="http", region="us-east-1", allow_bucket_creation=True
        ).create_dir("scale")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()

    @property
    def out(self) -> str:
        return f"s3://scale/out?endpoint_override={self._address}&scheme=http&region=us-east-1"


def _kind_of(environ: dict[str, Any]) -> str:
    """Return by what a request of S3's protocol is billed."""
    method, query, path = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", ""), environ.get("PATH_INFO", "")
    if method == "POST" and query.startswith("delete"):
        return "BULK DELETE"
    if method == "GET" and ("list-type" in query or "prefix=" in query or path.strip("/").count("/") == 0):
        return "LIST"
    return str(method)


def dollars(requests: Counter[str], rows: int) -> float:
    """Return what the requests of a verb cost at PRICES for TARGET_ROWS images, of which `rows` were done."""
    return sum(count * PRICES.get(kind, 0.0) / 1_000 for kind, count in requests.items()) * TARGET_ROWS / rows


# --- all verbs, one after the other -------------------------------------------------------------------------------


def run_all(out: str, rows: int, verbs: list[str], store: CountedStore | None = None) -> dict[str, Facts]:
    results: dict[str, Facts] = {}
    for verb in verbs:
        before = Counter(store.requests) if store else Counter()
        facts = in_own_process(verb, out, rows)
        if store:
            requests = store.requests - before
            facts |= {"requests": dict(requests), "dollars_at_100m": round(dollars(requests, rows), 2)}
        results[verb] = facts | size_of(out)
        print(verb, results[verb], file=sys.stderr, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", help="a directory that does not exist; by default a temporary one")
    parser.add_argument("--verbs", help=f"by default {','.join(VERBS)}; also link and publishing (see there)")
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(options.run, options.out, options.rows)))
        return
    verbs = options.verbs.split(",") if options.verbs else list(VERBS)
    if options.s3:
        with CountedStore() as store:
            results = run_all(store.out, options.rows, verbs, store)
    else:
        out = options.out or tempfile.mkdtemp(prefix="captioner-scale-")
        results = run_all(out, options.rows, verbs)
        if not options.out:
            shutil.rmtree(out)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine()}
    print(json.dumps({"rows": options.rows, "store": "s3" if options.s3 else "disk", **machine, "verbs": results}))


if __name__ == "__main__":
    main()
