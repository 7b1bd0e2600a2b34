"""Files of OUT that were damaged or deleted: noticed, said in one line, and made again by the same command."""

import contextlib
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner import pipeline
from captioner.config import AltTextConfig, CaptionConfig
from captioner.data import PLAN_SCHEMA
from captioner.errors import DamagedFileError, VerificationError
from captioner.publishing.alt_text.command import make_alt_texts
from captioner.run.job import open_job
from captioner.sources import open_source
from captioner.store.directory import RECHECK_FILE, Directory
from captioner.store.plan import read_planned
from captioner.store.repair import restore_table
from captioner.store.replan import make_retry_plan
from captioner.store.table import PLAN_FACTS, CaptionsTable, Plan, open_table, plan_name, plan_part_name
from captioner.store.verify import count_rows, verify
from captioner.testing import Killed, killed_at_write, make_folder
from ray_jobs.cli import main
from tests.helpers import caption_config, rows_of

Injury = Callable[[bytes], bytes | None]
INJURIES: dict[str, Injury] = {
    "a bit flipped": lambda data: (
        data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 4]) + data[len(data) // 3 + 1 :]
    ),
    "a bit of the footer flipped": lambda data: data[:-90] + bytes([data[-90] ^ 1]) + data[-89:],
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "random bytes": lambda data: random.Random(0).randbytes(len(data)),
    "longer": lambda data: data + b"x",
    "deleted": lambda data: None,
}


def contents(out: Path | str) -> list[dict]:
    """What a person would compare: the rows without what names the run that wrote them."""
    names = {"run_id", "created_at", "generation", "chunk_id", "chunk_row"}
    return [{name: value for name, value in row.items() if name not in names} for row in rows_of(out)]


def caption_chunks(config: CaptionConfig, number: int | None) -> CaptionsTable:
    """Caption and commit the first chunks of a plan, or all: a driver that dies then."""
    engine = pipeline.LocalEngine(config)
    job = open_job(config, engine, lambda line: None)
    list(engine.caption_chunks(job.work, job.missing_chunks(job.table.open_plans()[0])[:number]))
    return job.table


def captioned_but_not_published(config: CaptionConfig) -> CaptionsTable:
    """Every chunk committed, none published: where a driver may be when it dies."""
    return caption_chunks(config, None)


def injure(directory: Directory, name: str, injury: Injury) -> None:
    data = injury(directory.read_bytes(name))
    if data is None:
        directory.delete(name)
    else:
        directory.write_bytes(name, data)


