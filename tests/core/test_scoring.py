"""The figures: WER and its relatives, CIDEr-D, BLEU, ROUGE-L, baselines, intervals; expected values made by hand."""

import json
import math
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.scoring.bootstrap import difference_interval, mean_interval, wer_interval
from captioner.scoring.coco_metrics import bleu, cider_d, longest_common, rouge_l
from captioner.scoring.normalise import caption_tokens, normalise
from captioner.scoring.scores import ScoreSums
from captioner.scoring.wer import Edits, corpus_wer, human_wer, match_captions, shuffled_wer, word_edits

WORDS = st.lists(st.sampled_from(["a", "dog", "cat", "runs", "on", "grass", "red"]), max_size=8).map(" ".join)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A Dog's T-shirt, red!", "a dogs t shirt red"),
        ("  two\twhite\n cats ", "two white cats"),
        ("ＦＵＬＬ ﬁsh", "full fish"),
        ("3.5 m and 1,000 at 10:30.", "3.5 m and 1,000 at 10 30"),
        ("2 dogs", "2 dogs"),
        ("ÉCOLE “naïve” — œuvre", "école naïve œuvre"),
        ("नमस्ते दुनिया!", "नमस्ते दुनिया"),
        ("snake_case & more", "snake case more"),
        ("?!", ""),
        ("一只 红色的狗。", "一只红色的狗"),
        ("T恤 shirt 2只", "t恤 shirt 2只"),
        ("كَلْبٌ أحـــمر، جميل", "كلب أحمر جميل"),
        ("می\u200cدود", "میدود"),
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalise(text) == normal
    assert normalise(normal) == normal


@pytest.mark.parametrize(
    ("reference", "caption", "edits", "count"),
    [
        ("一只红色的狗", "一只黑色的狗。", 1, 6),
        ("一只红色的狗", "一只 红色的 狗", 0, 6),
        ("赤いTシャツを着た犬", "赤いTシャツの猫", 4, 10),  # を着た犬 -> の猫
        ("หมาสีแดง", "แมวสีแดง", 2, 7),  # ห ม า -> แ ม ว; the mark of สี belongs to it
        ("ໝາສີແດງ", "ແມວສີແດງ", 2, 7),  # as in Thai; normalised, ໝ is two letters
        ("ឆ្កែក្រហម", "ឆ្កែខ្មៅ", 3, 4),  # ឆ្កែ and ក្រ ហ ម, of which ខ្មៅ replaces one
        ("ခွေးနီ", "ခွေးမည်း", 2, 2),  # ခွေး နီ -> ခွေး မ ည်း
        ("كلبٌ أحمر يجري", "كلب أسود يجري", 1, 3),
        ("एक लाल कुत्ता।", "एक काला कुत्ता", 1, 3),
    ],
)
def test_words_are_split_as_the_language_is_written(reference: str, caption: str, edits: int, count: int) -> None:
    [counted] = word_edits([(reference, caption)])

    assert (counted.edits, counted.words) == (edits, count)


@pytest.mark.parametrize(
    ("references", "unit"),
    [
        (["一只红色的狗", "两只猫在沙发上"], "characters"),
        (["a red dog", "two cats on a sofa in 上海"], "words and characters"),
        (["a red dog", "एक लाल कुत्ता"], "words"),
    ],
)
def test_scores_name_what_they_count(references: list[str], unit: str) -> None:
    sums = ScoreSums()
    for number, match in enumerate(match_captions(references, [[text] for text in references])):
        sums.add(number, str(number), references[number], [references[number]], match)
    scores = sums.scores()

    assert (scores.unit, scores.wer, scores.cer) == (unit, 0, 0)
    assert scores.cider_d == pytest.approx(10 if unit == "characters" else scores.cider_d)


def test_tokens_hold_whole_letters_and_characters() -> None:
    assert caption_tokens("एक लाल कुत्ता।") == ["एक", "लाल", "कुत्ता"]
    assert caption_tokens("白い犬、T恤") == ["白", "い", "犬", "t", "恤"]


def test_tokens_are_those_of_coco_caption() -> None:
    assert caption_tokens("The dog's T-shirt isn't red, it's 3.5 m (wide)...") == [
        *("the", "dog", "'s", "t-shirt", "is", "n't", "red", "it", "'s", "3.5", "m", "wide")
    ]


@pytest.mark.parametrize(
    ("reference", "caption", "edits"),
    [
        ("this is a test", "This test.", Edits(0, 2, 0, 2)),
        ("a red dog", "a blue dog", Edits(1, 0, 0, 2)),
        ("a dog", "a big brown dog", Edits(0, 0, 2, 2)),
        ("x", "", Edits(0, 1, 0, 0)),
        ("", "a dog", Edits(0, 0, 2, 0)),
        ("", "", Edits(0, 0, 0, 0)),
        ("a dog", "A DOG!", Edits(0, 0, 0, 2)),
    ],
)
def test_word_edits(reference: str, caption: str, edits: Edits) -> None:
    assert word_edits([(reference, caption)]) == [edits]


