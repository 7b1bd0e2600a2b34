"""The commands that look: caption a few pictures, prove a table, tell how far it is. One process, no Ray."""

from __future__ import annotations

import sys
import time
import webbrowser
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from captioner.config import CheckConfig, ModelConfig, SourceConfig
from captioner.console.text import printable
from captioner.data import RawImage
from captioner.errors import ERROR, OK, TOO_MANY_FAILED
from captioner.imaging.sandbox.decoder import GuardedDecoder
from captioner.models import load, resolve, settle_dtype
from captioner.models.devices import pick_device
from captioner.report import FIGURES
from captioner.report.terminal import print_check
from captioner.run import quality
from captioner.run.quality import enforce
from captioner.store.table import open_table
from captioner.store.verify import TableCounts, count_rows
from captioner.store.verify import verify as verify_table


def try_pictures(pictures: Sequence[str], model: ModelConfig) -> int:
    """Print a caption for each file; a file that gives none is named on standard error. Exit 2 where none did."""
    from captioner.imaging import decode_images

    ref = resolve(model)
    device = pick_device(model.device)
    ref = settle_dtype(ref, model.dtype, device.type)
    print(f"captioner: {printable(ref.told)}", file=sys.stderr)
    limits = SourceConfig()
    with GuardedDecoder(ref.spec, limits.max_pixels, limits.decode_timeout) as decoder:
        batch = decode_images([_read(name) for name in pictures], ref.spec, limits.max_pixels, decoder)
    codes = batch.rows["error_code"].to_pylist()
    messages = batch.rows["error_message"].to_pylist()
    fine = [place for place, code in enumerate(codes) if not code]
    if fine:
        captioner = load(ref, str(device), model.batch_size)
        started = time.perf_counter()
        captions = captioner.caption(batch.pixels[fine])
        seconds = time.perf_counter() - started
        for place, text in zip(fine, captions.texts, strict=True):
            print(f"{printable(pictures[place])}: {printable(text)}")
        print(f"captioner: {len(fine)} pictures in {seconds:.2f} s", file=sys.stderr)
    for name, code, message in zip(pictures, codes, messages, strict=True):
        if code:
            print(f"captioner: {printable(name)}: {code}: {printable(message)}", file=sys.stderr)
    return OK if fine else TOO_MANY_FAILED


def _read(name: str) -> RawImage:
    try:
        return RawImage(name, name, Path(name).read_bytes())
    except OSError as error:
        codes = {FileNotFoundError: "not_found", PermissionError: "permission"}
        return RawImage(name, name, None, codes.get(type(error), "decode_error"), error.strerror or str(error))


def verify(out: str) -> int:
    """Print what a full comparison of table and plan finds; exit 1 unless the table is proven whole."""
    found = verify_table(open_table(out))
    counts = found.counts
    for problem in found.problems:
        print(f"captioner: {printable(problem)}", file=sys.stderr)
    if found.open_generations:
        waiting = f"{counts.remaining:,} pictures remain" if counts.remaining else "rows wait to be published"
        print(f"captioner: the run is not finished: {waiting}; run the same command again", file=sys.stderr)
    verdict = "proven" if found.proven else "NOT proven"
    print(
        f"{printable(out)}: {verdict}: {counts.planned:,} planned, {counts.ok + counts.failed:,} rows, "
        f"{found.lost:,} lost, {found.doubled:,} doubled"
    )
    return OK if found.proven else ERROR


def status(out: str) -> int:
    """Print how far a table is: planned, ok, failed by reason, remaining, and the rate of the latest start."""
    table = open_table(out)
    counts: TableCounts = count_rows(table)
    lines = [("planned", counts.planned), ("ok", counts.ok), ("failed", counts.failed)]
    lines += [(f"  {reason}", number) for reason, number in counts.failed_by_reason.items()]
    for name, number in [*lines, ("remaining", counts.remaining)]:
        print(f"{name:<22}{number:>14,}")
    models = table.info.get("models", {})
    for fingerprint, number in counts.by_fingerprint.items() if len(models) > 1 else ():
        name = models.get(fingerprint, {}).get("name", fingerprint[:12])
        print(f"{number:,} rows made by {printable(name)} (fingerprint {fingerprint[:12]})")
    if table.directory.exists("run.json"):
        record = table.directory.read_json("run.json")
        rate, when = record["images_per_second"], datetime.fromisoformat(record["written_at"])
        print(f"{'images a second':<22}{'-' if rate is None else format(rate, ',.1f'):>14}")
        print(f"latest start {printable(record['run_id'])}: {printable(record['state'])} at {when:%Y-%m-%d %H:%M} UTC")
    return OK


def check(out: str, settings: CheckConfig, against: str | None = None) -> int:
    """Check a table, write its report and print both in short. Raises CheckFailedError where a gate is not met."""
    table = open_table(out)
    found = quality.check(table, settings, against)
    page = quality.report(table)
    print_check(table.directory.read_json(FIGURES))
    print(f"the report: {printable(page)}")
    enforce(found.scores, settings)
    return OK


def report(out: str, open_page: bool) -> int:
    """Write the report of a table and print where it is."""
    page = quality.report(open_table(out))
    print(printable(page))
    if open_page:
        webbrowser.open(page if "://" in page else Path(page).absolute().as_uri())
    return OK
