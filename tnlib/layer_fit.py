"""One layer fitted to its own inputs: what is minimized, what is measured before and after, and what becomes of the bias."""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from tnlib.form import measured_error
from tnlib.layers import SplitLinear
from tnlib.metric import Metric
from tnlib.shapes import ShapeError, weight_of
from tnlib.weighted import fit_weighted

FIT = {"steps": 40, "learning_rate": 0.1, "shrink": 1.0}  # what fits use unless told otherwise
NEGLIGIBLE = 1e-7  # relative error below which a layer is exact already and is left alone


@dataclass(frozen=True)
class LayerFit:
    """What a fit did to one layer. Errors are relative: |x (W - W').T| / |x W.T| over all tokens, a bias counted in what is missed."""

    module: str
    form: str
    method: str  # "closed form", "alternating", "sweeps", "gradient"; "kept" where nothing better than the start was found
    tokens: int  # of the calibration text
    before: float  # on the calibration text
    after: float
    held_before: float | None  # on the held-out text
    held_after: float | None
    frobenius_before: float  # |W - W'| / |W|
    frobenius_after: float
    seconds: float  # of the fit alone, on one thread; moments not counted


@dataclass(frozen=True)
class Job:
    """One factorized layer, or several that share factors, and the dense layer that it stands for."""

    name: str
    names: tuple  # modules whose inputs count
    layer: nn.Module
    dense: nn.Module

    @property
    def parts(self):
        """The layers that hold factors: bands of a SplitLinear, else the layer itself."""
        return list(self.layer.parts) if isinstance(self.layer, SplitLinear) else [self.layer]

    @property
    def biased(self):
        """A bias is fitted along where it is this layer's alone."""
        return len(self.names) == 1 and getattr(self.dense, "bias", None) is not None


@dataclass(frozen=True)
class Found:
    """The outcome of a fit: factors of each part, the bias (out,) or None where it stays."""

    factors: list  # and orders, as the form's functions take them
    bias: torch.Tensor | None
    row: LayerFit


def fit_job(job, seen, held, steps, learning_rate, shrink):
    """Fit one layer to the moments `seen` of its inputs, measure it on those and on `held` (may be empty); nothing is written.

    seen, held: {module name: Moments or None}
    Returns: Found; its start where that is exact already or no better point was found
    """
    began, weight = time.perf_counter(), weight_of(job.dense).detach().double()
    moments = _present(job, seen)
    start = [{name: factor.detach() for name, factor in part.operands.items()} for part in job.parts]
    factors, bias, method = start, None, "kept"
    texts = [_Text(job, weight, moments), _Text(job, weight, _present(job, held)) if held else None]
    before = [text and text.missed(start, None) for text in texts]
    if before[0] > NEGLIGIBLE:
        factors, method = _fitted(job, weight, start, fit_metric(moments, shrink, job.biased), steps, learning_rate)
        bias = _best_bias(job, weight, factors, moments[0]) if job.biased else None
    after = [text and text.missed(factors, bias) for text in texts]
    if not after[0] < before[0]:
        factors, bias, method, after = start, None, "kept", before
    errors = [*(value for pair in zip(before, after) for value in pair)]
    errors += [float(measured_error(weight, _rebuilt(job, some))) for some in (start, factors)]
    form, tokens = str(job.parts[0].form), moments[0].tokens
    row = LayerFit(", ".join(job.names), form, method, tokens, *errors, time.perf_counter() - began)
    return Found(factors, bias, row)


def load_found(job, found):
    """Put the factors that were found, and their errors, into the layer that holds them. The bias is the caller's affair."""
    first = 0
    for part, factors in zip(job.parts, found.factors):
        rows = slice(first, first + part.shape[0])
        weight = weight_of(job.dense)[rows].detach()
        part.load_factors(factors, measured_error(weight, part.form.to_dense(factors, part.shape)))
        first += part.shape[0]
    job.layer.error, job.layer.output_error = found.row.frobenius_after, found.row.after


def write_bias(parts, bias):
    """Write a bias (out,) into the layers whose outputs stand side by side; None leaves them as they are."""
    first = 0
    for part in parts if bias is not None else ():
        with torch.no_grad():
            part.bias.copy_(bias[first : first + part.shape[0]])
        first += part.shape[0]


