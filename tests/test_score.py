"""score.py and predict.py: metrics against hand-worked values and other routes to them, intervals against theory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LLAMA, SIZES
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
)

from tnlib.predict import predict
from tnlib.score import METRICS, Score, compare_scores, score, spans

NAMES = ("O", "B-x", "I-x", "B-y", "I-y", "unseen")
O, BX, IX, BY, IY, UNSEEN = range(6)


pytestmark = pytest.mark.usefixtures("one_thread")


def guesses(n, classes=2, right=0.9, seed=0):
    """Labels (n,), and predictions that are right with this probability and else drawn at random."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=n)
    drawn = generator.integers(classes, size=n)
    return torch.from_numpy(np.where(generator.random(n) < right, labels, drawn)), torch.from_numpy(labels)


def padded(rows, width=5):
    return torch.tensor([[*row, *[-100] * (width - len(row))] for row in rows])


@pytest.mark.parametrize(
    ("metric", "predictions", "labels", "value"),
    [
        ("accuracy", [1, 0, 1, 1], [1, 0, 0, 1], 3 / 4),
        ("accuracy", [4, 4], [5, 4], 1 / 2),  # a class no model was trained on
        ("f1", [1, 0, 1, 1], [1, 0, 0, 1], 2 * 2 / (3 + 2)),
        ("f1", [0, 0, 0], [1, 0, 1], 0),
        ("macro_f1", [0, 1, 2, 2], [0, 1, 1, 2], (1 + 2 / 3 + 2 / 3) / 3),
        ("macro_f1", [0, 3, 3], [0, 0, 3], 2 / 3),  # classes 1 and 2 do not occur and are not counted
        ("matthews", [1, 1, 1], [1, 0, 1], 0),  # constant predictions
        ("matthews", [0, 1], [1, 0], -1),
        ("matthews", [0, 1, 2, 2], [0, 1, 1, 2], (3 * 4 - 5) / math.sqrt((16 - 6) * (16 - 6))),
    ],
)
def test_worked_examples(metric, predictions, labels, value):
    found = score(torch.tensor(predictions), torch.tensor(labels), metric)
    assert found.value == pytest.approx(value, abs=1e-12)
    assert found.examples == len(labels)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", set()),
        ("B-x I-x O B-y", {(0, 2, "x"), (3, 4, "y")}),
        ("I-x I-x O", {(0, 2, "x")}),  # I- without B-
        ("O I-x B-x I-x", {(1, 2, "x"), (2, 4, "x")}),
        ("B-x I-y I-y", {(0, 1, "x"), (1, 3, "y")}),
        ("B-x B-x", {(0, 1, "x"), (1, 2, "x")}),
        ("B-x O I-x", {(0, 1, "x"), (2, 3, "x")}),
        ("B-x unseen unseen I-x", {(0, 1, "x"), (1, 3, "unseen"), (3, 4, "x")}),
        ("B-a-b I-a-b", {(0, 2, "a-b")}),
        ("", set()),
    ],
)
def test_spans_are_those_of_conlleval(tags, found):
    assert spans(tags.split()) == found


@pytest.mark.parametrize(
    ("predictions", "labels", "value"),
    [
        ([[BX, IX, O], [BY]], [[BX, IX, O], [BY]], 1),
        ([[BX, O, O], [BY]], [[BX, IX, O], [BY]], 2 * 1 / (2 + 2)),  # half a span is none
        ([[IX, IX, O], [IY]], [[BX, IX, O], [BY]], 1),  # I- begins a span where no B- did
        ([[BX, BX, O], [O]], [[BX, IX, O], [BY]], 0),
        ([[BX, IX, BY], [BY]], [[BX, IX, O], [BY]], 2 * 2 / (3 + 2)),
        ([[BY, IY, O], [BY]], [[BX, IX, O], [BY]], 2 * 1 / (2 + 2)),  # the kind counts
        ([[O, O, O], [BY]], [[O, UNSEEN, O], [BY]], 2 * 1 / (1 + 2)),  # unseen slots are missed, not dropped
        ([[O], [O]], [[BX], [O]], 0),
    ],
)
def test_slot_f1_by_hand(predictions, labels, value):
    labels = padded(labels)
    predictions = torch.where(labels == -100, BX, padded(predictions))  # what stands on padding does not matter
    assert score(predictions, labels, "slot_f1", names=NAMES).value == pytest.approx(value, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=5, max_size=60))
