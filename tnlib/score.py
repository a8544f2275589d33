"""What a classifier's predictions are worth: the field's metrics, with intervals over examples.

Every metric here is a function of three counts a class: hits, predicted and true. Each example has counts of its own, so a
bootstrap resample is a weighted sum of them, and a token task's words are never torn from their sentence.
"""

from dataclasses import dataclass

import numpy as np
import torch

from tnlib.losses import IGNORE


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric on `examples` examples, and its percentile bootstrap interval over them at confidence `level`."""

    value: float
    low: float
    high: float
    metric: str
    examples: int
    level: float

    def __str__(self):
        value, low, high = (_shown(x, self.metric) for x in (self.value, self.low, self.high))
        unit = "" if self.metric == "matthews" else " %"
        return f"{value}{unit} ({low} to {high}), {self.metric}, {self.examples:,} examples"


@dataclass(frozen=True, kw_only=True)
class ScoreDifference:
    """One classifier's score less another's on the same examples, its paired interval, and what may be said of it."""

    value: float
    low: float
    high: float
    verdict: str  # "higher", "lower" or "no different"
    metric: str
    examples: int
    level: float

    def __str__(self):
        value, low, high = (_shown(x, self.metric, "+") for x in (self.value, self.low, self.high))
        unit = "" if self.metric == "matthews" else " points"
        return f"{value}{unit} ({low} to {high}), {self.metric}, {self.examples:,} examples ({self.verdict})"


def score(predictions, labels, metric="accuracy", resamples=1000, level=0.95, seed=0, names=None):
    """A metric of predictions against labels, with a percentile bootstrap interval over examples.

    predictions, labels: (n,), or (n, context) with label -100 where nothing is asked
    metric: "accuracy" (for tokens over words), "f1" of class 1 against class 0 as in GLUE, "macro_f1" over the classes that
        occur, "matthews", or "slot_f1" of exact spans of BIO labels, whose `names` are then needed
    Returns: Score; a resample in which the metric is undefined is left out of the interval
    Raises: ValueError for an unknown metric, shapes or classes that do not fit, or a metric undefined on these labels
    Source: Efron & Tibshirani 1993, chapter 13; Matthews 1975, for more classes Gorodkin 2004; spans as in conlleval (Sang &
        Buchholz 2000), where an I- without its B- begins a span. Exact: matthews of two classes is np.corrcoef's.
    """
    counts = _counts("score", predictions, labels, metric, names)
    value = _defined("score", counts, metric)
    low, high = _interval("score", METRICS[metric](_resampled(counts, resamples, seed)), level)
    return Score(value=value, low=low, high=high, metric=metric, examples=len(counts), level=level)


def compare_scores(predictions, other, labels, metric="accuracy", resamples=1000, level=0.95, seed=0, names=None):
    """Whether a classifier scores higher or lower than another, from their predictions for the same examples.

    predictions, other: of the classifier and of the one it is compared with; all arguments and errors as for score()
    Returns: ScoreDifference, score(predictions) less score(other); both are resampled alike, so what makes an example hard
        for both cancels. Of equally good classifiers 1 to 5 % are told apart at level 0.95, also where few examples differ
    Source: Efron & Tibshirani 1993, chapter 13. Exact: compare_scores(x, x, labels) is zero and "no different".
    """
    both = [_counts("compare_scores", x, labels, metric, names) for x in (predictions, other)]
    value = _defined("compare_scores", both[0], metric) - _defined("compare_scores", both[1], metric)
    ours, theirs = (METRICS[metric](_resampled(counts, resamples, seed)) for counts in both)
    low, high = _interval("compare_scores", ours - theirs, level)
    verdict = "higher" if low > 0 else "lower" if high < 0 else "no different"
    facts = {"metric": metric, "examples": len(labels), "level": level}
    return ScoreDifference(value=value, low=low, high=high, verdict=verdict, **facts)


def spans(tags):
    """Set of (first, end, kind) of BIO tags; an I- of another kind than the tag before begins a span, as does any B-.

    tags: such as ["B-city", "I-city", "O"]; a tag without B- or I- is a kind of its own, a run of it one span
    Source: conlleval. Exact: spans(["B-city", "I-city", "O"]) == {(0, 2, "city")}.
    """
    found, first, kind = set(), 0, None
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, rest = tag.partition("-")
        new = None if tag == "O" else rest or tag
        if prefix == "B" or new != kind:
            if kind is not None:
                found.add((first, place, kind))
            first, kind = place, new
    return found


def _f1(counts):
    """2 hits / (predicted + true), (..., classes); nan for a class that is neither predicted nor true."""
    hits, predicted, true = np.moveaxis(counts, -2, 0)  # each (..., classes)
    with np.errstate(invalid="ignore"):
        return 2 * hits / (predicted + true)


def _matthews(counts):
    """Gorodkin's correlation, (...): nan where the labels are of one class, 0 where only the predictions are."""
    hits, predicted, true = np.moveaxis(counts, -2, 0)
    total = true.sum(-1)
    ours, theirs = (total**2 - (x**2).sum(-1) for x in (predicted, true))
    with np.errstate(invalid="ignore"):
        value = (hits.sum(-1) * total - (predicted * true).sum(-1)) / np.sqrt(ours * theirs)
    return np.where((ours == 0) & (theirs > 0), 0.0, value)