def fit_metric(moments, shrink=1.0, centered=False):
    """The metric of one weight from the moments of all its uses, with noise added in proportion to how little text there was.

    moments: list of Moments; centered: take the mean out, for a weight whose bias is fitted too
    shrink: white noise worth shrink * in tokens, at the power of the median channel; look-ups: shrink times as many again, random
    Gradients at the outputs, where moments have them, weigh the other side, with noise of the same kind.
    Exact: with shrink = 0 the metric is the text's own second moment, but for 1e-6 of its mean power.
    """
    rows = [m.counts for m in moments if m.counts is not None]
    inputs = [m for m in moments if m.second is not None]
    second = counts = None
    if rows:
        counts = sum(rows) + max(shrink, 1e-3) * float(sum(rows).mean())  # (rows,)
    if inputs:
        tokens = sum(m.tokens for m in inputs)
        second = sum(m.tokens / tokens * (m.covariance() if centered else m.second) for m in inputs)  # (in, in)
        second = with_noise(second, tokens, shrink)
    outputs = moments[0].gradients if len(moments) == 1 else None  # of one use: gradients of several do not share a scale
    if outputs is not None:
        outputs = with_noise(outputs, moments[0].tokens, shrink)
    return Metric(second, counts, outputs)


def with_noise(second, tokens, shrink):
    """A second moment (n, n) with the white noise added that fit_metric names, so that it is positive definite."""
    power = second.diagonal()
    level = shrink * len(second) / tokens * float(power.median()) + 1e-6 * float(power.mean())
    return second + (level or 1.0) * torch.eye(len(second), dtype=second.dtype, device=second.device)


def _present(job, moments):
    """Moments of the modules that the text reached."""
    found = [moments[name] for name in job.names if moments[name] is not None]
    if not found:
        raise ShapeError(
            f"fit_layers_, module {job.name}: the text reached none of {', '.join(job.names)}; needed at least one token. Leave the "
            "module out of the recipe, or give more text."
        )
    return found


def _fitted(job, weight, start, metric, steps, learning_rate):
    """Each part fitted to its band of the weight: (factors in the parameters' dtype, method)."""
    dtype = next(iter(job.parts[0].factors.values())).dtype
    work = dtype if dtype == torch.float64 else torch.float32
    metric, found, method = metric.to(work), [], ""
    first = 0
    for part, factors in zip(job.parts, start):
        rows = slice(first, first + part.shape[0])
        own = Metric(metric.second, _part(metric.rows, rows), _part(metric.outputs, rows, rows))
        form, own_weight, own = _in_order(part, weight[rows].to(work), own)
        plain = {name: factors[name] for name in part.factors}
        fitted, method = fit_weighted(form, plain, own_weight, own, steps, learning_rate)
        found.append({name: factor.to(dtype) for name, factor in fitted.items()} | part.orders)
        first += part.shape[0]
    return found, method


def _in_order(part, weight, metric):
    """The form without its permutation, and weight and metric in the order in which the factors hold them."""
    if not part.orders:
        return part.form, weight, metric
    natural = {f"{axis}_order": torch.arange(n, device=weight.device) for axis, n in zip(("row", "column"), part.shape)}
    rows, columns = (natural | part.orders)["row_order"].long().argsort(), (natural | part.orders)["column_order"].long()
    second = _part(metric.second, columns, columns)
    parts = second, _part(metric.rows, rows), _part(metric.outputs, rows, rows)
    return replace(part.form, permute=""), weight[rows][:, columns], Metric(*parts)


def _part(tensor, rows, columns=None):
    """tensor[rows], or tensor[rows][:, columns]; None for None."""
    if tensor is None:
        return None
    return tensor[rows] if columns is None else tensor[rows][:, columns]


def _rebuilt(job, factors):
    """The (out, in) weight that factors stand for, float64."""
    wide = [{name: f.double() if f.is_floating_point() else f for name, f in some.items()} for some in factors]
    return torch.cat([part.form.to_dense(some, part.shape) for part, some in zip(job.parts, wide)])


class _Text:
    """A text as one layer sees it: measures how much of the layer's outputs is missed."""

    def __init__(self, job, weight, moments):
        self.job, self.weight = job, weight
        self.uses = [(use, metric := Metric(use.second, use.counts), metric.square(weight)) for use in moments]

    def missed(self, factors, bias):
        """Relative error on the outputs, root mean square over the uses of a tied table."""
        difference, squares = self.weight - _rebuilt(self.job, factors), []
        gap = self.job.dense.bias.detach().double() - _own_bias(self.job, bias) if self.job.biased else None  # (out,)
        for use, metric, total in self.uses:
            square = metric.square(difference)
            if gap is not None:
                square += float(gap @ (2 * difference @ use.mean + gap))
            squares.append(max(0.0, square) / total if total > 0 else 0.0)
        return math.sqrt(sum(squares) / len(squares))


def _own_bias(job, bias):
    return (job.layer.bias.detach() if bias is None else bias).double()


def _best_bias(job, weight, factors, moments):
    """The bias that makes the mean output right: b + (W - W') mean (out,), in the parameter's dtype."""
    best = job.dense.bias.detach().double() + (weight - _rebuilt(job, factors)) @ moments.mean
    return best.to(job.layer.bias.dtype)
