"""Captions judged by their images: CLIPScore and its relatives, retrieval, resuming, and what comes of it."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import caption_config
from PIL import Image

from captioner import pipeline
from captioner.config import AltTextConfig, JudgeTableConfig
from captioner.data import Chunk
from captioner.errors import ModelError, UsageError
from captioner.models.dual_encoder import open_encoder, resolve_judge
from captioner.publishing.alt_text.command import make_alt_texts
from captioner.publishing.review.queue import Queue
from captioner.run import judging
from captioner.run.selector import no_reviews, parse_selector, rows_matching, select
from captioner.scoring.clip_score import clip_scores, compare_with_images, ref_clip_score
from captioner.scoring.judgements import JUDGE_FILE, judge_name
from captioner.starter.render import render_scenes
from captioner.store.table import CaptionsTable, open_table
from captioner.testing.tiny_clip import make_tiny_clip, make_tiny_siglip
from ray_jobs.cli import main

COUNT, EXCHANGED = 200, 60

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip") / "model", num_steps=120)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    render_scenes(folder, COUNT, width=64)
    return folder


@pytest.fixture(scope="module")
def exchanged_out(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """A table in which each of the first images has the caption of the one before it; the others are right."""
    out = tmp_path_factory.mktemp("tables") / "out"
    pipeline.run(caption_config(scenes, out, rows_per_file=128))
    parts = sorted((out / "captions").iterdir())
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    captions = [row["reference_captions"][0] for row in rows]
    captions = captions[EXCHANGED - 1 : EXCHANGED] + captions[: EXCHANGED - 1] + captions[EXCHANGED:]
    for row, caption in zip(rows, captions, strict=True):
        row["caption"] = caption
    for part in parts:
        table = pq.read_table(part)
        pq.write_table(pa.Table.from_pylist(rows[: len(table)], schema=table.schema), part)
        rows = rows[len(table) :]
    return out


@pytest.fixture(scope="module")
def judged_out(exchanged_out: Path, clip: Path) -> Path:
    judge(exchanged_out, clip)
    return exchanged_out


def settings(model: Path, **judge: Any) -> JudgeTableConfig:
    return JudgeTableConfig.model_validate({"judge": {"name": str(model), "device": "cpu", **judge}})


def judge(out: Path, model: Path, engine: judging.JudgeEngine | None = None) -> dict[str, Any]:
    return judging.judge(str(out), settings(model), engine or judging.LocalJudgeEngine())


class Watched(judging.LocalJudgeEngine):
    """The engine of one process, which notes the chunks that it is given."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []

    def judge_chunks(self, work: judging.JudgeWork, chunks: list[Chunk]) -> Iterator[tuple[Chunk, pa.Table]]:
        self.chunks += chunks
        return super().judge_chunks(work, chunks)


def scores_of(table: CaptionsTable) -> list[dict[str, Any]]:
    return [row for part in (0, 1) for row in table.directory.read_table(judge_name(part)).to_pylist()]


# The scores


def test_scores_by_hand() -> None:
    assert clip_scores(np.float32([0.3, -0.2, 1])).tolist() == pytest.approx([0.75, 0, 2.5])
    assert ref_clip_score(0.75, [0.5, 0.6]) == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6))
    assert ref_clip_score(0.75, [-0.1]) == 0
    assert ref_clip_score(0.0, [-0.1]) == 0


def test_captions_beside_other_images_by_hand() -> None:
    texts = np.float32([[1, 0], [0, 1], [0.6, 0.8], [0, 1]])
    images = np.float32([[0.8, 0.6], [0, 1], [0, 1], [1, 0]])

    scores = compare_with_images(texts, images, ["a", "b", "b", "c"], 100, seed=0)  # the second and third are copies

    assert scores.own.tolist() == pytest.approx([2.0, 2.5, 2.0, 0.0])
    assert scores.others.tolist() == pytest.approx([2.5 * (0 + 1) / 2, 2.5 * 0.6 / 2, 2.5 * (0.96 + 0.6) / 2, 2.0])
    assert scores.retrieved.tolist() == [False, True, False, False]
    assert scores.num_others.tolist() == [2, 2, 2, 2]


def test_one_image_alone_has_no_others() -> None:
    scores = compare_with_images(np.float32([[1, 0]]), np.float32([[1, 0]]), ["a"], 100, seed=0)

    assert (scores.num_others.tolist(), np.isnan(scores.others).tolist()) == ([0], [True])