def test_rate_may_exceed_one_and_counts_words_said_into_nothing() -> None:
    assert Edits(1, 0, 9, 0).rate == 10.0
    assert Edits(0, 0, 3, 0).rate == 3.0


def test_best_reference_is_the_one_of_lowest_wer_not_of_fewest_edits() -> None:
    (match,) = match_captions(["a dog on grass here"], [["a dog", "a dog on the green grass near here today now"]])

    assert [edits.rate for edits in match.edits] == [1.5, 0.5]
    assert match.best == 1


def test_corpus_wer_is_summed_edits_over_summed_words() -> None:
    captions = ["a dog", "a red cat on the mat here now"]
    references = [["a cat"], ["a red cat on the mat here today", "no"]]

    assert corpus_wer(captions, references) == (1 + 1) / (2 + 8)
    assert corpus_wer([], []) is None
    assert corpus_wer(["a dog"], [["!"]]) is None


@given(st.lists(st.tuples(WORDS, WORDS), max_size=6))
def test_wer_agrees_with_jiwer_for_plain_words(pairs: list[tuple[str, str]]) -> None:
    import jiwer

    for (reference, caption), edits in zip(pairs, word_edits(pairs), strict=True):
        if reference and caption:
            output = jiwer.process_words(reference, caption)
            assert edits.edits == output.substitutions + output.deletions + output.insertions
            assert edits.hits + edits.substitutions + edits.deletions == len(reference.split())


TEXTS = st.text("abc .'犬只หี", max_size=12)


@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=4)), min_size=1, max_size=4))
def test_corpus_wer_counts_the_edits_of_the_best_references(rows: list[tuple[str, list[str]]]) -> None:
    captions, references = [caption for caption, _ in rows], [texts for _, texts in rows]
    best = [match.best_edits for match in match_captions(captions, references)]
    words = sum(edits.words for edits in best)

    expected = sum(edits.edits for edits in best) / words if words else None
    assert corpus_wer(captions, references) == expected


CAPTIONS = [["a", "dog", "runs"], ["the", "red", "car", "is", "parked", "here"]]
REFERENCES = [
    [["a", "dog", "runs", "fast"], ["the", "dog", "is", "running"]],
    [["the", "red", "car", "is", "parked", "there"]],
]


def test_bleu_by_hand() -> None:
    # Matches of 1- to 4-grams: 3 + 5, 2 + 4, 1 + 3, 0 + 2 of 9, 7, 5, 3. Said 9 words; closest references 4 + 6.
    scores = bleu(CAPTIONS, REFERENCES)
    precisions = [8 / 9, 6 / 7, 4 / 5, 2 / 3]
    expected = [math.exp(1 - 10 / 9) * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]

    assert scores == pytest.approx(expected, abs=1e-6)
    assert bleu([], []) is None


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence 3 of 3 said and 4 known words; the best recall is that of the first reference.
    assert rouge_l(CAPTIONS[0], REFERENCES[0]) == pytest.approx(2.44 * 0.75 / (0.75 + 1.44))
    assert rouge_l([], REFERENCES[0]) == 0
    assert rouge_l(["zebra"], REFERENCES[0]) == 0


@given(WORDS, WORDS)
def test_longest_common_subsequence_laws(first: str, second: str) -> None:
    left, right = first.split(), second.split()

    assert longest_common(left, right) == longest_common(right, left) <= min(len(left), len(right))
    assert longest_common(left, left) == len(left)


def test_cider_d_by_hand() -> None:
    # Two images, one reference each. Of n-grams in both, "a", the idf is 0; of all others log 2.
    references = [[["a", "dog"]], [["a", "cat"]]]

    assert cider_d([["a", "dog"], ["a", "cat"]], references) == pytest.approx([5.0, 5.0])  # no 3- and 4-grams
    # "a dog dog": unigrams a, dog x 2; bigrams a-dog, dog-dog. Counts are clipped, the length differs by one bigram.
    unigrams, bigrams = 1 * 1 / (2 * 1), 1 / math.sqrt(2)
    expected = 10 * math.exp(-1 / 72) * (unigrams + bigrams) / 4
    assert cider_d([["a", "dog", "dog"], ["zebra"]], references) == pytest.approx([expected, 0.0])
    assert cider_d([], []) == []


