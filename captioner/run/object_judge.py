"""Ask a chat model on model servers whether captions name anything that is not in their images.

    for a sample of the captions that were not asked about yet, a few at a time, in this process or on Ray:
        read -> decode -> ask: which things does the caption name, and which of them can be seen
    write OUT/checks/objects/part-*.parquet after each few answers; then OUT/checks/objects.json

A few captions are asked about first, and the tokens and the cost of all are estimated from them. An answer that is not
the JSON that was asked for is the reason of that caption, never a verdict.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, ValidationError

from captioner.config import JudgeConfig, JudgeTableConfig, ModelConfig, refuse_unused
from captioner.console.phases import phase
from captioner.console.progress import Progress
from captioner.console.stopping import notify, stoppable
from captioner.console.text import counted, valid_unicode
from captioner.data import CAPTIONS_SCHEMA, Captions, Usage
from captioner.errors import DamagedFileError, UsageError
from captioner.files import shown
from captioner.models import resolve
from captioner.models.endpoint.api_key import ApiKey
from captioner.models.endpoint.captioning import EndpointCaptioner
from captioner.run.judging import check_cluster, image_errors, open_finished, open_work, pixels_of, read_captions
from captioner.run.prefetch import as_finished, one_ahead
from captioner.scoring.judgements import OBJECTS_FILE, objects_name
from captioner.scoring.sample import LowestRanks, rank
from captioner.steps import ChunkRows, Work
from captioner.store.lock import sole_writer
from captioner.store.replan import generation_of_parts
from captioner.store.table import CaptionsTable

QUESTION = (
    "A caption of this image says: {caption}\n\n"
    "List the things that the caption names (objects, people, animals, places, written words), each once, and for each "
    "whether it can be seen in the image. Answer with JSON only, such as "
    '{{"objects": [{{"name": "dog", "seen": true}}]}}.'
)
VERSION = 1  # to be increased when the question changes
MAX_NEW_TOKENS = 400
ASKED_FIRST = 4  # captions, for the estimate
ROWS = 64  # captions between two writes: a kill loses at most so many answers
SHOWN, MAX_NAMES = 20, 15
_MADE_BY = b"captioner.objects"  # schema metadata of a part: the model and the question

OBJECTS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        CAPTIONS_SCHEMA.field("created_at"),  # of the caption
        pa.field("objects", pa.list_(pa.struct([("name", pa.string()), ("seen", pa.bool_())]))),  # null: no verdict
        pa.field("num_unseen", pa.int32()),
        pa.field("error", pa.string(), nullable=False),
    ]
)


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    seen: bool


class _Objects(BaseModel):
    """The answer that is asked for."""

    model_config = ConfigDict(extra="forbid")
    objects: list[_Object]


@dataclass(frozen=True)
class ObjectWork:
    """What a worker needs to know. Small and picklable. `takes_schema`: whether the servers take a JSON Schema."""

    work: Work
    takes_schema: bool = True


Batch = tuple[int, pa.Table]  # a part of the table, and some of its captions


class ObjectJudgeEngine(Protocol):
    """Where the servers are asked from: this process, or workers on Ray."""

    def ask_about(self, work: ObjectWork, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield of each batch its part and its rows of OBJECTS_SCHEMA, in any order."""
        ...


class LocalObjectJudgeEngine:
    """The engine of `--local`, without Ray: some captions are decoded while the servers are asked about others."""

    def ask_about(self, work: ObjectWork, batches: Iterator[Batch]) -> Iterator[Batch]:
        judge = Judge(work, ApiKey.from_environment(), notify)
        calls = judge_calls(work)
        with (
            work.work.decoder() as decoder,
            one_ahead((part, pixels_of(work.work, captions, decoder)) for part, captions in batches) as decoded,
        ):
            yield from as_finished(
                lambda batch: (batch[0], judge.ask(batch[1])[0]), decoded, calls, judge.captioner.stop
            )


def judge_calls(work: ObjectWork) -> int:
    """Return how many batches must be under way so that no server waits."""
    assert work.work.model.endpoint is not None
    return work.work.model.endpoint.chunks_at_once(ROWS)


