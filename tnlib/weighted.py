"""Nearest factors in the norm of the inputs: a form is fitted to W so that x W' is near x W, not W' near W.

The error on inputs x with second moment C is tr((W - W') C (W - W').T). Low rank has a closed form, and each band of low rank
in bands has it given the others (weighted_low_rank.py); Kronecker sums (weighted_kronecker.py) and trains (weighted_train.py) are
linear in each factor and are fitted a factor at a time; what is left, rings too, goes downhill through `to_dense`. No step needs
the inputs themselves.
"""

import math

import torch

from tnlib.block_low_rank import BlockLowRank
from tnlib.form import evened
from tnlib.kronecker import Kronecker
from tnlib.low_rank import LowRank
from tnlib.tensor_ring import TensorRing, downhill
from tnlib.tensor_train import TensorTrain
from tnlib.tt_matrix import TTMatrix
from tnlib.weighted_kronecker import alternate, unknowns
from tnlib.weighted_low_rank import alternate_bands, whitened_svd
from tnlib.weighted_train import sweep_train

LARGEST_SYSTEM = 2560  # unknowns solved for at once in a Kronecker half step: about 0.5 s on one core
STEPS_A_SWEEP = 20  # gradient steps that take about as long as a sweep over a train's cores
WARM_UP = 5  # gradient steps over which the step size rises


def fit_weighted(form, factors, weight, metric, steps=40, learning_rate=0.1):
    """Move `factors` so that the weight they stand for is nearer to `weight` in `metric`.

    form: resolved; factors: by name, the start; weight: (out, in)
    steps: most alternations of a Kronecker sum or of bands, or gradient steps, for a ring those of L-BFGS; a train is swept
        steps / 20 times at most
    learning_rate: of the gradient method; a step moves a factor by about learning_rate times its root mean square
    Returns: factors by name, in the dtype of `weight` or float64; how they were found: "closed form", "alternating", "sweeps",
        "gradient". Those of trains and rings have equal root mean squares: sweeps leave them a hundred times apart, and one
        learning rate must suit all when they are trained on
    Exact: with second = identity (and no more) a least-squares start of low rank, in bands or not, or Kronecker is a fixed point.
    Source: low rank as in SVD-LLM (2403.07378); Kronecker as in ProcrustesGPT (2506.02818); trains and bands: own.
    """
    table = metric.second is not None and metric.rows is not None
    if isinstance(form, LowRank) and not table:
        return whitened_svd(form.rank, weight, metric), "closed form"
    if isinstance(form, BlockLowRank) and not table:
        how = "alternating" if form.bands > 1 and metric.second is not None else "closed form"
        return alternate_bands(form, factors, weight, metric, steps), how
    plain = metric.rows is None and metric.outputs is None
    if isinstance(form, Kronecker) and plain and unknowns(form) <= LARGEST_SYSTEM:
        return alternate(form, factors, weight, metric.second, steps), "alternating"
    if isinstance(form, (TensorTrain, TTMatrix)) and not form.redundant and steps:
        if isinstance(form, TensorTrain) and not table:  # no train of this middle rank does better than the low-rank weight
            best = whitened_svd(form.middle_rank, weight, metric)
            factors, _ = form.decompose((best["left"] @ best["right"]).to(weight.dtype))
        sweeps = math.ceil(steps / STEPS_A_SWEEP)
        cores, _ = sweep_train(form.paired(factors), weight, metric.relative_to(weight), sweeps)
        return evened(form.unpaired(cores)), "sweeps"
    if isinstance(form, TensorRing):
        return downhill(form, factors, weight, metric.relative_to(weight).times, steps), "gradient"
    return _descend(form, factors, weight, metric.relative_to(weight), steps, learning_rate), "gradient"


def _descend(form, factors, weight, metric, steps, learning_rate):
    """Adam through to_dense, with steps in units of each factor's size; returns the best point that it passed."""
    factors = evened({name: factor.detach().to(weight.dtype) for name, factor in factors.items()})
    points = [factor.clone(memory_format=torch.contiguous_format).requires_grad_() for factor in factors.values()]
    sizes = [float(p.detach().square().mean().sqrt()) for p in points]
    optimizer = torch.optim.Adam([{"params": [p]} for p in points], betas=(0.9, 0.99), eps=1e-20)
    best, lowest = factors, math.inf
    for step in range(steps + 1):
        optimizer.zero_grad()
        rebuilt = form.to_dense(dict(zip(factors, points)), tuple(weight.shape))  # (out, in)
        with torch.no_grad():
            difference = rebuilt - weight
            half = metric.times(difference)  # (out, in)
            loss = float((difference * half).sum())
        if loss < lowest:
            best, lowest = {name: p.detach().clone() for name, p in zip(factors, points)}, loss
        if step == steps:
            break
        rebuilt.backward(2 * half)
        if sum(float((p.grad * p.detach()).abs().sum()) for p in points) <= 1e-7 * abs(loss):  # nowhere to go
            break
        rate = learning_rate * min(1, (step + 1) / (WARM_UP + 1)) * (1 + math.cos(math.pi * step / steps)) / 2
        for group, size in zip(optimizer.param_groups, sizes):
            group["lr"] = rate * size
        optimizer.step()
    return best
