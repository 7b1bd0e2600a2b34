"""One order of pairs for all workers, whatever their number, from any step."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.config import TrainingConfig
from captioner.errors import UsageError
from captioner.training.order import GlobalOrder, Share, caption_index
from captioner.training.schedule import best_of, is_stale, make_schedule


def pairs(captions: list[int]) -> pa.Table:
    """Return pairs of images with these numbers of captions."""
    ids = [f"image-{number}" for number in range(len(captions))]
    texts = [[f"{name} caption {k}" for k in range(count)] for name, count in zip(ids, captions, strict=True)]
    return pa.table({"image_id": ids, "reference_captions": pa.array(texts, pa.list_(pa.string()))})


def read(order: GlobalOrder, share: Share, first: int, last: int) -> list[list[tuple[str, str]]]:
    """Return the pairs that a worker reads in each step."""
    rows = [row for table in order.tables(share, first, last) for row in table.to_pylist()]
    each = share.batch_size * share.accumulation
    pairs = [(row["image_id"], row["caption"]) for row in rows]
    return [pairs[start : start + each] for start in range(0, len(pairs), each)]


counts = st.lists(st.integers(1, 4), min_size=1, max_size=20)
choices = st.sampled_from(["random", "first", "all"])


@settings(max_examples=60, deadline=None)
@given(
    captions=counts, workers=st.integers(1, 4), batch=st.integers(1, 3), accumulation=st.integers(1, 3), choice=choices
)
def test_workers_together_read_the_pairs_of_a_single_worker(captions, workers, batch, accumulation, choice) -> None:
    order = GlobalOrder(pairs(captions), 7, choice)
    shares = [Share(rank, workers, batch, accumulation) for rank in range(workers)]

    steps = zip(*(read(order, share, 0, 6) for share in shares), strict=True)
    together = [[pair for part in parts for pair in part] for parts in steps]

    alone = read(order, Share(0, 1, workers * batch * accumulation), 0, 6)
    assert [sorted(step) for step in together] == [sorted(step) for step in alone]


@settings(max_examples=60, deadline=None)
@given(captions=counts, start=st.integers(0, 9), choice=choices)
def test_a_resumed_run_continues_with_the_same_pairs(captions, start, choice) -> None:
    order, share = GlobalOrder(pairs(captions), 7, choice), Share(0, 1, 3)

    assert read(order, share, start, 10) == read(order, share, 0, 10)[start:]


@settings(max_examples=60, deadline=None)
@given(captions=counts, choice=choices)
def test_each_epoch_has_every_pair_once(captions, choice) -> None:
    order = GlobalOrder(pairs(captions), 7, choice)
    first = order.take(np.arange(len(order))).to_pylist()
    second = order.take(np.arange(len(order), 2 * len(order))).to_pylist()

    wanted = sum(captions) if choice == "all" else len(captions)
    for epoch in (first, second):
        assert len({(row["image_id"], row["caption"]) for row in epoch}) == wanted
        assert all(row["caption"] in row["reference_captions"] for row in epoch)
    if choice == "first":
        assert all(row["caption"] == row["reference_captions"][0] for row in first)


def test_epochs_differ_in_order_and_captions() -> None:
    order = GlobalOrder(pairs([5] * 40), 7, "random")
    first, second = (order.take(np.arange(e * 40, e * 40 + 40)).to_pylist() for e in (0, 1))

    assert [row["image_id"] for row in first] != [row["image_id"] for row in second]
    chosen = {row["image_id"]: row["caption"] for row in first}
    assert sum(chosen[row["image_id"]] != row["caption"] for row in second) > 20


def test_every_caption_is_chosen_about_equally_often() -> None:
    numbers = [caption_index(3, epoch, f"image-{n}", 4) for epoch in range(20) for n in range(100)]

    assert all(400 < numbers.count(k) < 600 for k in range(4))


def test_the_number_of_steps_depends_on_epochs_and_the_global_batch() -> None:
    schedule = make_schedule(
        TrainingConfig(num_train_epochs=2, per_device_train_batch_size=8, gradient_accumulation_steps=2), 100, 3
    )

    assert (schedule.max_steps, schedule.global_batch_size, schedule.eval_steps) == (5, 48, 2)
    assert [step for step in range(1, 6) if schedule.is_saved(step)] == [2, 4, 5]


def test_saving_at_steps_without_an_evaluation_is_refused() -> None:
    with pytest.raises(UsageError, match="--save-steps 3: must be a multiple of --eval-steps"):
        make_schedule(TrainingConfig(max_steps=10, eval_steps=2, save_steps=3), 100, 1)


def test_a_run_is_stale_after_patience_evaluations_without_improvement() -> None:
    history = [{"step": step, "eval_wer": wer, "eval_loss": 1.0} for step, wer in enumerate([0.5, 0.2, 0.3, 0.2])]
    history.insert(2, {"step": 1, "loss": 0.1})

    assert best_of(history, "eval_wer")["step"] == 1
    assert is_stale(history, TrainingConfig(early_stopping_patience=2))
    assert not is_stale(history, TrainingConfig(early_stopping_patience=3))
    assert not is_stale(history, TrainingConfig())


def test_an_evaluation_without_a_number_is_never_the_best() -> None:
    history = [{"step": step, "eval_loss": loss} for step, loss in enumerate([math.nan, 2.0, 1.0, math.nan])]

    assert best_of(history, "eval_loss")["step"] == 2
    assert not is_stale(history, TrainingConfig(early_stopping_patience=2, metric_for_best_model="loss"))