class Judge:
    """Asks about captions; holds the connections to the servers. `key`: of the servers."""

    def __init__(self, work: ObjectWork, key: ApiKey, notify: Callable[[str], None]) -> None:
        self.captioner = EndpointCaptioner(work.work.model, key, notify)
        self.captioner.schema = _json_schema() if work.takes_schema else None

    def ask(self, decoded: ChunkRows) -> tuple[pa.Table, Usage]:
        """Return the rows of OBJECTS_SCHEMA of captions, and the tokens that their answers took.

        `decoded`: captions with the pixels of their images. Several threads may call this at once.
        """
        errors = image_errors(decoded.rows)
        asked = [index for index, error in enumerate(errors) if not error]
        texts = decoded.rows["caption"].to_pylist()
        prompts = [(QUESTION.format(caption=json.dumps(texts[index], ensure_ascii=False)),) for index in asked]
        assert decoded.pixels is not None
        answers = self.captioner.caption(decoded.pixels[asked], prompts) if asked else Captions([], [], [], [])
        objects: list[list[dict[str, Any]] | None] = [None] * len(errors)
        for index, text, error in zip(asked, answers.texts, answers.errors, strict=True):
            objects[index], errors[index] = (None, error) if error else _verdict(text)
        columns: dict[str, Any] = {name: decoded.rows[name] for name in ("image_id", "created_at")}
        unseen = [None if listed is None else sum(not item["seen"] for item in listed) for listed in objects]
        columns |= {"objects": objects, "num_unseen": unseen}
        columns["error"] = [valid_unicode(error) for error in errors]
        return pa.table(columns, schema=OBJECTS_SCHEMA), Usage.total(answers.usage)


def _verdict(answer: str) -> tuple[list[dict[str, Any]] | None, str]:
    """Return the objects of an answer, or None and why there are none."""
    try:
        listed = _Objects.model_validate_json(answer[answer.find("{") : answer.rfind("}") + 1])
    except ValidationError:
        return None, f"the answer is not the JSON that was asked for: {' '.join(answer.split())[:80]!r}"
    return [item.model_dump() for item in listed.objects], ""


def judge_objects(out: str, config: JudgeTableConfig, engine: ObjectJudgeEngine) -> dict[str, Any]:
    """Ask about a sample of the captions of OUT, and return the figures (objects.json).

    Raises EndpointError where no server can be used, and UsageError where OUT is not finished.
    """
    settings = config.judge
    model = ModelConfig.model_validate(
        {
            "name": settings.name,
            "endpoint": settings.endpoint,
            "concurrency": settings.concurrency,
            "max_new_tokens": MAX_NEW_TOKENS,
            "price_in": settings.price_in,
            "price_out": settings.price_out,
        }
    )
    if settings.references:
        raise UsageError(
            f"--references {settings.references}: has no effect with --endpoint, which needs none; leave it out"
        )
    unused = ("references_columns", "revision", "batch_size", "num_others")
    refuse_unused(settings, unused, "has no effect with --endpoint")
    check_cluster(config.cluster, "an --endpoint holds the model; leave it out")
    with stoppable(f"progress is saved in {shown(out)}"), sole_writer(out) as check_held:
        table = open_finished(out)
        work = open_work(table, config, resolve(model, notify=notify))
        made_by = json.dumps([work.model.sha256, work.model.settings_sha256, VERSION]).encode()
        with phase("drawing the captions to ask about", notify):
            left = list(_left(table, settings, made_by))
        total = sum(captions.num_rows for _, captions, _ in left)
        if total:
            asked_first = left[0][1].slice(0, ASKED_FIRST)
            with phase(f"asking about {counted(asked_first.num_rows, 'caption')} for the estimate", notify):
                takes_schema = _estimate(work, asked_first, total, model)
            judged = {part: verdicts for part, _, verdicts in left}
            with Progress(total, verb="judged") as progress:
                for part, rows in engine.ask_about(ObjectWork(work, takes_schema), _batches(left)):
                    check_held()
                    judged[part] = pa.concat_tables([judged[part], rows])
                    verdicts = judged[part].replace_schema_metadata({_MADE_BY: made_by})
                    table.directory.write_table(objects_name(part), verdicts)
                    progress.add(rows.num_rows, rows["objects"].null_count)
        figures = _summarise(table, work, made_by)
        table.directory.write_json(OBJECTS_FILE, figures, checksum=True)
        return figures


def _batches(left: list[tuple[int, pa.Table, pa.Table]]) -> Iterator[Batch]:
    """Yield the captions of each part that are left, a few at a time."""
    for part, captions, _ in left:
        for first in range(0, captions.num_rows, ROWS):
            yield part, captions.slice(first, ROWS)


def _json_schema() -> dict[str, Any]:
    return {"name": "objects", "strict": True, "schema": _Objects.model_json_schema()}