def test_a_model_with_set_weights_gives_the_scores_of_the_paper(tmp_path: Path) -> None:
    """Every image is embedded as (3, 4) / 5, every text as (1, 0): CLIPScore 2.5 * 0.6, with references 1.2."""
    import torch
    from transformers import CLIPModel

    path = make_tiny_clip(tmp_path / "model")
    model = CLIPModel.from_pretrained(path)
    with torch.no_grad():
        for norm in (model.vision_model.post_layernorm, model.text_model.final_layer_norm):
            norm.weight.zero_()
            norm.bias.copy_(torch.eye(64)[0])
        model.visual_projection.weight.zero_()
        model.text_projection.weight.zero_()
        model.visual_projection.weight[:2, 0] = torch.tensor([3.0, 4.0])
        model.text_projection.weight[0, 0] = 7.0
    model.save_pretrained(path)
    render_scenes(tmp_path / "scenes", 5, width=32)
    pipeline.run(caption_config(tmp_path / "scenes", tmp_path / "out"))

    figures = judge(tmp_path / "out", path)

    assert (figures["clip_score"], figures["clip_score_others"]) == pytest.approx((1.5, 1.5))
    assert figures["ref_clip_score"] == pytest.approx(2 * 1.5 * 1 / (1.5 + 1))
    assert (figures["lift"], figures["retrieved"]) == (pytest.approx(0, abs=1e-6), 0)  # a tie finds nothing
    assert (figures["num_others"], figures["retrieved_by_chance"]) == (4, 0.2)


def test_embeddings_are_those_of_transformers(clip: Path, scenes: Path) -> None:
    import torch
    from transformers import CLIPModel, CLIPProcessor

    files = [scenes / "images" / f"{index:05d}.png" for index in range(3)]
    images, texts = [Image.open(file).convert("RGB") for file in files], ["a red ring", "a dog", "x " * 100]
    inputs = CLIPProcessor.from_pretrained(clip, backend="pil")(
        images=images, text=texts, padding=True, truncation=True, max_length=48, return_tensors="pt"
    )
    with torch.inference_mode():
        output = CLIPModel.from_pretrained(clip)(**inputs)

    encoder = open_encoder(resolve_judge(str(clip), None), "cpu", batch_size=2)
    pixels = np.stack([np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) for image in images])

    assert np.allclose(encoder.embed_texts(texts), output.text_embeds, atol=1e-5)
    assert np.allclose(encoder.embed_images(pixels), output.image_embeds, atol=1e-2)


def test_lift_and_retrieval_tell_right_captions_from_exchanged_ones(judged_out: Path) -> None:
    table = open_table(str(judged_out))
    rows = scores_of(table)
    lifts, retrieved = (np.array([row[name] for row in rows], float) for name in ("lift", "retrieved"))
    wrong = np.arange(COUNT) < EXCHANGED

    assert (lifts[~wrong][:, None] > lifts[wrong]).mean() >= 0.95  # the area under the ROC curve
    assert retrieved[wrong].mean() <= 0.05 < 0.2 < retrieved[~wrong].mean()
    figures = table.directory.read_json(JUDGE_FILE)
    assert figures["retrieved"] == pytest.approx(retrieved.mean())
    assert figures["retrieved_by_chance"] < 0.015  # 100 others in the first part; fewer in the second, of 72
    assert figures["lift"] == pytest.approx(lifts.mean(), abs=1e-6)
    assert figures["clip_score"] - figures["clip_score_others"] == pytest.approx(figures["lift"], abs=1e-5)
    assert 0 < figures["ref_clip_score"] <= figures["clip_score"]
    weakest = [row["image_id"] for row in figures["weakest"]]
    assert weakest == [rows[index]["image_id"] for index in np.argsort(lifts)[:20]]


# A run


def test_the_same_command_judges_only_what_is_new(judged_out: Path, clip: Path, tmp_path: Path) -> None:
    out = shutil.copytree(judged_out, tmp_path / "out")
    table, engine = open_table(str(out)), Watched()
    before = scores_of(table)
    judge(out, clip, engine)
    assert engine.chunks == []
    (out / judge_name(1)).unlink()  # as after a kill: parts are written one by one

    judge(out, clip, engine)

    assert [(chunk.part, chunk.num_rows) for chunk in engine.chunks] == [(1, COUNT - 128)]
    assert scores_of(table) == before


