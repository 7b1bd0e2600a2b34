"""WER as a metric of Hugging Face's `evaluate`, loaded from its file and without a network."""

import pytest

import captioner.scoring.caption_wer as metric_module

CAPTIONS = ["a red ring", "a blue square", "a cross"]
REFERENCES = [["a red ring", "one ring"], ["a green square"], ["a small cross", "a cross"]]


@pytest.fixture(scope="module")
def metric():
    import evaluate

    return evaluate.load(metric_module.__file__, keep_in_memory=True)


def test_the_best_reference_of_each_image_counts(metric) -> None:
    scores = metric.compute(predictions=CAPTIONS, references=REFERENCES)

    assert (scores["edits"], scores["words"]) == (1, 8)
    assert scores["wer"] == pytest.approx(1 / 8)


def test_shuffled_captions_are_worse_and_sums_of_parts_add_up(metric) -> None:
    whole = metric.compute(predictions=CAPTIONS * 2, references=REFERENCES * 2)
    part = metric.compute(predictions=CAPTIONS, references=REFERENCES)

    assert part["shuffled_wer"] > part["wer"]
    assert (whole["edits"], whole["words"]) == (2 * part["edits"], 2 * part["words"])


def test_one_caption_has_no_baseline(metric) -> None:
    scores = metric.compute(predictions=CAPTIONS[:1], references=REFERENCES[:1])

    assert scores["wer"] == 0
    assert scores["shuffled_words"] == 0
