"""Scores that need no run of the model: how far a form misses the weight, and the outputs on a text that was seen once."""

import sys
from dataclasses import replace

from tqdm.auto import tqdm

from tnlib.metric import Metric
from tnlib.sensitivity import checked_profile, fitted_layer, squares
from tnlib.shapes import weight_of


def proxy_profile(model, moments, forms, where="linear", unit="matrix", progress=None):
    """A Profile whose scores are errors of the matrices themselves, at a decomposition a row and no forward pass.

    moments: {name: Moments}, from second_moments(model, windows, names); None: without the scores of outputs
    forms, where, unit, progress: as in sensitivity, whose rows it has, with other scores: "error", "square", and with moments
        "output" (mean squared error of the outputs, a token) and "relative_output" (over the outputs' own mean square)
    Raises: as blank_profile; ValueError where moments of a matrix are missing
    Source: "output" is what SVD-LLM (2403.07378) minimizes. Exact: with C the identity, "output" equals "square".
    """
    blank = checked_profile("proxy_profile", model, forms, where, unit, moments)
    hide = not (sys.stderr.isatty() if progress is None else progress)
    rows = tuple(_scored(model, row, moments) for row in tqdm(blank.rows, "proxies", disable=hide))
    tokens = next(iter(moments.values())).tokens if moments else 0
    return replace(blank, rows=rows, tokens=tokens)


def _scored(model, row, moments):
    """The row with its scores, summed over its matrices."""
    square = total = output = whole = 0.0
    for name in row.names:
        module = model.get_submodule(name)
        weight = fitted_layer(name, module, row.form).weight.detach()  # (out, in)
        missed, norm = squares(module, weight)
        square, total = square + missed, total + norm
        if moments is not None:
            dense, metric = weight_of(module).detach().double(), Metric(moments[name].second)
            output += metric.square(dense - weight)
            whole += metric.square(dense)
    scores = {"error": ((square / total) ** 0.5 if total else 0.0,), "square": (square,)}
    if moments is not None:
        scores |= {"output": (output,), "relative_output": (output / whole if whole else 0.0,)}
    return replace(row, scores=scores)