@settings(max_examples=100, deadline=None)
def test_matthews_of_two_classes_is_their_correlation(pairs):
    predictions, labels = torch.tensor(pairs).T
    if len(labels.unique()) == 1:
        with pytest.raises(ValueError, match=r"matthews is undefined.*needed more than one class"):
            score(predictions, labels, "matthews", resamples=50)
    else:
        constant = len(predictions.unique()) == 1
        expected = 0 if constant else np.corrcoef(predictions, labels)[0, 1]
        assert score(predictions, labels, "matthews", resamples=50).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_perfect_predictions_score_one_with_certainty(metric):
    labels = padded([[BX, IX, O], [O, BY], [BX], [O]]) if metric == "slot_f1" else torch.tensor([0, 1, 1, 0, 0])
    found = score(labels, labels, metric, names=NAMES)
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_accuracy_of_two_parts_is_their_weighted_mean():
    (ours, labels), (more, others) = guesses(300, 3), guesses(100, 3, right=0.5, seed=1)
    first, second = score(ours, labels), score(more, others)
    whole = score(torch.cat([ours, more]), torch.cat([labels, others]))
    assert whole.value == pytest.approx((300 * first.value + 100 * second.value) / 400, abs=1e-12)


@pytest.mark.parametrize(("n", "right"), [(872, 0.8), (400, 0.4)])
def test_interval_is_as_wide_as_the_binomial_says(n, right):
    found = score(*guesses(n, right=right), resamples=4000)
    stderr = math.sqrt(found.value * (1 - found.value) / n)
    assert found.high - found.low == pytest.approx(
        2 * 1.96 * stderr, rel=0.08
    )  # quantiles of 4000 resamples of steps 1/n
    assert found.low < found.value < found.high
    wider = score(*guesses(n, right=right), resamples=4000, level=0.99)
    assert wider.low < found.low < found.high < wider.high


def test_words_of_an_example_are_resampled_together():
    right = torch.arange(100) < 80
    labels = torch.zeros(100, 9, dtype=torch.int64)
    predictions = (~right).long()[:, None].expand(100, 9)  # all words of an example right, or all wrong
    words, texts = score(predictions, labels), score(predictions[:, 0], labels[:, 0])
    assert (words.value, words.low, words.high) == (texts.value, texts.low, texts.high)


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_seed_gives_the_same_interval(metric):
    predictions, labels = guesses(90)
    if metric == "slot_f1":
        predictions, labels = predictions.view(30, 3), labels.view(30, 3)
    more = {"names": NAMES, "resamples": 50, "level": 0.8}
    found = score(predictions, labels, metric, **more)
    assert score(predictions, labels, metric, **more) == found
    others = [score(predictions, labels, metric, seed=seed, **more) for seed in range(1, 6)]
    assert any((other.low, other.high) != (found.low, found.high) for other in others)


@pytest.mark.parametrize("metric", METRICS)
def test_comparison_of_a_classifier_with_itself(metric):
    predictions, labels = guesses(60)
    if metric == "slot_f1":
        predictions, labels = predictions.view(20, 3), labels.view(20, 3)
    found = compare_scores(predictions, predictions, labels, metric, names=NAMES)
    assert (found.value, found.low, found.high, found.verdict) == (0, 0, 0, "no different")


def test_comparison_tells_which_is_better():
    good, labels = guesses(400, right=0.95)
    bad = guesses(400, right=0.8)[0]
    found, turned = compare_scores(good, bad, labels), compare_scores(bad, good, labels)
    assert (found.verdict, turned.verdict) == ("higher", "lower")
    assert found.value == -turned.value == pytest.approx(score(good, labels).value - score(bad, labels).value)
    alone = [score(x, labels) for x in (good, bad)]
    assert found.high - found.low < sum(x.high - x.low for x in alone)  # paired: what is hard for both cancels


@pytest.mark.parametrize("differ", [4, 40])
def test_equally_good_classifiers_are_seldom_told_apart(differ):
    generator, labels = np.random.default_rng(0), torch.zeros(200, dtype=torch.int64)
    told = 0
    for _ in range(200):
        apart, turn = generator.random(200) < differ / 200, generator.random(200) < 0.5
        ours, theirs = torch.from_numpy(apart & turn).long(), torch.from_numpy(apart & ~turn).long()
        told += compare_scores(ours, theirs, labels, resamples=200).verdict != "no different"
    assert told <= 20  # 5 % of 200 would be 10; more than 20 has probability 0.001


def test_scores_read_as_sentences():
    facts = {"metric": "accuracy", "examples": 1872, "level": 0.95}
    assert (
        str(Score(value=0.9128, low=0.8894, high=0.931, **facts)) == "91.3 % (88.9 to 93.1), accuracy, 1,872 examples"
    )
    facts["metric"] = "matthews"
    assert (
        str(Score(value=0.5128, low=-0.1, high=0.931, **facts)) == "0.513 (-0.100 to 0.931), matthews, 1,872 examples"
    )
    right = torch.zeros(50, dtype=torch.int64)
    text = str(compare_scores(right, right, right))
    assert text == "+0.0 points (+0.0 to +0.0), accuracy, 50 examples (no different)"