def test_other_settings_or_captions_are_judged_anew(judged_out: Path, clip: Path, tmp_path: Path) -> None:
    out, engine = shutil.copytree(judged_out, tmp_path / "out"), Watched()

    judging.judge(str(out), settings(clip, num_others=5), engine)
    assert {chunk.part for chunk in engine.chunks} == {0, 1}
    assert {row["num_others"] for row in scores_of(open_table(str(out)))} == {5}

    engine.chunks.clear()
    rows = pq.read_table(out / "captions" / "part-00001.parquet")
    later = pa.compute.add(rows["created_at"], pa.scalar(1_000_000, pa.duration("us")))
    index = rows.schema.get_field_index("created_at")
    pq.write_table(rows.set_column(index, rows.schema.field(index), later), out / "captions" / "part-00001.parquet")
    judging.judge(str(out), settings(clip, num_others=5), engine)
    assert {chunk.part for chunk in engine.chunks} == {1}


def test_images_that_changed_or_are_gone_are_counted_and_named(
    exchanged_out: Path, clip: Path, tmp_path: Path, capsys
) -> None:
    shutil.copytree(exchanged_out, tmp_path / "out")
    table = open_table(str(tmp_path / "out"))
    (tmp_path / "out" / "checks" / "judge.json").unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "out" / "checks" / "judge", ignore_errors=True)
    images = tmp_path / "scenes"
    shutil.copytree(Path(table.info["source"]["path"]), images)
    table.update(source=table.info["source"] | {"path": str(images)})
    Image.new("RGB", (9, 9)).save(images / "images" / "00003.png")
    (images / "images" / "00150.png").unlink()

    with pytest.raises(SystemExit) as ended:
        main(["judge", str(tmp_path / "out"), "--model", str(clip), "--local", "--device", "cpu"])

    assert ended.value.code == 0
    printed, errors = capsys.readouterr()
    assert re.search(r"^judged 200/200 \(100%\) in [0-9:]+  failed 2$", errors, re.MULTILINE)
    assert "not judged: 1 image (changed), such as 'images/00003.png'" in printed
    assert "not judged: 1 image (not_found), such as 'images/00150.png'" in printed
    assert "finds its image" in printed
    page = (tmp_path / "out" / "report" / "index.html").read_text(encoding="utf-8")
    assert "198 captions judged by" in page
    assert "The weakest captions, lowest lift first" in page


def test_what_cannot_judge_is_refused_before_anything_is_read(exchanged_out: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="judge needs --model"):
        judging.judge(str(exchanged_out), JudgeTableConfig(), judging.LocalJudgeEngine())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "git"}))
    with pytest.raises(ModelError, match="model_type 'git' does not judge captions; give a model of type clip or sig"):
        judge(exchanged_out, tmp_path)


def test_a_run_that_is_not_finished_is_not_judged(scenes: Path, clip: Path, tmp_path: Path) -> None:
    pipeline.run(caption_config(scenes, tmp_path / "out", plan_only=True))

    with pytest.raises(UsageError, match="is not finished"):
        judge(tmp_path / "out", clip)


# What comes of it


def test_the_weakest_captions_are_selected_and_reviewed_first(judged_out: Path, tmp_path: Path) -> None:
    out = shutil.copytree(judged_out, tmp_path / "out")
    table = open_table(str(out))
    lifts = np.array([row["lift"] for row in scores_of(table)])
    weakest = set(np.argsort(lifts)[:20].tolist())

    selection = select(table, parse_selector("judge < 10%"), "another", no_reviews(table.directory))

    selected = {index + 128 * part for part, indices in selection.indices.items() for index in indices.tolist()}
    assert selected == weakest
    with pytest.raises(UsageError, match="all judged captions are of this model and its settings"):
        select(table, parse_selector("judge<10%"), table.info["fingerprint"], {})
    make_alt_texts(table, AltTextConfig())
    queue = Queue(table, "flagged", {})
    unflagged = np.flatnonzero(~queue.flagged)
    first = next(index for index in queue._order.tolist() if not queue.flagged[index])
    assert lifts[first] == lifts[unflagged].min()
    of_weakest = Queue(table, "flagged", {}, rows_matching(table, "judge<10%", {}))
    assert sorted(of_weakest.lift(index) for index in range(len(of_weakest))) == sorted(lifts[list(weakest)].tolist())