def _left(table: CaptionsTable, settings: JudgeConfig, made_by: bytes) -> Iterator[tuple[int, pa.Table, pa.Table]]:
    """Yield each part with its sampled captions that have no verdict yet, and the verdicts that it has."""
    sample: LowestRanks[None] = LowestRanks(settings.sample if isinstance(settings.sample, int) else 0)
    for part in generation_of_parts(table) if isinstance(settings.sample, int) else ():
        for image_id in read_captions(table, part)["image_id"].to_pylist():
            sample.offer(rank(image_id, settings.seed), image_id, None)
    highest = None if settings.sample == "all" else sample.max_rank
    for part in generation_of_parts(table):
        captions = read_captions(table, part)
        judged = _judged(table, part, made_by)
        judged = judged.filter(pa.array(_is_current(judged, captions), pa.bool_()))
        if highest is not None:
            ranks = [rank(image_id, settings.seed) for image_id in captions["image_id"].to_pylist()]
            captions = captions.filter(pa.array([row_rank <= highest for row_rank in ranks], pa.bool_()))
        captions = captions.filter(pc.invert(pc.is_in(captions["image_id"], value_set=judged["image_id"])))
        if captions.num_rows:
            yield part, captions, judged


def _judged(table: CaptionsTable, part: int, made_by: bytes) -> pa.Table:
    """Return the verdicts of a part by this model; none where they are of another one, or damaged."""
    try:
        judged = table.directory.read_table(objects_name(part))
    except DamagedFileError:  # or missing
        return OBJECTS_SCHEMA.empty_table()
    is_same = (judged.schema.metadata or {}).get(_MADE_BY) == made_by
    return judged.replace_schema_metadata() if is_same else OBJECTS_SCHEMA.empty_table()


def _is_current(judged: pa.Table, captions: pa.Table) -> list[bool]:
    """Return for each verdict whether it is one, and of a caption that is still there."""
    created_of = dict(zip(captions["image_id"].to_pylist(), captions["created_at"].to_pylist(), strict=True))
    columns = (judged[name].to_pylist() for name in ("image_id", "created_at", "error"))
    return [
        not error and created_of.get(image_id) == created for image_id, created, error in zip(*columns, strict=True)
    ]


def _estimate(work: Work, captions: pa.Table, total: int, model: ModelConfig) -> bool:
    """Ask about a few captions, and say what all will take; return whether the servers take a schema."""
    with work.decoder() as decoder:
        decoded = pixels_of(work, captions, decoder)
    judge, takes_schema = Judge(ObjectWork(work), ApiKey.from_environment(), notify), True
    rows, usage = judge.ask(decoded)
    if not any(row["objects"] is not None for row in rows.to_pylist()):
        judge.captioner.schema, takes_schema = None, False
        rows, usage = judge.ask(decoded)
    prompt, answer = (total / rows.num_rows * tokens for tokens in (usage.prompt_tokens, usage.completion_tokens))
    cost = model.cost_of(prompt, answer)
    price = "" if cost is None else f", cost {cost:,.2f}"
    tokens = f"about {prompt:,.0f} prompt tokens and {answer:,.0f} answer tokens"
    notify(f"estimate: {counted(total, 'request')}, {tokens}{price}")
    return takes_schema


def _summarise(table: CaptionsTable, work: Work, made_by: bytes) -> dict[str, Any]:
    unseen: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    shown_rows: list[dict[str, Any]] = []
    num_judged = num_with_unseen = 0
    for part in generation_of_parts(table):
        captions = {row["image_id"]: row for row in read_captions(table, part).to_pylist()}
        for row in _judged(table, part, made_by).to_pylist():
            caption = captions.get(row["image_id"])
            if caption is None or caption["created_at"] != row["created_at"]:
                continue
            if row["objects"] is None:
                errors[row["error"].partition(":")[0]] += 1
                continue
            names = [item["name"] for item in row["objects"] if not item["seen"]]
            num_judged += 1
            num_with_unseen += bool(names)
            unseen.update(set(names))
            if names and len(shown_rows) < SHOWN:
                kept = {name: caption[name] for name in ("image_id", "caption", "chunk_id", "chunk_row")}
                shown_rows.append(kept | {"unseen": names})
    return {
        "model": {"name": work.model.name, "sha256": work.model.sha256},
        "num_judged": num_judged,
        "num_with_unseen": num_with_unseen,
        "unseen": sorted(unseen.items(), key=lambda item: (-item[1], item[0]))[:MAX_NAMES],
        "not_judged": dict(errors.most_common()),
        "shown": shown_rows,
    }


def summary_lines(figures: dict[str, Any]) -> list[str]:
    """Return the figures as lines for the terminal."""
    judged, unseen = figures["num_judged"], figures["num_with_unseen"]
    share = f" ({unseen / judged:.1%})" if judged else ""
    names = ", ".join(f"{name} {count:,}" for name, count in figures["unseen"])
    model = figures["model"]["name"]
    return [
        f"{unseen:,} of {counted(judged, 'caption')}{share} name something that {model} does not see",
        *([f"most often: {names}"] if names else []),
        *(
            f"  {row['image_id']}: {row['caption']}  (not seen: {', '.join(row['unseen'])})"
            for row in figures["shown"][:3]
        ),
        *(f"no verdict: {counted(count, 'caption')} ({reason})" for reason, count in figures["not_judged"].items()),
    ]
