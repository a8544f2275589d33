"""ROUGE: by hand, against rouge-score where it is installed, and its intervals."""

import random

import pytest

from tnlib.rouge import METRICS, compare_rouge, rouge

WORDS = ["the", "cat,", "Sat", "on", "a", "mat's", "café-2", "and", "it's", "é", "The", "42"]


def sentence(draw, most=12):
    return " ".join(draw.choices(WORDS, k=draw.randint(0, most)))


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ("the cat sat", "The cat sat.", (1, 1, 1)),
        ("the cat", "a dog", (0, 0, 0)),
        ("", "the cat", (0, 0, 0)),
        ("", "", (0, 0, 0)),
        ("sat cat the", "the cat sat", (1, 0, 1 / 3)),  # the same words in another order
        ("the the the", "the cat", (2 / 5, 0, 2 / 5)),  # a word counts as often as both have it
        ("the cat sat down", "the cat lay down", (3 / 4, 1 / 3, 3 / 4)),
        ("it's new", "it s new", (1, 1, 1)),
        # As rouge-score 0.1.2 has them.
        (
            "Send2Trash is a small package that sends files to the Trash (or Recycle Bin) natively and on all platforms.",
            "Send file to trash natively under Mac OS X, Windows and Linux",
            (8 / 31, 0, 8 / 31),
        ),
        (
            "Six is a Python 2 and 3 compatibility library; six's for the 2-and-3 code.",
            "Python 2 and 3 compatibility utilities",
            (0.4347826086956522, 0.38095238095238093, 0.4347826086956522),
        ),
        (
            "A café's menu: the naïve cat sat on the mat, on the mat, on the mat.",
            "On the mat the cat, on the café's mat, sat.",
            (0.7586206896551725, 0.29629629629629634, 0.4827586206896552),
        ),
    ],
)
def test_by_hand(ours, theirs, expected):
    found = rouge([ours, ours], [theirs, theirs])
    assert [found[name].value for name in METRICS] == pytest.approx(list(expected), abs=1e-15)
    assert all((score.low, score.high) == (score.value, score.value) for score in found.values())  # no spread


def test_values_are_those_of_rouge_score():
    """The package's own F1, unstemmed, on random texts with capitals, accents, digits and apostrophes."""
    oracle = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(METRICS, use_stemmer=False)
    draw = random.Random(0)
    for _ in range(300):
        pairs = [(sentence(draw), sentence(draw)) for _ in range(2)]
        found = rouge(*zip(*pairs), resamples=2)
        theirs = [oracle.score(reference, ours) for ours, reference in pairs]
        for name in METRICS:
            assert found[name].value == pytest.approx(sum(t[name].fmeasure for t in theirs) / 2, abs=1e-12)


def test_intervals_cover_the_mean():
    """Of 50 examples from one population: the interval at 0.9 holds the population's mean 9 times in 10."""
    draw, inside = random.Random(1), 0
    pool = [(sentence(draw), sentence(draw)) for _ in range(800)]
    truth = rouge(*zip(*pool), resamples=2)["rougeL"].value
    for seed in range(40):
        found = rouge(*zip(*draw.sample(pool, 50)), resamples=200, level=0.9, seed=seed)["rougeL"]
        assert found.low <= found.value <= found.high
        inside += found.low <= truth <= found.high
    assert 29 <= inside <= 40  # mean 36, standard deviation 1.9


def test_comparison_is_paired():
    draw = random.Random(2)
    references = [sentence(draw) + " on the mat" for _ in range(40)]
    good = [text if number % 2 else "cat mat" for number, text in enumerate(references)]  # some easy, some hard
    worse = [text + " dog" for text in good]
    same, gap = compare_rouge(good, good, references), compare_rouge(good, worse, references)
    assert {(x.value, x.low, x.high, x.verdict) for x in same.values()} == {(0.0, 0.0, 0.0, "no different")}
    assert {x.verdict for x in gap.values()} == {"higher"}
    assert {x.verdict for x in compare_rouge(worse, good, references).values()} == {"lower"}
    alone = rouge(good, references), rouge(worse, references)
    assert gap["rouge1"].value == pytest.approx(alone[0]["rouge1"].value - alone[1]["rouge1"].value)
    assert gap["rouge1"].high - gap["rouge1"].low < alone[0]["rouge1"].high - alone[0]["rouge1"].low
    assert str(gap["rouge1"]).endswith("rouge1, 40 examples (higher)")


@pytest.mark.parametrize("texts", [(["a"], ["a"]), (["a", "b"], ["a"])])
def test_too_few_or_unequal(texts):
    with pytest.raises(ValueError, match="needed as many of each, two or more"):
        rouge(*texts)