def named(problems: list[str], name: str) -> bool:
    return any(name in problem for problem in problems)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("archive"), 40)
    for name in ("000003.png", "000017.png"):
        (root / name).write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Path:
    """A table with a superseded generation: published, retried, published again. Tests copy it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    pipeline.run(caption_config(archive, out))
    make_folder(archive / "healed", 4)
    (archive / "healed/000003.png").replace(archive / "000003.png")
    shutil.rmtree(archive / "healed")
    pipeline.run(caption_config(archive, out, retry_failed=True))
    assert verify(open_table(str(out))).proven
    return out


@pytest.fixture(scope="module")
def unpublished(tmp_path_factory: pytest.TempPathFactory, archive: Path, finished: Path) -> Path:
    out = tmp_path_factory.mktemp("unpublished") / "out"
    captioned_but_not_published(caption_config(archive, out))
    return out


@pytest.mark.parametrize("injury", INJURIES)
def test_a_chunk_that_was_damaged_is_captioned_again_and_said(
    tmp_path: Path, archive: Path, finished: Path, unpublished: Path, capsys: pytest.CaptureFixture[str], injury: str
) -> None:
    out = shutil.copytree(unpublished, tmp_path / "out")
    table = open_table(str(out))
    name = table.chunk_name("g000-00001-0000")
    injure(table.directory, name, INJURIES[injury])
    capsys.readouterr()

    assert count_rows(table, on_damage=lambda error: None).remaining == 16
    assert injury == "deleted" or named(verify(table).problems, name)
    assert pipeline.run(caption_config(archive, out)) == 0

    lines = [line for line in capsys.readouterr().err.splitlines() if name in line]
    assert lines == [] if injury == "deleted" else len(lines) == 1 and "captioning 16 images again" in lines[0]
    assert verify(table).proven
    assert contents(out) == contents(finished)


@pytest.mark.parametrize("injury", INJURIES)
def test_a_published_part_that_was_damaged_is_captioned_again_and_said(
    tmp_path: Path, archive: Path, finished: Path, capsys: pytest.CaptureFixture[str], injury: str
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    table = open_table(str(out))
    untouched = {path: path.read_bytes() for path in (out / "captions").glob("part-0000[12].parquet")}
    injure(table.directory, "captions/part-00000.parquet", INJURIES[injury])

    assert named(verify(table).problems, "captions/part-00000.parquet")
    capsys.readouterr()
    assert pipeline.run(caption_config(archive, out)) == 0

    lines = [line for line in capsys.readouterr().err.splitlines() if "captions/part-00000.parquet" in line]
    assert len(lines) == 1
    assert "captioning 16 images again" in lines[0]
    assert {path: path.read_bytes() for path in untouched} == untouched
    assert verify(table).proven
    assert contents(out) == contents(finished)


@pytest.mark.parametrize("name", ["captions/part-00000.parquet", "plan/g000/part-00001.parquet"])
def test_damage_that_changes_neither_size_nor_time_is_found_by_verify_and_then_repaired(
    tmp_path: Path, archive: Path, finished: Path, name: str
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    table, before = open_table(str(out)), (out / name).stat()
    injure(table.directory, name, INJURIES["a bit flipped"])
    os.utime(out / name, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert named(verify(table).problems, name)
    assert pipeline.run(caption_config(archive, out)) == 0

    assert verify(table).proven
    assert contents(out) == contents(finished)


def test_a_start_that_finds_one_damaged_file_reads_all_of_them(tmp_path: Path, archive: Path, finished: Path) -> None:
    """What damaged the one may have damaged others, and a start deletes the note that something was damaged."""
    out = shutil.copytree(finished, tmp_path / "out")
    table = open_table(str(out))
    injure(table.directory, "captions/part-00000.parquet", INJURIES["cut"])
    for name in ("captions/part-00001.parquet", "plan/g000/part-00001.parquet"):
        before = (out / name).stat()
        injure(table.directory, name, INJURIES["a bit flipped"])
        os.utime(out / name, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert pipeline.run(caption_config(archive, out)) == 0

    assert not (out / RECHECK_FILE).exists()
    assert verify(table).proven
    assert contents(out) == contents(finished)


def test_a_start_reads_no_file_that_has_the_size_and_time_it_was_written_with(
    tmp_path: Path, archive: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    table, source = open_table(str(out)), open_source(caption_config(archive, out).source)
    read_bytes, names = Directory.read_bytes, list[str]()

    def noted(self: Directory, name: str) -> bytes:
        names.append(name)
        return read_bytes(self, name)

    monkeypatch.setattr(Directory, "read_bytes", noted)
    assert restore_table(table, source) == []
    assert [name for name in names if name.endswith(".parquet")] == []

    for name in ("captions/part-00001.parquet", "plan/g000/part-00002.parquet"):
        (out / name).touch()
    assert restore_table(table, source) == []
    assert {name for name in names if name.endswith(".parquet")} == {
        "captions/part-00001.parquet",
        "plan/g000/part-00002.parquet",
    }


def test_chunks_and_parts_in_each_others_place_are_damage(
    tmp_path: Path, archive: Path, finished: Path, unpublished: Path
) -> None:
    running, done = (shutil.copytree(out, tmp_path / out.parent.name) for out in (unpublished, finished))
    table = open_table(str(running))
    shutil.copy(running / table.chunk_name("g000-00000-0000"), running / table.chunk_name("g000-00001-0000"))
    shutil.copy(done / "captions/part-00000.parquet", done / "captions/part-00001.parquet")

    for out in (running, done):
        assert not verify(open_table(str(out))).proven
        assert pipeline.run(caption_config(archive, out)) == 0
        assert verify(open_table(str(out))).proven
        assert contents(out) == contents(finished)


def test_whole_files_of_other_kinds_in_the_place_of_a_part_are_damage(
    tmp_path: Path, archive: Path, finished: Path
) -> None:
    others = sorted(path.relative_to(finished) for path in finished.rglob("*.parquet") if "captions" not in path.parts)
    kinds = {path.parent: path for path in others}  # one of each folder
    assert {path.parts[0] for path in kinds} >= {"plan", "checks"}

    for number, other in enumerate(kinds.values()):
        out = Path(shutil.copytree(finished, tmp_path / str(number)))
        shutil.copyfile(out / other, out / "captions/part-00000.parquet")
        result = verify(open_table(str(out)))
        assert not result.proven
        assert any("captions/part-00000.parquet" in problem for problem in result.problems)
        assert pipeline.run(caption_config(archive, out)) == 0
        assert verify(open_table(str(out))).proven
        assert contents(out) == contents(finished)


def test_a_part_of_the_plan_in_the_place_of_another_is_damage(tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    table = open_table(str(tmp_path / "out"))
    plan = table.plans()[0]
    first, *_, last = (table.directory.path(plan_part_name(0, part)) for part in sorted(plan.parts))
    shutil.copyfile(last, first)

    with pytest.raises(DamagedFileError, match="it is that of another part"):
        read_planned(table, plan.part_chunks(min(plan.parts))[0])


@pytest.mark.parametrize(
    ("file", "in_place_of"),
    [
        ("plan/g001/part-00000.parquet", "plan/g000/part-00000.parquet"),
        ("plan/g000/part-00000.parquet", "plan/g000/part-00002.parquet"),
        ("captions/part-00001.parquet", "plan/g000/part-00001.parquet"),
        ("plan/g000/part-00000.parquet", "plan/g001/part-00000.parquet"),
        ("report/report.json", "alt_text/settings.json"),
        ("captions/part-00001.parquet", "alt_text/part-00001.parquet"),
        ("captions/part-00001.parquet", "checks/part-00000.parquet"),
        ("plan/g000/plan.json", "plan/g001/plan.json"),
        ("plan/g000/plan.json", "runs/*.json"),
        ("plan/g000/plan.json", "run.json"),
        ("run.json", "checks/check.json"),
    ],
)
def test_with_a_file_in_the_place_of_another_every_command_ends_with_one_line(
    tmp_path: Path, archive: Path, finished: Path, file: str, in_place_of: str
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    make_alt_texts(open_table(str(out)), AltTextConfig())
    for name in out.glob(in_place_of):
        shutil.copyfile(out / file, name)

    for words in (
        ("status", out),
        ("export", out, "--to", "csv", tmp_path / "texts.csv", "--include-unreviewed"),
        ("check", out),
        ("report", out),
        ("verify", out),
    ):
        code, output = run(*words)
        errors = [line for line in output.splitlines() if line.startswith("captioner: error: ")]
        assert code == 0 or any("is damaged" in line for line in errors or output.splitlines()), (words, output)
        assert len(errors) <= 1, (words, output)
    assert pipeline.run(caption_config(archive, out)) == 0
    assert verify(open_table(str(out))).proven
    assert contents(out) == contents(finished)


def test_a_store_without_renames_is_repaired_alike(tmp_path: Path, archive: Path, finished: Path) -> None:
    out = f"memory://bucket{tmp_path}"
    table = captioned_but_not_published(caption_config(archive, out))
    injure(table.directory, table.chunk_name("g000-00002-0000"), INJURIES["a bit flipped"])
    pipeline.run(caption_config(archive, out))
    assert contents(out) == contents(finished)

    injure(table.directory, "captions/part-00002.parquet", INJURIES["a bit flipped"])
    assert not verify(table).proven
    pipeline.run(caption_config(archive, out))

    assert verify(table).proven
    assert contents(out) == contents(finished)


def test_a_repair_killed_at_any_write_is_completed(tmp_path: Path, archive: Path, finished: Path) -> None:
    write, lived = 0, False
    while not lived:
        write += 1
        out = shutil.copytree(finished, tmp_path / str(write))
        injure(Directory(str(out)), "captions/part-00001.parquet", INJURIES["cut"])
        try:
            with killed_at_write(write):
                pipeline.run(caption_config(archive, out))
            lived = True
        except Killed:
            pipeline.run(caption_config(archive, out))

        assert verify(open_table(str(out))).proven
        assert contents(out) == contents(finished)
    assert write > 5


def test_a_disk_that_damages_what_is_written_ends_the_run(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Directory.write_bytes

    def damaging(self: Directory, name: str, data: bytes) -> None:
        write(self, name, data[:-1] if name.endswith("-00001-0000.arrow") else data)

    monkeypatch.setattr(Directory, "write_bytes", damaging)
    with pytest.raises(VerificationError, match=r"g000-00001-0000.arrow is damaged.*check the disk"):
        pipeline.run(caption_config(archive, tmp_path / "out"))


def test_a_part_that_somebody_wrote_anew_is_named_and_left_alone(tmp_path: Path, archive: Path, finished: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    file = out / "captions/part-00000.parquet"
    rows = pq.read_table(file)
    pq.write_table(
        rows.set_column(rows.schema.get_field_index("caption"), rows.schema.field("caption"), [["mine"] * 16]), file
    )
    before = file.read_bytes()

    pipeline.run(caption_config(archive, out))

    assert named(verify(open_table(str(out))).problems, "captions/part-00000.parquet")
    assert file.read_bytes() == before


def files_with_rows(out: Path) -> list[Path]:
    return sorted((*out.rglob("*.parquet"), *out.rglob("*.arrow")))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_verify_notices_any_bit_that_flips(finished: Path, unpublished: Path, data: st.DataObject) -> None:
    out = data.draw(st.sampled_from([finished, unpublished]))
    file = data.draw(st.sampled_from(files_with_rows(out)))
    before = file.read_bytes()
    position = data.draw(st.integers(0, 8 * len(before) - 1))
    damaged = bytearray(before)
    damaged[position // 8] ^= 1 << position % 8
    file.write_bytes(damaged)
    try:
        result = verify(open_table(str(out)))
    finally:
        file.write_bytes(before)

    assert not result.proven
    assert named(result.problems, str(file.relative_to(out)))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_plan_part_with_a_flipped_bit_is_read_as_planned_or_refused(finished: Path, data: st.DataObject) -> None:
    """A report reads chunks of the plan without the checksum of the whole file, and the footer has none of its own."""
    table = open_table(str(finished))
    chunk = next(table.plans()[0].chunks())
    file = finished / plan_part_name(chunk.generation, chunk.part)
    before, planned = file.read_bytes(), read_planned(table, chunk)
    end = 8 * (len(before) - 8)
    position = data.draw(st.integers(end - 8 * int.from_bytes(before[-8:-4], "little"), end - 1))
    damaged = bytearray(before)
    damaged[position // 8] ^= 1 << position % 8
    file.write_bytes(damaged)
    rows = planned
    try:
        with contextlib.suppress(DamagedFileError):
            rows = read_planned(table, chunk)
        assert rows.select(PLAN_SCHEMA.names).equals(planned.select(PLAN_SCHEMA.names))
    finally:
        file.write_bytes(before)
        (finished / RECHECK_FILE).unlink(missing_ok=True)


def test_any_reader_of_parquet_can_check_the_pages(finished: Path) -> None:
    file = finished / "captions/part-00000.parquet"
    column = pq.ParquetFile(file).metadata.row_group(0).column(0)
    data = bytearray(file.read_bytes())
    data[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 4] ^= 1

    with pytest.raises(OSError, match="could not verify page integrity"):
        pq.ParquetFile(pa.BufferReader(bytes(data)), page_checksum_verification=True).read()


def test_records_notice_what_was_changed_in_them(tmp_path: Path, finished: Path) -> None:
    directory = Directory(str(shutil.copytree(finished, tmp_path / "out")))
    for name in ("plan/g000/plan.json", "plan/g000/published.json"):
        value = json.loads(directory.read_bytes(name))
        value[next(iter(value))] = "changed"
        directory.write_bytes(name, json.dumps(value).encode())
        with pytest.raises(DamagedFileError, match="is damaged: its content is not what was written"):
            directory.read_json(name)


PLAN_FILES = ["plan/g000/plan.json", "plan/g000/part-00000.parquet", "plan/g000/part-00002.parquet"]
LATER_FILES = ["plan/g000/published.json", "plan/g001/plan.json", "plan/g001/part-00000.parquet"]


@pytest.mark.parametrize("injury", ["a bit flipped", "cut", "deleted"])
@pytest.mark.parametrize("name", PLAN_FILES + LATER_FILES)
def test_a_plan_or_record_that_was_damaged_is_made_again(
    tmp_path: Path, archive: Path, finished: Path, unpublished: Path, name: str, injury: str
) -> None:
    for before in [finished, unpublished] if name in PLAN_FILES else [finished]:
        out = shutil.copytree(before, tmp_path / before.parent.name)
        chunks = {path: path.read_bytes() for path in (*out.glob("captions/*"), *out.glob("chunks/*/*"))}
        injure(Directory(str(out)), name, INJURIES[injury])

        assert run("verify", out)[0] == 1
        code, output = run("caption", archive, out, "--model", "fake", "--local", "--rows-per-file", "16")

        assert code == 0
        assert injury == "deleted" or f"{name} is damaged" in output
        assert verify(open_table(str(out))).proven
        assert contents(out) == contents(finished)
        assert all(not path.exists() or path.read_bytes() == chunks[path] for path in chunks)  # nothing was done again


def lose_last_parts(table: CaptionsTable, generation: int, number: int) -> None:
    """Damage plan.json, and delete the last plan parts of a generation."""
    injure(table.directory, plan_name(generation), INJURIES["a bit flipped"])
    parts = table.parts_in_folder(generation)
    for part in parts[len(parts) - number :]:
        table.directory.delete(plan_part_name(generation, part))


def by_image(rows: list[dict]) -> dict[str, dict]:
    assert len(rows) == len({row["image_id"] for row in rows})
    return {row["image_id"]: row for row in rows}


@pytest.mark.parametrize("num_chunks", [0, 1, 3])  # of three parts with one chunk each
@pytest.mark.parametrize("num_lost", [1, 2, 3])
def test_parts_of_the_plan_that_are_lost_with_its_record_are_listed_again(
    tmp_path: Path, archive: Path, finished: Path, num_lost: int, num_chunks: int
) -> None:
    """Nothing tells of the last parts of a plan, if no image of theirs was captioned."""
    out, config = tmp_path / "out", caption_config(archive, tmp_path / "out", plan_only=num_chunks == 0)
    if num_chunks:
        caption_chunks(config, num_chunks)
    else:
        pipeline.run(config)
    table = open_table(str(out))
    lose_last_parts(table, 0, num_lost)
    assert run("verify", out)[0] == 1

    code, output = run("caption", archive, out, "--model", "fake", "--local", "--rows-per-file", "16")

    assert code == 0
    assert "plan/g000/plan.json is damaged" in output
    assert verify(table).proven
    assert by_image(contents(out)) == by_image(contents(finished))


@pytest.mark.parametrize("limit", [None, 40, 36, 20])
def test_a_plan_of_an_earlier_version_that_is_made_again_is_compared_with_the_source(
    tmp_path: Path, archive: Path, limit: int | None
) -> None:
    """Its last part does not say that it is the last one."""
    out, config = tmp_path / "out", caption_config(archive, tmp_path / "out", source={"limit": limit})
    pipeline.run(config.model_copy(update={"output": config.output.model_copy(update={"plan_only": True})}))
    table = open_table(str(out))
    for part in table.parts_in_folder(0):
        name = plan_part_name(0, part)
        rows = table.directory.read_table(name)
        facts = {key: value for key, value in rows.schema.metadata.items() if key != PLAN_FACTS}
        table.directory.write_table(name, rows.replace_schema_metadata(facts), table.plans()[0].rows_per_chunk)
    caption_chunks(config, 1)
    lose_last_parts(table, 0, 1)

    assert pipeline.run(config) == 0

    assert verify(table).proven
    assert len(by_image(contents(out))) == min(limit or 40, 40)


def test_of_a_source_that_was_not_listed_to_its_end_nothing_is_proven(tmp_path: Path, archive: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed), killed_at_write(4):  # after table.json and a part of the plan
        pipeline.run(caption_config(archive, out, plan_only=True))

    code, output = run("verify", out)

    assert code == 1
    assert "the source is not listed to its end; run the same `captioner caption` command again" in output
    assert pipeline.run(caption_config(archive, out)) == 0
    assert run("verify", out)[0] == 0


def test_a_plan_that_is_made_again_is_the_same_and_takes_no_new_image(tmp_path: Path, archive: Path) -> None:
    images = shutil.copytree(archive, tmp_path / "images")
    config = caption_config(images, tmp_path / "out", plan_only=True)
    pipeline.run(config)
    table = open_table(str(tmp_path / "out"))
    before = table.plans()
    make_folder(tmp_path / "more", 1)
    (tmp_path / "more/000000.png").rename(images / "zz.png")
    injure(table.directory, plan_name(0), INJURIES["cut"])

    pipeline.run(config)

    assert table.plans() == before


def test_a_plan_that_lost_parts_is_completed_after_a_kill_at_any_write(tmp_path: Path, archive: Path) -> None:
    config = caption_config(archive, tmp_path / "whole")
    caption_chunks(config, 1)
    lose_last_parts(open_table(str(tmp_path / "whole")), 0, 2)
    write, lived = 0, False
    while not lived:
        write += 1
        out = Path(shutil.copytree(tmp_path / "whole", tmp_path / str(write)))
        config = caption_config(archive, out, plan_only=True)
        try:
            with killed_at_write(write):
                pipeline.run(config)
            lived = True
        except Killed:
            assert run("verify", out)[0] == 1
            pipeline.run(config)

        ids = [name for plan in open_table(str(out)).plans() for name in ids_of(open_table(str(out)), plan)]
        assert sorted(ids) == sorted(path.name for path in archive.glob("*.png"))
    assert write > 5


def ids_of(table: CaptionsTable, plan: Plan) -> list[str]:
    return [name for part in plan.parts for name in table.read_plan_part(plan, part)["image_id"].to_pylist()]


def test_an_extension_that_lost_parts_is_proven_only_after_it_was_extended_again(
    tmp_path: Path, archive: Path, finished: Path
) -> None:
    """What it selected is not what the first command selected."""
    out, first = tmp_path / "out", {"exclude": ["00001*", "00002*"]}
    pipeline.run(caption_config(archive, out, source=first))
    pipeline.run(caption_config(archive, out, rows_per_file=8, extend=True, plan_only=True))
    table = open_table(str(out))
    lose_last_parts(table, 1, 1)

    assert pipeline.run(caption_config(archive, out, source=first)) == 0
    assert named(verify(table).problems, "run the same `captioner caption` command again, with --extend")
    assert pipeline.run(caption_config(archive, out, extend=True)) == 0

    assert verify(table).proven
    assert by_image(contents(out)) == by_image(contents(finished))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_list_of_rows_to_caption_again_is_whole_or_lost_and_said(
    tmp_path: Path, archive: Path, finished: Path, lost: int
) -> None:
    """Each of its parts knows the others."""
    config = caption_config(archive, shutil.copytree(finished, tmp_path / "out"))
    table = open_table(config.output.path)
    plan = make_retry_plan(table, indices={part: np.array([2, 3, 5]) for part in table.published_parts()})
    assert plan is not None
    before = table.plans()
    lose_last_parts(table, plan.generation, lost)

    problems = restore_table(table, open_source(config.source))

    assert table.plans() == (before[:-1] if lost else before)
    assert named(problems, "the list of what to caption again is lost") == bool(lost)


def test_a_plan_is_not_made_again_from_a_source_that_has_changed(
    tmp_path: Path, archive: Path, unpublished: Path
) -> None:
    """Images would change places, or be planned without a word."""
    out, changed = shutil.copytree(unpublished, tmp_path / "out"), shutil.copytree(archive, tmp_path / "changed")
    (out / "table.json").write_text((out / "table.json").read_text().replace(str(archive), str(changed)))
    (changed / "000009.png").unlink()
    (out / "plan/g000/part-00000.parquet").write_bytes(b"")

    code, output = run("caption", changed, out, "--model", "fake", "--local")

    assert code == 1
    assert "has changed since it was listed; restore" in output
    assert not verify(open_table(str(out))).proven


def test_strangers_in_the_folders_of_a_table_are_skipped_or_named(
    tmp_path: Path, archive: Path, finished: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    for name in ("captions/_SUCCESS", "captions/.DS_Store", "plan/notes/plan.json", "plan/g000/x.txt", "history/y"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("no file of the table")
    assert verify(open_table(str(out))).proven
    assert pipeline.run(caption_config(archive, out)) == 0

    shutil.copy(out / "captions/part-00000.parquet", out / "captions/part-00000 (copy).parquet")
    result = verify(open_table(str(out)))

    assert named(result.problems, "captions/part-00000 (copy).parquet")  # who reads the folder reads its rows twice


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("mode", [0o700, 0o555])
def test_a_table_of_somebody_else_is_one_line(archive: Path, finished: Path, mode: int) -> None:
    """Unreadable, or readable and not writable."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        out = Path(shutil.copytree(finished, Path(folder) / "out"))
        images = shutil.copytree(archive, Path(folder) / "archive")
        (out / "table.json").write_text((out / "table.json").read_text().replace(str(archive), str(images)))
        caption = ("caption", images, out, "--model", "fake", "--local", "--rows-per-file", "16", "--retry-failed")
        commands = [("status", out), ("verify", out), ("report", out), caption]
        for words in commands:  # imports what the commands need: somebody else may not read it
            run(*words)
        for path in (out, *out.rglob("*")):
            path.chmod(mode if path.is_dir() else mode & 0o444)
        Path(folder).chmod(0o755)
        try:
            os.seteuid(65534)
            outcomes = [run(*words) for words in commands]
        finally:
            os.seteuid(0)

    assert [code for code, _ in outcomes] == ([1, 1, 1, 1] if mode == 0o700 else [0, 0, 1, 1])
    for code, output in outcomes:
        assert code == 0 or output.splitlines()[-1].startswith("captioner: error: "), output
        assert code == 0 or "ermission denied" in output, output


def run(*words: object) -> tuple[int, str]:
    """Return the exit code of a command, and what it printed. A traceback fails the test."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0), output.getvalue()