def test_a_share_of_judged_captions_needs_some(scenes: Path, tmp_path: Path) -> None:
    pipeline.run(caption_config(scenes, tmp_path / "out", source={"limit": 4}))
    table = open_table(str(tmp_path / "out"))

    assert parse_selector("judge below 5% or flags").text == "flags or judge<5%"
    with pytest.raises(UsageError, match="no caption is judged; run captioner judge"):
        select(table, parse_selector("judge<5%"), "another", {})
    with pytest.raises(UsageError, match="give one judge<Q"):
        parse_selector("judge<0%")


def test_references_of_a_file_replace_those_of_the_source_and_are_remembered(
    scenes: Path, clip: Path, tmp_path: Path
) -> None:
    out, file = tmp_path / "out", tmp_path / "references.jsonl"
    pipeline.run(caption_config(scenes, out, source={"limit": 12}))
    names = (
        open_table(str(out)).directory.read_table("captions/part-00000.parquet", ["image_id", "caption"]).to_pylist()
    )
    # The caption itself is its best reference: a cosine of 1.
    file.write_text("\n".join(json.dumps({"image": row["image_id"], "text": row["caption"]}) for row in names[:5]))
    config = settings(clip, references=str(file))
    own = judge(out, clip)
    given = judging.judge(str(out), config, judging.LocalJudgeEngine())
    watched = Watched()
    later = judge(out, clip, watched)
    source_again = judging.judge(str(out), settings(clip, references=""), judging.LocalJudgeEngine())

    scores = open_table(str(out)).directory.read_table(judge_name(0))
    assert (own["num_with_references"], given["num_with_references"]) == (12, 5)
    clip_scores = scores["clip_score"].to_pylist()[:5]
    expected = [2 * score / (score + 1) if score > 0 else 0 for score in clip_scores]
    assert given["ref_clip_score"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert (later, watched.chunks) == (given, [])
    assert source_again == own
    file.write_text(json.dumps({"image": "no.png", "text": "a"}))
    with pytest.raises(UsageError, match="none of its names"):
        judging.judge(str(out), config, judging.LocalJudgeEngine())


def test_a_siglip_gives_the_scores_of_transformers(scenes: Path, tmp_path: Path) -> None:
    """Its texts are padded to the full length, and its score is the cosine without its own scale and bias."""
    import torch
    from transformers import SiglipModel, SiglipProcessor

    path = make_tiny_siglip(tmp_path / "model")
    files = sorted((scenes / "images").iterdir())[:6]
    images, texts = [Image.open(file).convert("RGB") for file in files], ["a red ring", "a dog", "x " * 100] * 2
    inputs = SiglipProcessor.from_pretrained(path, backend="pil")(
        images=images, text=texts, padding="max_length", truncation=True, max_length=24, return_tensors="pt"
    )
    inputs.pop("attention_mask", None)  # the tokenizer of a SigLIP gives none
    model = SiglipModel.from_pretrained(path)
    with torch.inference_mode():
        output = model(**inputs)
        cosines = (output.logits_per_image - model.logit_bias) / model.logit_scale.exp()  # [images, texts]

    encoder = open_encoder(resolve_judge(str(path), None), "cpu", batch_size=4)
    pixels = np.stack([np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) for image in images])
    text_embeds, image_embeds = encoder.embed_texts(texts), encoder.embed_images(pixels)
    scores = compare_with_images(text_embeds, image_embeds, [str(index) for index in range(6)], 100, seed=0)

    assert len({round(float(value), 3) for value in cosines.flatten()}) > 10
    assert np.allclose(text_embeds, output.text_embeds, atol=1e-5)
    assert np.allclose(image_embeds @ text_embeds.T, cosines, atol=2e-3)
    by_hand = 2.5 * cosines.clamp(min=0).numpy()
    assert scores.own == pytest.approx(np.diag(by_hand), abs=5e-3)
    others = [(by_hand[:, index].sum() - by_hand[index, index]) / 5 for index in range(6)]
    assert scores.others == pytest.approx(others, abs=5e-3)

    pipeline.run(caption_config(scenes, tmp_path / "out", source={"limit": 6}))
    assert judge(tmp_path / "out", path)["num_judged"] == 6