def test_published_scores_of_a_worked_example() -> None:
    """The example of the clipscore repository (MIT), whose scores were made with coco-caption."""
    references = [
        [
            "two cats are sleeping next to each other.",
            "a grey cat is cuddling with an orange cat on a blanket.",
            "the orange cat is happy that the black cat is close to it.",
        ],
        [
            "a dog is wearing ear muffs as it lies on a carpet.",
            "a black dog and an orange cat are looking at the photographer.",
            "headphones are placed on a dogs ears.",
        ],
    ]
    captions = [
        "an orange cat and a grey cat are lying together.",
        "a black dog wearing headphones looks at the camera as an orange cat walks in the background.",
    ]
    sums = ScoreSums()
    for number, match in enumerate(match_captions(captions, references)):
        sums.add(number, str(number), captions[number], references[number], match)
    scores = sums.scores()

    assert scores.bleu is not None
    assert [round(score, 4) for score in scores.bleu] == [0.6667, 0.4899, 0.3469, 0.0]
    assert round(scores.rouge_l or 0, 4) == 0.428
    assert round(scores.cider_d or 0, 4) == 0.5637


def test_shuffled_captions_all_leave_their_images() -> None:
    captions = [f"w{number}" for number in range(7)]

    assert shuffled_wer(captions, [[text] for text in captions], seed=3) == 1.0  # one kept would lower it
    assert shuffled_wer(["a"], [["a"]]) is None
    assert human_wer([["a dog", "a dog", "x"], ["only one"]]) == 0.0
    assert human_wer([["only one"]]) is None


def test_captions_of_other_images_have_no_lift_in_any_script() -> None:
    for colours, shapes, sentence in (
        ("红蓝绿黄", ("圆形", "方形", "三角形"), "桌子上有一个{}色的{}"),
        (("red", "blue", "green", "yellow"), ("circle", "square", "triangle"), "a {} {} is on the table"),
    ):
        texts = [sentence.format(colour, shape) for colour in colours for shape in shapes]
        captions, references = texts[1:] + texts[:1], [[text, texts[0]] for text in texts]
        sums = ScoreSums()
        for number, match in enumerate(match_captions(captions, references)):
            sums.add(number, str(number), captions[number], references[number], match)
        scores = sums.scores()
        assert (scores.human_wer or 1.0) < 0.5
        assert abs(scores.lift or 1.0) < 0.25


def test_no_rows_are_no_data() -> None:
    scores = ScoreSums().scores()

    assert scores.num_rows == 0
    for name in ("wer", "interval", "mer", "cer", "shuffled_wer", "lift", "human_wer", "cider_d", "bleu", "rouge_l"):
        assert getattr(scores, name) is None, name


def test_scores_by_hand_and_in_any_order() -> None:
    rows = [("1", "a dog", ["a cat", "the old dog sits"]), ("2", "red car here", ["red car", "a red car there"])]
    scores = []
    for order in (rows, rows[::-1]):
        sums = ScoreSums(seed=5)
        matches = match_captions([row[1] for row in order], [row[2] for row in order])
        for (name, caption, references), match in zip(order, matches, strict=True):
            sums.add(int(name), name, caption, references, match)
        scores.append(sums.scores())

    assert scores[0] == scores[1]
    assert scores[0].wer == (1 + 1) / (2 + 2)  # "a cat": 1 of 2; "red car": 1 of 2
    assert (scores[0].substitutions, scores[0].deletions, scores[0].insertions) == (1, 0, 1)
    assert scores[0].mer == 2 / (2 + 3)
    assert scores[0].cer == (3 + 5) / (5 + 7)  # dog-cat; " here"
    assert scores[0].lift == 1 - 0.5 / scores[0].shuffled_wer


def test_intervals_are_seeded_hold_the_figure_and_narrow_with_more_rows() -> None:
    few, many = Counter({(1, 10): 30, (4, 10): 20}), Counter({(1, 10): 3000, (4, 10): 2000})
    narrow, wide = wer_interval(many, seed=1), wer_interval(few, seed=1)

    assert wide == wer_interval(Counter(dict(reversed(few.items()))), seed=1)
    assert narrow is not None
    assert wide is not None
    assert wide[0] < narrow[0] < 0.22 < narrow[1] < wide[1]
    # Standard error of the mean rate: 0.15 * sqrt(0.6 * 0.4 * 4) / sqrt(50) = 0.0208
    assert wide[1] - wide[0] == pytest.approx(2 * 1.96 * 0.0208, rel=0.15)
    assert wer_interval(Counter({(1, 2): 1}), seed=1) is None


def test_a_paired_difference_is_sharper_than_its_parts() -> None:
    rows = Counter({(1, 10, 2, 10): 50, (5, 10, 6, 10): 50, (9, 10, 9, 10): 20})
    interval = difference_interval(rows, seed=0)

    assert interval is not None
    assert -0.1 < interval[0] < interval[1] < 0
    assert mean_interval([0.5, 0.5, 0.5], seed=0) == (0.5, 0.5)


def test_the_metric_loads_by_path_without_network(tmp_path) -> None:
    code = """
import json, evaluate, captioner.scoring.caption_wer as module
metric = evaluate.load(module.__file__)
print(json.dumps(metric.compute(predictions=["a dog", "x"], references=[["a dog runs", "one dog"], ["x"]])["wer"]))
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "HF_HUB_DISABLE_TELEMETRY": "1"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout.splitlines()[-1]) == pytest.approx(1 / 4)
