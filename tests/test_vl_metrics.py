"""Accuracies of answers and CIDEr-D of captions, against numbers of the reference implementations and by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgist.train.vl_cider import bleu, caption_words, cider
from fastgist.train.vl_metrics import (
    accuracy,
    aokvqa_accuracy,
    gqa_accuracy,
    normalize_answer,
    textvqa_accuracy,
    vqa_accuracy,
)
from fastgist.train.vl_records import Record

# -- answers: expectations computed with vqaEval.py (github.com/GT-Vision-Lab/VQA) and mmf's m4c_evaluators.py ----------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The two men's T-shirts.", "2 men's t shirts"),
        ("None", "0"),
        ("dont couldnt've yall'd've twas", "don't couldn't've y'all'd've 'twas"),
        ("somebody'd", "somebodyd"),
        ("1,000", "1000"),
        ("1,000 red/blue", "1000 redblue"),  # a comma between digits makes all punctuation vanish
        ("red/blue", "red blue"),
        ("red /blue", "red blue"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("e.g. this", "eg this"),
        ("p.m.", "pm"),
        ("(black)", "black"),
        ("a cat\non\ta mat", "cat on mat"),
        ("A", ""),
        ("An apple, the tree", "apple tree"),
        ("什么", "什么"),
    ],
)
def test_normalize_answer(text, said):
    assert normalize_answer(text) == said


@pytest.mark.parametrize(("given", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten(given, score):
    assert vqa_accuracy("yes", ["yes"] * given + ["no"] * (10 - given)) == pytest.approx(score)


def test_vqa_accuracy_normalises_unless_all_agree():
    assert vqa_accuracy("Two.", ["2"] * 4 + ["three"] * 6) == 1.0
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0  # the official evaluation: nothing is normalised there
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["yes "]) == 0.0  # spaces at the ends do not make a difference
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0
    assert vqa_accuracy("a", ["a"] * 2 + ["b"] * 8) == pytest.approx(0.6)
    assert vqa_accuracy("yes", ["yes"]) == 0.0  # one annotator has no others
    with pytest.raises(ValueError, match="at least one answer"):
        vqa_accuracy("yes", [])


@given(st.lists(st.sampled_from("abcd"), min_size=10, max_size=10), st.sampled_from("abcde"))
def test_vqa_accuracy_is_the_mean_over_subsets_of_nine(answers, said):
    subsets = [answers[:i] + answers[i + 1 :] for i in range(10)]
    agree = len(set(answers)) == 1
    same = [
        sum((a == said) if agree else (normalize_answer(a) == normalize_answer(said)) for a in nine) for nine in subsets
    ]
    assert vqa_accuracy(said, answers) == pytest.approx(sum(min(n / 3, 1) for n in same) / 10)


def test_textvqa_accuracy():
    assert textvqa_accuracy("Nokia?", ["nokia"] * 10) == 1.0
    assert textvqa_accuracy("dakota's", ["dakota 's"] * 10) == 1.0
    assert textvqa_accuracy("1,000", ["1000"] * 3 + ["x"] * 7) == pytest.approx(0.9)
    assert textvqa_accuracy("the red", ["red"] * 2 + ["x"] * 8) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="at least one answer"):
        textvqa_accuracy("yes", [])


def test_gqa_and_aokvqa_accuracy():
    assert gqa_accuracy("yes", "yes") == 1.0 and gqa_accuracy("Yes.", "yes") == 0.0
    assert gqa_accuracy("Yes.", "yes", normalize=True) == 1.0 and gqa_accuracy("no", "yes", normalize=True) == 0.0
    assert [aokvqa_accuracy("cab", ["cab"] * n + ["bus"] * (10 - n)) for n in (0, 1, 2, 3, 9)] == pytest.approx(
        [0, 1 / 3, 2 / 3, 1, 1]
    )
    assert aokvqa_accuracy("Cab", ["cab"] * 10) == 0.0


def _record(key, answers, dataset="vqav2", **more):
    return Record(dataset, "val", key, key, None, "q", answers, **more)


def test_accuracy_over_a_split():
    records = [
        _record(1, ("yes",) * 5 + ("no",) * 5, answer_type="yes/no"),
        _record(2, ("2",) + ("3",) * 9, answer_type="number"),
        _record(3, ("7",) * 3 + ("3",) * 7, answer_type="number"),
    ]
    assert accuracy(records, {1: "no", 2: "two", 3: "7"}) == pytest.approx(
        {"accuracy": 100 * (1 + 0.3 + 0.9) / 3, "accuracy/yes/no": 100.0, "accuracy/number": 60.0}
    )
    assert accuracy([_record(1, None)], {1: "x"}) == {}
    hard = [_record(1, ("a",) * 3, "aokvqa"), _record(2, ("b",) * 3, "aokvqa", difficult=True)]
    assert accuracy(hard, {1: "a", 2: "c"}) == {"accuracy": 100.0}
    assert accuracy([_record(1, ("a",), "gqa")], {1: "A!"}) == {"accuracy": 0.0}
    assert accuracy([_record(1, ("red",), "gqa")], {1: "Red!"}, normalize=True) == {"accuracy": 100.0}
    assert accuracy([_record(1, ("Red",) * 10, "textvqa")], {1: "red"}) == {"accuracy": 100.0}
    assert accuracy([_record(1, ("Red",) * 10, "okvqa")], {1: "red"}) == {"accuracy": 0.0}
    with pytest.raises(ValueError, match="no prediction for vqav2's question 3"):
        accuracy(records, {1: "no", 2: "two"})
    with pytest.raises(ValueError, match="one data set, got gqa, vqav2"):
        accuracy([records[0], _record(9, ("a",), "gqa")], {})
    with pytest.raises(ValueError, match="no rule for the data set 'vizwiz'"):
        accuracy([_record(1, ("a",), "vizwiz")], {1: "a"})


# -- captions: expectations computed with pycocoevalcap 1.2 and its Java tokenizer ---------------------------------------

REFERENCES = {
    1: [
        "A man's dog runs on the beach.",
        "The brown dog can't swim, but it runs (fast).",
        "a dog running along the shore",
    ],
    2: [
        "Two men riding bikes down St. Mark's street",
        "2 cyclists ride on a street in the U.S.",
        "Two men ride their bikes.",
    ],
    3: [
        'A red stop sign that says "STOP".',
        "a stop sign on a pole",
        "The sign is red and white, and 3,000 feet away",
    ],
    4: ["A t-shirt with black-and-white stripes", "someone's striped t-shirt", "A shirt hangs on a line"],
}
SAID = {1: "a brown dog runs on the beach.", 2: "two men ride bikes, two men ride bikes", 3: "A stop sign", 4: "zebra"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (REFERENCES[1][0], "a man 's dog runs on the beach"),
        (REFERENCES[1][1], "the brown dog ca n't swim but it runs -lrb- fast -rrb-"),
        (REFERENCES[2][0], "two men riding bikes down st. mark 's street"),
        (REFERENCES[2][1], "2 cyclists ride on a street in the u.s."),
        (REFERENCES[3][0], "a red stop sign that says stop"),
        (REFERENCES[3][2], "the sign is red and white and 3,000 feet away"),
        (REFERENCES[4][1], "someone 's striped t-shirt"),
        ("A t-shirt and/or black-and-white photo...", "a t-shirt and/or black-and-white photo"),
        ("$5.99 #1 50% R&B 1/2 cup at 10:45am", "$ 5.99 # 1 50 % r&b 1/2 cup at 10:45 am"),
        (
            "he's they've I'm we'll you'd aren't o'clock y'all",
            "he 's they 've i 'm we 'll you 'd are n't o'clock y' all",
        ),
        (
            "cannot gonna -- the dogs' bowls, 'quoted' rock 'n' roll",
            "can not gon na the dogs bowls quoted rock 'n' roll",
        ),
        ("café — “smart” it’s – … fun !! at 5 p.m.", "café smart it 's fun !! at 5 p.m."),
        ("a man.A woman is here . Mr. No. 5", "a man.a woman is here mr. no. 5"),
        ("...", ""),
        ("", ""),
    ],
)
def test_caption_words(text, words):
    assert caption_words(text) == words.split()


def test_cider_is_the_references():
    mean, scores = cider(SAID, REFERENCES)
    expected = {1: 2.492921986275773, 2: 1.0486280216934545, 3: 2.2682816135595516, 4: 0.0}
    assert mean == pytest.approx(1.4524579053821949, rel=1e-12) and scores == pytest.approx(expected, rel=1e-12)


def test_bleu_is_the_references():
    pytest.importorskip("torchmetrics")
    expected = [0.5373148070672981, 0.48486095956490155, 0.4149150504725333, 0.3280045411654844]
    assert [bleu(SAID, REFERENCES, n) for n in (1, 2, 3, 4)] == pytest.approx(expected, rel=1e-6)
    # of references equally far in length the shorter is taken, whichever comes first
    texts = ["one two", "one two three four"]
    assert bleu({1: "one two three"}, {1: texts}, 1) == bleu({1: "one two three"}, {1: texts[::-1]}, 1) == 1.0


def test_cider_by_hand():
    """Two images, every n-gram in one of them: weight L = log 2. "red red ball" against "red ball": unigrams (2L, L) and
    (L, L), clipped (L, L), so 2 / sqrt(10); bigrams (L, L) and L, so 1 / sqrt(2); one word longer: exp(-1/72)."""
    _, scores = cider({1: "red red ball", 2: "blue cat"}, {1: ["red ball"], 2: ["blue cat"]})
    assert scores[2] == pytest.approx(10 * (1 + 1) / 4)
    assert scores[1] == pytest.approx(10 * math.exp(-1 / 72) * (2 / math.sqrt(10) + 1 / math.sqrt(2)) / 4)


@given(
    st.dictionaries(
        st.integers(0, 9), st.lists(st.text("ab .", max_size=12), min_size=1, max_size=3), min_size=1, max_size=6
    )
)
def test_cider_stays_in_its_range(references):
    said = {key: texts[0] for key, texts in references.items()}
    mean, scores = cider(said, references)
    assert all(0 <= value <= 10 + 1e-9 for value in (mean, *scores.values()))
    empty, _ = cider(dict.fromkeys(references, ""), references)
    assert empty == 0.0
    if len(references) == 1:
        assert mean == 0.0


def test_cider_wants_the_same_images():
    for said, known in (({1: "a"}, {2: ["a"]}), ({}, {}), ({1: "a"}, {1: ["a"], 2: ["b"]})):
        with pytest.raises(ValueError, match="the same images"):
            cider(said, known)
    with pytest.raises(ValueError, match="image 1 has no reference"):
        cider({1: "a"}, {1: []})
