"""ROUGE: how many words, pairs of words and words in order a summary shares with its reference."""

import re
from collections import Counter

import numpy as np

from tnlib.score import Score, ScoreDifference

METRICS = ("rouge1", "rouge2", "rougeL")


def rouge(predictions, references, resamples=1000, level=0.95, seed=0):
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L F1, each with a percentile bootstrap interval over examples.

    predictions, references: as many str of each
    Returns: {"rouge1": Score, "rouge2": Score, "rougeL": Score}; values between 0 and 1, shown as per cent
    Raises: ValueError for unequal numbers of texts, or fewer than two
    Source: Lin 2004. Words are runs of a-z and 0-9 in lower case, unstemmed, and the values those of the package rouge-score
        with use_stemmer=False. Published tables often use stems: leads of package-summaries score 2 to 3 points more with them.
    Exact: 1 for a text against itself.
    """
    values = _values("rouge", predictions, references)  # (examples, 3)
    low, high = _interval(values, resamples, level, seed)
    facts = {"examples": len(values), "level": level}
    return {
        name: Score(value=float(values[:, k].mean()), low=float(low[k]), high=float(high[k]), metric=name, **facts)
        for k, name in enumerate(METRICS)
    }


def compare_rouge(predictions, other, references, resamples=1000, level=0.95, seed=0):
    """Whether summaries score higher or lower than others of the same texts: rouge(predictions) less rouge(other), paired.

    predictions, other, references: as many str of each
    Returns: {"rouge1": ScoreDifference, "rouge2": ..., "rougeL": ...}
    Raises: ValueError as rouge does
    Source: Efron & Tibshirani 1993, chapter 13. Exact: of texts with themselves 0 and "no different".
    """
    gaps = _values("compare_rouge", predictions, references) - _values("compare_rouge, other", other, references)
    low, high = _interval(gaps, resamples, level, seed)
    verdicts = ["higher" if a > 0 else "lower" if b < 0 else "no different" for a, b in zip(low, high)]
    facts = {"examples": len(gaps), "level": level}
    return {
        name: ScoreDifference(
            value=float(gaps[:, k].mean()),
            low=float(low[k]),
            high=float(high[k]),
            verdict=verdicts[k],
            metric=name,
            **facts,
        )
        for k, name in enumerate(METRICS)
    }


def _values(where, predictions, references):
    """F1 of each example and metric: (examples, 3) float64."""
    if len(predictions) != len(references) or len(references) < 2:
        raise ValueError(
            f"{where}: {len(predictions)} predictions and {len(references)} references; needed as many of each, two or more. "
            "Take both from one load_pairs, and summarize all of its texts."
        )
    return np.array([_three(_words(ours), _words(theirs)) for ours, theirs in zip(predictions, references)])


def _words(text):
    return re.findall("[a-z0-9]+", text.lower())


def _three(ours, theirs):
    """ROUGE-1, ROUGE-2 and ROUGE-L of two lists of words."""
    found = []
    for n in (1, 2):
        a, b = (Counter(zip(*(words[k:] for k in range(n)))) for words in (ours, theirs))
        found.append(_f1((a & b).total(), a.total(), b.total()))
    return [*found, _f1(_common(ours, theirs), len(ours), len(theirs))]


def _f1(hits, ours, theirs):
    """Harmonic mean of hits / ours and hits / theirs; 0 where there is nothing to hit."""
    return 2 * hits / (ours + theirs) if hits else 0.0


def _common(ours, theirs):
    """Length of the longest common subsequence."""
    best = [0] * (len(theirs) + 1)  # of the words of `ours` so far and the first k of `theirs`
    for word in ours:
        before = best
        best = [0]
        for k, other in enumerate(theirs):
            best.append(before[k] + 1 if word == other else max(before[k + 1], best[k]))
    return best[-1]


def _interval(values, resamples, level, seed):
    """Bounds of the means of examples drawn with replacement, (metrics,) each; the draws depend on n and seed only."""
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    means = values[draws].mean(1)  # (resamples, metrics)
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
