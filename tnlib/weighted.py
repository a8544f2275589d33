"""Nearest factors in the norm of the inputs: a form is fitted to W so that x W' is near x W, not W' near W.

The error on inputs x with second moment C is tr((W - W') C (W - W').T). Low rank has a closed form; with every other
factor held fixed a Kronecker sum is a linear least-squares problem, solved exactly in turns; any other form goes downhill
through `to_dense`. No step needs the inputs themselves.
"""

import math
from dataclasses import dataclass

import torch

from tnlib.kronecker import Kronecker
from tnlib.low_rank import LowRank
from tnlib.spectrum import truncate

LARGEST_SYSTEM = 2560  # unknowns solved for at once in a Kronecker half step: about 0.5 s on one core
SETTLED = 2e-3  # an alternation ends when a sweep lowers the squared error by less than this share
WARM_UP = 5  # gradient steps over which the step size rises


@dataclass(frozen=True)
class Metric:
    """How much each error of a weight (out, in) matters: tr(D second D.T) for inputs, sum(rows * |D_row|^2) for look-ups.

    Both are given for a table that is an embedding and an output head; each is then relative to the weight's own norm in it.
    """

    second: torch.Tensor | None = None  # (in, in), positive definite
    rows: torch.Tensor | None = None  # (out,), positive

    def relative_to(self, weight):
        """The same metric with squared norm 1 (2 where both parts are given) for `weight`; a weight of norm 0 is left alone."""
        parts = [
            None if part is None else part / max(1e-300, Metric(**{name: part}).square(weight))
            for name, part in (("second", self.second), ("rows", self.rows))
        ]
        return Metric(*parts)

    def to(self, dtype):
        return Metric(*(None if part is None else part.to(dtype) for part in (self.second, self.rows)))

    def times(self, difference):
        """D (out, in) -> D @ second + rows * D (out, in): half the gradient of the squared error."""
        out = 0 if self.second is None else difference @ self.second
        return out if self.rows is None else out + self.rows[:, None] * difference

    def square(self, difference):
        """|D|^2 in this metric."""
        return float((difference * self.times(difference)).sum())

    def error(self, difference, weight):
        """|D| / |W| in this metric; 0 for a weight of norm 0."""
        total = self.square(weight)
        return math.sqrt(max(0.0, self.square(difference)) / total) if total > 0 else 0.0


def fit_weighted(form, factors, weight, metric, steps=40, learning_rate=0.1):
    """Move `factors` so that the weight they stand for is nearer to `weight` in `metric`.

    form: resolved; factors: by name, the start; weight: (out, in)
    steps, learning_rate: of the gradient method; a step moves a factor by about learning_rate times its root mean square
    Returns: factors by name, in the dtype of `weight` or float64; how they were found: "closed form", "alternating", "gradient"
    Exact: with second = identity (and no rows) a least-squares low-rank or Kronecker start is a fixed point.
    Source: low rank as in SVD-LLM (2403.07378); Kronecker by alternating least squares, as ProcrustesGPT (2506.02818) states it.
    """
    both = metric.second is not None and metric.rows is not None
    if isinstance(form, LowRank) and not both:
        return _whitened_svd(form.rank, weight, metric), "closed form"
    if isinstance(form, Kronecker) and metric.rows is None and _largest(form) <= LARGEST_SYSTEM:
        return _alternate(form, factors, weight, metric.second, steps), "alternating"
    return _descend(form, factors, weight, metric.relative_to(weight), steps, learning_rate), "gradient"


def _whitened_svd(rank, weight, metric):
    """The minimizer: project W on the leading left singular vectors of W S, S S.T = second (or the right ones of sqrt(rows) W)."""
    weight = weight.double()
    if metric.rows is not None:
        right = truncate(metric.rows.double().sqrt()[:, None] * weight, rank).right  # (r, in)
        basis = torch.linalg.qr(right.mT).Q  # (in, r)
        left, right = truncate(weight @ basis).balanced()  # (out, r), (r, r)
        return {"left": left, "right": right @ basis.mT}
    root = _root(metric.second.double())  # (in, in)
    basis = torch.linalg.qr(truncate(weight @ root, rank).left).Q  # (out, r)
    left, right = truncate(basis.mT @ weight).balanced()  # (r, r), (r, in)
    return {"left": basis @ left, "right": right}


def _root(second):
    """S with S S.T = second (in, in); through eigenvalues where rounding made it indefinite, as fewer inputs than axes do."""
    root, failed = torch.linalg.cholesky_ex(second)
    if failed:
        squares, axes = torch.linalg.eigh(second)
        root = axes * squares.clamp_min(0).sqrt()
    return root