@pytest.mark.parametrize(
    ("predictions", "labels", "more", "message"),
    [
        (
            [1, 0],
            [1, 0],
            {"metric": "f2"},
            r"metric 'f2' is unknown; needed one of accuracy, f1, macro_f1, matthews, slot_f1",
        ),
        ([1, 0, 1], [1, 0], {}, r"predictions \(3,\), labels \(2,\); needed both"),
        ([1], [1], {}, "two examples or more"),
        ([1, 0], [1, -1], {}, r"least prediction and label \[0, -1\].*take a labeled split"),
        ([1, -100], [1, 0], {}, r"needed classes from 0 on wherever the label is not -100"),
        ([1, 0], [-100, -100], {}, "none asked for"),
        ([2, 0], [1, 0], {"metric": "f1"}, "class 2 with metric 'f1'.*Take 'macro_f1'"),
        ([0, 0], [0, 0], {"metric": "f1"}, r"f1 is undefined where true examples of the classes are \[2, 0\]"),
        ([[0], [0]], [[0], [1]], {"metric": "slot_f1"}, "up to class 1 and no names.*Give names=task.names"),
        ([[0], [0]], [[0], [7]], {"metric": "slot_f1", "names": NAMES}, "up to class 7 and 6 names"),
        ([0, 0], [0, 1], {"metric": "slot_f1", "names": NAMES}, r"labels \(2,\).*needed labels \(n, context\)"),
        ([[0], [0]], [[0], [0]], {"metric": "slot_f1", "names": NAMES}, "slot_f1 is undefined"),
        ([1, 0], [1, 0], {"level": 95}, "has a value, level 95; needed two or more, and a level such as 0.95"),
        ([1, 0], [1, 0], {"resamples": 0}, "0 resamples"),
    ],
)
def test_what_cannot_be_scored(predictions, labels, more, message):
    with pytest.raises(ValueError, match=message):
        score(torch.tensor(predictions), torch.tensor(labels), **more)
    with pytest.raises(ValueError, match=message):
        compare_scores(torch.tensor(predictions), torch.tensor(predictions), torch.tensor(labels), **more)


def classifier(auto, config=None):
    torch.manual_seed(0)
    model = auto.from_config(config or BertConfig(**SIZES, intermediate_size=48, num_hidden_layers=2, num_labels=3))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(20)  # so that the classes differ from example to example
    return model.double()


def batch_of(n=23, context=17, vocabulary=96):
    """Rows of unlike length, padded on the right with 1."""
    lengths = torch.randint(2, context - 1, (n,))  # the last two columns are padding everywhere
    mask = (torch.arange(context) < lengths[:, None]).long()
    ids = torch.randint(2, vocabulary, (n, context)).masked_fill(mask == 0, 1)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * 0, "labels": lengths}


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_predictions_are_those_of_each_example_alone(auto, batch):
    model, data = classifier(auto).train(), batch_of()
    model.bert.encoder.layer[0].eval()  # a frozen part stays as it is
    found = predict(model, data, batch=batch)
    assert model.training
    assert not model.bert.encoder.layer[0].training
    model.eval()
    assert len(found.unique()) > 1
    for row, ids, mask in zip(found, data["input_ids"], data["attention_mask"]):
        alone = model(input_ids=ids[None, : mask.sum()]).logits.argmax(-1)[0]
        assert row.dim() == alone.dim()
        assert row[mask == 1].equal(alone) if row.dim() else row == alone
        assert not row.dim() or (row[mask == 0] == -100).all()
    assert found.dtype == torch.int64
    assert not found.is_inference()


def test_predictions_without_a_mask_and_of_a_decoder():
    model = classifier(AutoModelForSequenceClassification, LlamaConfig(**LLAMA, num_labels=3, pad_token_id=1)).eval()
    data = batch_of()
    found = predict(model, {name: data[name] for name in ("input_ids", "attention_mask")})
    alone = [
        int(model(input_ids=ids[None, : mask.sum()]).logits.argmax())
        for ids, mask in zip(data["input_ids"], data["attention_mask"])
    ]
    assert found.tolist() == alone
    full = torch.randint(2, 96, (5, 9))
    assert predict(model, {"input_ids": full.int()}).equal(model(input_ids=full).logits.argmax(-1))


def test_models_that_do_not_classify():
    data = batch_of()
    short = {"input_ids": data["input_ids"]}
    language = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=24, n_layer=1, n_head=2))
    with pytest.raises(
        ValueError, match=r"GPT2LMHeadModel gives logits \(23, 17, 96\) with num_labels 2; needed a classifier"
    ):
        predict(language, short)
    one = classifier(
        AutoModelForSequenceClassification, BertConfig(**SIZES, intermediate_size=48, num_hidden_layers=1, num_labels=1)
    )
    with pytest.raises(ValueError, match="num_labels 1; needed a classifier of two classes"):
        predict(one, short)
    with pytest.raises(ValueError, match=r"token ids .* with a vocabulary of 96"):
        predict(one, {"input_ids": data["input_ids"] + 96})
    broken = classifier(AutoModelForSequenceClassification)
    broken.bert.embeddings.word_embeddings.weight.data[int(data["input_ids"][7, 0])] = math.nan
    with pytest.raises(ValueError, match=r"logits not finite for example \d+; needed finite ones"):
        predict(broken, data)
    assert broken.bert.pooler.training
