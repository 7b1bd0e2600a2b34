"""The whole flow, in one process. Read this file first.

    open_job     check settings, source, model and table; make the plan, or continue it
    for each chunk that is not committed yet:
        read -> decode -> caption -> commit -> receipt
        publish each part of captions/ when its last chunk is committed
    publish      merge what is left of a generation into captions/
    close_job    count rows against the plan; check the captions; write the record

`ray_jobs/caption.py` runs the same flow on a cluster: another engine, the same steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace

from captioner.config import CaptionConfig
from captioner.console.phases import phase
from captioner.console.progress import Progress
from captioner.console.stopping import notify, stoppable
from captioner.console.summary import print_summary
from captioner.console.text import counted
from captioner.data import Captioner, Chunk, Receipt, retry_may_help
from captioner.errors import OK, TooManyFailedError, VerificationError
from captioner.files import shown
from captioner.models import load
from captioner.models.devices import pick_device
from captioner.models.resolving import FAKE
from captioner.run.job import Engine, Job, open_job, plan_images
from captioner.run.prefetch import as_finished, one_ahead
from captioner.run.quality import MAX_ROWS_CHECKED, RunningCheck, check, enforce, report
from captioner.run.record import Tally, make_record, recorded, write_record
from captioner.scoring.eligible_rows import images_seen_by
from captioner.steps import Work, caption, commit, decode, read
from captioner.store.journal import read_latest_reviews
from captioner.store.lock import sole_writer
from captioner.store.publish import PartPublisher, publish
from captioner.store.table import Plan
from captioner.store.verify import count_rows

MAX_ROUNDS = 3  # in which chunks that were damaged before they were published are captioned again


def run(config: CaptionConfig, engine: Engine | None = None) -> int:
    """Caption a source into OUT; return the exit code. Raises CaptionerError (see `captioner.errors`)."""
    engine = engine or LocalEngine(config)
    out = config.output.path
    with stoppable(f"progress is saved in {shown(out)}"), sole_writer(out) as check_held:
        if config.output.plan_only:
            plan_images(config, notify)
            notify(f"planned; run without --plan-only to caption into {shown(out)}")
            return OK
        job = open_job(config, engine, notify, read_latest_reviews)
        with recorded(job) as tally:
            running_check = RunningCheck(config.check, notify)
            for plan in job.generations():
                _caption_and_publish(job, engine, plan, tally, running_check, check_held)
            job.notes.extend(running_check.notes())
            return close_job(job, tally)


def _caption_and_publish(
    job: Job, engine: Engine, plan: Plan, tally: Tally, running_check: RunningCheck, check_held: Callable[[], None]
) -> None:
    """Caption the missing chunks of a plan and publish it; caption again the chunks that turn out to be damaged."""
    chunks = job.missing_chunks(plan)
    tally.skip(plan, chunks)
    for _ in range(MAX_ROUNDS):
        if chunks:
            sample, model = running_check.draw(job.table), job.work.model
            trained = images_seen_by([model.path or model.name, model.adapter] if sample else [])
            work = replace(job.work, sample=sample, trained=trained)
            write_record(job, make_record(job, "running", tally))
            num_committed = plan.num_rows - sum(chunk.num_rows for chunk in chunks)
            publisher = PartPublisher(job.table, plan, chunks, check_held)
            with (
                publisher,
                Progress(total=plan.num_rows, already=num_committed) as progress,
                closing(engine.caption_chunks(work, chunks)) as receipts,
            ):
                for receipt in receipts:
                    check_held()
                    publisher.add(receipt.chunk_id)
                    if tally.first_at is None:
                        notify(f"first images after {time.perf_counter() - job.started:.1f} s")
                    tally.add(receipt, job.started)
                    progress.update(receipt, note=running_check.add(receipt))
            tally.slots = engine.slots()
        check_held()
        with phase("publishing the captions", notify):
            damaged = publish(job.table, plan, on_part=lambda part: check_held())
        if not damaged:
            return
        for problem in damaged:
            notify(problem)
        chunks = job.missing_chunks(plan)
    raise VerificationError(f"{damaged[-1]}: damaged {MAX_ROUNDS} times in a row; check the disk")


class LocalEngine:
    """The engine of `--local`, without Ray: one chunk is captioned while the next is decoded and the one after read."""

    def __init__(self, config: CaptionConfig) -> None:
        self._model = config.model

    def start(self) -> None:
        """Do nothing: the model is loaded with the first chunk."""

    def device(self) -> str:
        if self._model.endpoint or self._model.name == FAKE:  # which need no torch
            return "cpu"
        with phase("importing torch", notify):
            return pick_device(self._model.device).type

    def slots(self) -> dict[str, float]:
        return {"decode": 1, "device": 1, "write": 1}

    def caption_chunks(self, work: Work, chunks: list[Chunk]) -> Generator[Receipt, None, None]:
        memory = work.new_memory()
        with (
            work.decoder() as decoder,
            one_ahead(read(work, chunk) for chunk in chunks) as raws,
            one_ahead(decode(work, raw, decoder) for raw in raws) as decoded,
        ):
            captioner: Captioner = load(
                work.model, work.device, self._model.batch_size, notify=notify, num_gpus=work.num_gpus
            )
            endpoint = work.model.endpoint
            calls = endpoint.chunks_at_once(max(chunk.num_rows for chunk in chunks)) if endpoint else 1
            stop = getattr(captioner, "stop", lambda: None)
            for rows in as_finished(lambda rows: caption(work, captioner, rows, memory), decoded, calls, stop):
                yield commit(work, rows)


def close_job(job: Job, tally: Tally) -> int:
    """Count the table against the plan, check its captions and write the record; return the exit code."""
    counts = count_rows(job.table, whole_files=False)
    if counts.remaining:
        raise VerificationError(
            f"{shown(job.config.output.path)}: {counts.remaining:,} of "
            f"{counted(counts.planned, 'image')} without a row; "
            "run `captioner verify` on it"
        )
    record = make_record(job, "finished", tally, counts)
    with phase("checking the captions", notify):
        result = check(job.table, job.config.check, max_rows=MAX_ROWS_CHECKED)
        record["check"] = result.summary()
        write_record(job, record)
    with phase("writing the report", notify):
        record["report"] = report(job.table)
    if not tally.num_rows:
        notify(f"nothing to do: every planned image has its row in {shown(job.config.output.path)}")
    print_summary(record, sys.stderr)
    limit = job.config.output.max_failed
    if not counts.ok or counts.failed / counts.planned > limit:
        again = ", --retry-failed does them again" if retry_may_help(record["counts"]) else ""
        raise TooManyFailedError(
            f"{counts.failed:,} of {counted(counts.planned, 'image')} failed (--max-failed {limit:g}); the table is "
            f"complete, the reasons are in its error_code column{again}"
        )
    enforce(result, job.config.check)
    return OK
