"""A sum of Kronecker products nearest to a weight in the norm of its inputs, by alternating least squares.

With all right factors fixed the left ones solve a linear least-squares problem, and the other way round. Rows of the weight
do not meet in the loss, so one system matrix serves every row of left (or of right) factors.
"""

import math

import torch

from tnlib.metric import Metric, inverses, mode_roots, through
from tnlib.van_loan import nearest_kronecker, sum_of_products

SETTLED = 2e-3  # an alternation ends when a sweep lowers the squared error by less than this share


def unknowns(form):
    """Of the larger of the two least-squares problems, a row of left or of right factors each."""
    return form.terms * max(form.left[1], form.right[1])


def alternate(form, factors, weight, second, sweeps):
    """Exact least squares for all left factors, then all right ones, until a sweep changes little. Never goes uphill.

    Starts from `factors`, or from Van Loan's sum in coordinates in which a Kronecker-factored stand-in for `second` is the
    identity, whichever is nearer.
    Source: alternating least squares as ProcrustesGPT (2506.02818) states it.
    """
    (l0, l1), (r0, r1), k = form.left, form.right, form.terms
    metric = Metric(second)
    left, right = form._scaled_left(factors).to(weight.dtype), factors["right"].to(weight.dtype)
    other = _start(form, weight, second)
    if _missed(metric, weight, *other) < _missed(metric, weight, left, right):
        left, right = other
    pairs = second.reshape(l1, r1, l1, r1).permute(1, 3, 0, 2).reshape(r1 * r1, l1 * l1)  # (q q', p p')
    seen = (weight @ second).reshape(l0, r0, l1, r1)  # (i, j, p, q)
    by_left = seen.permute(0, 2, 1, 3).reshape(l0 * l1, r0 * r1)  # (i p, j q)
    by_right = seen.permute(1, 3, 0, 2).reshape(r0 * r1, l0 * l1)  # (j q, i p)
    total, loss = metric.square(weight), math.inf
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
    return balanced_terms(form, factors, left, right)


def _start(form, weight, second):
    """Van Loan's factors of the weight in the coordinates of the modes, taken back."""
    roots = mode_roots(second, (form.left[1], form.right[1]))
    found = nearest_kronecker(through(weight, roots), form.left, form.right, form.terms)
    by_left, by_right = inverses(roots)
    return found.left.to(weight.dtype) @ by_left, found.right.to(weight.dtype) @ by_right


def _missed(metric, weight, left, right):
    return metric.square(weight - sum_of_products(left, right))


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


def balanced_terms(form, factors, left, right):
    """Equal norms for both sides of a term; a learnable scalar keeps its value and is divided out of left."""
    a, b = (side.flatten(1).norm(dim=1).clamp_min(1e-30) for side in (left, right))  # (k,)
    ratio = (b / a).sqrt()[:, None, None]
    found = {"left": left * ratio, "right": right / ratio}
    if form.scaled:
        scale = factors["scale"].to(left.dtype)
        found |= {"left": found["left"] / scale[:, None, None], "scale": scale}
    return found