def _mean_of_present(each):
    """Mean over the classes that are not nan; nan where all are."""
    there = ~np.isnan(each)
    with np.errstate(invalid="ignore"):
        return np.where(there, each, 0).sum(-1) / there.sum(-1)


METRICS = {  # functions of counts (..., 3, classes): hits, predicted, true
    "accuracy": lambda counts: _f1(counts.sum(-1, keepdims=True))[..., 0],  # over all classes predicted = true = words
    "f1": lambda counts: _f1(counts)[..., 1],
    "macro_f1": lambda counts: _mean_of_present(_f1(counts)),
    "matthews": _matthews,
    "slot_f1": lambda counts: _f1(counts)[..., 0],  # one class: spans of every kind
}


def _counts(where, predictions, labels, metric, names):
    """Hits, predicted and true of each example and class: (n, 3, classes) float64."""
    predictions, labels = torch.as_tensor(predictions).cpu().numpy(), torch.as_tensor(labels).cpu().numpy()
    _check(where, predictions, labels, metric, names)
    if metric == "slot_f1":
        rows = ((row != IGNORE, ours, row) for ours, row in zip(predictions, labels))
        pairs = [[spans([names[label] for label in x[asked]]) for x in both] for asked, *both in rows]
        return np.array([[[len(ours & true)], [len(ours)], [len(true)]] for ours, true in pairs], dtype=float)
    places = labels != IGNORE
    example, ours, true = places.nonzero()[0], predictions[places], labels[places]
    counts = np.zeros((len(labels), 3, max(2, ours.max() + 1, true.max() + 1)))
    hit = ours == true
    for kind, (row, label) in enumerate([(example[hit], true[hit]), (example, ours), (example, true)]):
        np.add.at(counts, (row, kind, label), 1)
    return counts


def _check(where, predictions, labels, metric, names):
    """Refuse what would be counted wrongly."""
    if metric not in METRICS:
        raise ValueError(f"{where}: metric {metric!r} is unknown; needed one of {', '.join(METRICS)}. Choose one.")
    if predictions.shape != labels.shape or len(labels) < 2 or labels.ndim not in (1, 2):
        raise ValueError(
            f"{where}: predictions {predictions.shape}, labels {labels.shape}; needed both (n,) or both (n, context), two "
            "examples or more. Take them from predict and encode_task of the same task."
        )
    asked = labels != IGNORE
    if not asked.any() or labels[asked].min() < 0 or predictions[asked].min() < 0:
        least = [int(x[asked].min()) for x in (predictions, labels)] if asked.any() else "none asked for"
        raise ValueError(
            f"{where}: least prediction and label {least}; needed classes from 0 on wherever the label is not {IGNORE}. Labels "
            "of -1 stand for none: take a labeled split."
        )
    most = int(max(predictions[asked].max(), labels[asked].max()))
    if metric == "f1" and most > 1:
        raise ValueError(f"{where}: class {most} with metric 'f1'; needed classes 0 and 1 only. Take 'macro_f1'.")
    if metric == "slot_f1" and (labels.ndim != 2 or names is None or most >= len(names)):
        known = "no names" if names is None else f"{len(names)} names"
        raise ValueError(
            f"{where}: metric 'slot_f1' with labels {labels.shape} up to class {most} and {known}; needed labels (n, context) "
            "and a BIO name for each class. Give names=task.names."
        )


def _resampled(counts, resamples, seed):
    """Counts summed over examples drawn with replacement: (resamples, 3, classes). The draws depend on n and seed only."""
    generator, size, flat = np.random.default_rng(seed), len(counts), counts.reshape(len(counts), -1)
    sums = np.empty((resamples, flat.shape[1]))
    for row in sums:
        row[:] = np.bincount(generator.integers(size, size=size), minlength=size).astype(float) @ flat
    return sums.reshape(resamples, *counts.shape[1:])


def _interval(where, values, level):
    """The percentile interval of resampled values, those left out in which the metric is undefined."""
    values = values[~np.isnan(values)]
    if len(values) < 2 or not 0 < level < 1:
        raise ValueError(
            f"{where}: {len(values)} resamples in which the metric has a value, level {level}; needed two or more, and a level "
            "such as 0.95. Correct them, or take more examples."
        )
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _defined(where, counts, metric):
    """The metric of all examples. Raises: ValueError where it has no value"""
    value = float(METRICS[metric](counts.sum(0)))
    if np.isnan(value):
        true = counts.sum(0)[2].astype(int).tolist()
        raise ValueError(
            f"{where}: {metric} is undefined where true examples of the classes are {true} and no other is predicted; needed "
            "more than one class, for f1 an example of class 1. Take 'accuracy', or more examples."
        )
    return value


def _shown(value, metric, sign=""):
    return f"{value:{sign}.3f}" if metric == "matthews" else f"{100 * value:{sign}.1f}"