def _largest(form):
    """Unknowns of the larger of the two least-squares problems, a row of left or of right factors each."""
    return form.terms * max(form.left[1], form.right[1])


def _alternate(form, factors, weight, second, sweeps):
    """Exact least squares for all left factors, then all right ones, until a sweep changes little. Never goes uphill.

    Rows of the weight do not meet in the loss, so one system matrix serves every row of left (or of right) factors.
    """
    (l0, l1), (r0, r1), k = form.left, form.right, form.terms
    left, right = form._scaled_left(factors).to(weight.dtype), factors["right"].to(weight.dtype)
    pairs = second.reshape(l1, r1, l1, r1).permute(1, 3, 0, 2).reshape(r1 * r1, l1 * l1)  # (q q', p p')
    seen = (weight @ second).reshape(l0, r0, l1, r1)  # (i, j, p, q)
    by_left = seen.permute(0, 2, 1, 3).reshape(l0 * l1, r0 * r1)  # (i p, j q)
    by_right = seen.permute(1, 3, 0, 2).reshape(r0 * r1, l0 * l1)  # (j q, i p)
    total = Metric(second).square(weight)
    loss = math.inf
    for _ in range(sweeps):
        system = _system(right, pairs)  # (k*l1, k*l1)
        wanted = (by_left @ right.reshape(k, -1).mT).reshape(l0, l1, k).permute(2, 1, 0).reshape(k * l1, l0)
        left = _solve(system, wanted, left.permute(0, 2, 1).reshape(k * l1, l0)).reshape(k, l1, l0).permute(0, 2, 1)
        system = _system(left, pairs.mT)  # (k*r1, k*r1)
        wanted = (by_right @ left.reshape(k, -1).mT).reshape(r0, r1, k).permute(2, 1, 0).reshape(k * r1, r0)
        flat = _solve(system, wanted, right.permute(0, 2, 1).reshape(k * r1, r0))  # (k*r1, r0)
        right = flat.reshape(k, r1, r0).permute(0, 2, 1)  # (k, r0, r1)
        before, loss = loss, total + float((flat * (system @ flat - 2 * wanted)).sum())
        if before - loss <= SETTLED * loss:
            break
    return _balanced_terms(form, factors, left, right)


def _system(fixed, pairs):
    """Normal matrix of the free side: fixed (k, rows, m), pairs (m m', n n') -> (k*n, k*n)."""
    k, _, m = fixed.shape
    flat = fixed.permute(0, 2, 1).reshape(k * m, -1)  # (k*m, rows)
    gram = (flat @ flat.mT).reshape(k, m, k, m).permute(0, 2, 1, 3).reshape(k * k, m * m)  # (k k', m m')
    n = math.isqrt(pairs.shape[1])
    return (gram @ pairs).reshape(k, k, n, n).permute(0, 2, 1, 3).reshape(k * n, k * n)


def _solve(system, wanted, now):
    """Minimize x.T system x - 2 x.T wanted, staying near `now` where the system is singular: every jitter goes downhill."""
    level = float(system.diagonal().mean())
    for jitter in (1e-12, 1e-9, 1e-6, 1e-3):
        damped = system.clone()
        damped.diagonal().add_(jitter * level)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return now + torch.cholesky_solve(wanted - system @ now, root)
    return now


def _balanced_terms(form, factors, left, right):
    """Equal norms for both sides of a term; a learnable scalar keeps its value and is divided out of left."""
    a, b = (side.flatten(1).norm(dim=1).clamp_min(1e-30) for side in (left, right))  # (k,)
    ratio = (b / a).sqrt()[:, None, None]
    found = {"left": left * ratio, "right": right / ratio}
    if form.scaled:
        scale = factors["scale"].to(left.dtype)
        found |= {"left": found["left"] / scale[:, None, None], "scale": scale}
    return found


def _descend(form, factors, weight, metric, steps, learning_rate):
    """Adam through to_dense, with steps in units of each factor's size; returns the best point that it passed."""
    factors = _evened({name: factor.detach().to(weight.dtype) for name, factor in factors.items()})
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


def _evened(factors):
    """The same product with equal root mean squares in all factors (a scale keeps its own)."""
    sizes = {n: float(f.square().mean().sqrt()) for n, f in factors.items() if n != "scale"}
    if min(sizes.values()) == 0:
        return factors
    even = math.exp(sum(map(math.log, sizes.values())) / len(sizes))
    return {name: factor * (even / sizes[name]) if name in sizes else factor for name, factor in factors.items()}
