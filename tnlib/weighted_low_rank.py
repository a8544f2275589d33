"""Low rank nearest to a weight in the norm of its inputs: the closed form, and band after band of it for low rank in bands."""

import torch

from tnlib.block_low_rank import cut_bands, join_bands
from tnlib.metric import Metric
from tnlib.spectrum import truncate
from tnlib.weighted_kronecker import SETTLED

ROUNDING = 1e-6  # of a moment's largest eigenvalue: what is below it, a moment held in float32 does not tell


def whitened_svd(rank, weight, metric):
    """The low-rank matrix nearest to a weight (out, in) in `metric`, which must not have both `second` and `rows`.

    Returns: {"left": (out, r), "right": (r, in)}, float64, of equal norms
    Exact: no matrix of rank r is nearer.
    """
    white = _Whitened(metric)
    return white.balanced(*white.nearest(rank, weight.double()))


class _Whitened:
    """Coordinates in which a metric is the identity: R.T W S with S S.T = second, R R.T = outputs; for look-ups sqrt(rows) W."""

    def __init__(self, metric):
        metric = metric.to(torch.float64)
        self.second, self.rows = metric.second, metric.rows
        self.root, self.singular = (None, False) if metric.second is None else _root(metric.second)  # (in, in)
        self.over = None if metric.outputs is None else torch.linalg.cholesky(metric.outputs)  # (out, out)

    def nearest(self, rank, weight):
        """The minimizer: W projected on the leading left singular vectors in these coordinates, for look-ups on the right ones."""
        if self.rows is not None:
            right = truncate(self.rows.sqrt()[:, None] * weight, rank).right  # (r, in)
            basis = torch.linalg.qr(right.mT).Q  # (in, r)
            return weight @ basis, basis.mT
        seen = weight if self.over is None else self.over.mT @ weight  # (out, in)
        basis = torch.linalg.qr(truncate(seen if self.root is None else seen @ self.root, rank).left).Q  # (out, r)
        right = basis.mT @ seen  # (r, in)
        if self.over is not None:
            basis = torch.linalg.solve_triangular(self.over.mT, basis, upper=True)
        return basis, right

    def balanced(self, left, right):
        """What `nearest` gave, with its singular values shared evenly."""
        if self.rows is not None:
            left, turn = truncate(left).balanced()  # (out, r), (r, r)
            return {"left": left, "right": turn @ right}
        turn, right = truncate(right).balanced()  # (r, r), (r, in)
        return {"left": left @ turn, "right": right}

    def told(self, half):
        """half (out, in) @ second^-1, as far as the inputs tell."""
        if self.singular:
            return half @ torch.linalg.pinv(self.second, hermitian=True, rtol=ROUNDING)
        return torch.cholesky_solve(half.mT, self.root).mT


def _root(second):
    """S with S S.T = second (in, in), triangular; and whether it is not, but from eigenvalues: fewer inputs than axes, and rounding."""
    root, failed = torch.linalg.cholesky_ex(second)
    if failed:
        squares, axes = torch.linalg.eigh(second)
        root = axes * squares.clamp_min(0).sqrt()
    return root, bool(failed)


def alternate_bands(form, factors, weight, metric, sweeps):
    """Band after band the minimizer given the others, until a sweep over all of them changes little. Never goes uphill.

    form: a resolved BlockLowRank; metric: without `rows` where it has `second`
    Starts from `factors`, or from each band's minimizer as if it were alone, whichever is nearer.
    Returns: {"left": …, "right": …}, float64
    Exact: with bands=1 it is whitened_svd; so is each band where the metric has no `second`, as bands do not meet then.
    """
    weight, metric = weight.double(), metric.to(torch.float64)
    step = weight.shape[1] // form.bands
    columns = [slice(k * step, (k + 1) * step) for k in range(form.bands)]
    whites = [_Whitened(Metric(_block(metric.second, own), metric.rows, metric.outputs)) for own in columns]
    alone = [white.nearest(form.rank, weight[:, own]) for white, own in zip(whites, columns)]
    if form.bands > 1 and metric.second is not None:
        given = list(zip(cut_bands(factors["left"].double(), form.bands), factors["right"].double()))
        start = min(alone, given, key=lambda found: metric.square(weight - _dense(found)))
        alone = _alternated(start, form.rank, weight, metric, list(zip(whites, columns)), sweeps)
    found = [white.balanced(*pair) for white, pair in zip(whites, alone)]
    left, right = (torch.stack([one[name] for one in found]) for name in ("left", "right"))
    return {"left": join_bands(left), "right": right}


def _alternated(found, rank, weight, metric, bands, sweeps):
    """The sweeps of alternate_bands: pairs (out, r), (r, in/bands)."""
    missed = metric.square(weight - _dense(found))
    for _ in range(sweeps):
        before, last = missed, list(found)
        gap = weight - _dense(found)  # (out, in)
        for k, (white, own) in enumerate(bands):
            now = found[k][0] @ found[k][1]  # (out, in/bands)
            goal = now + white.told(gap @ metric.second[:, own])  # makes up for what all bands miss
            found[k] = white.nearest(rank, goal)
            gap[:, own] += now - found[k][0] @ found[k][1]
        missed = metric.square(gap)
        if missed > before:  # by rounding, where nothing is left to gain
            return last
        if before - missed <= SETTLED * before:
            break
    return found


def _block(second, own):
    return None if second is None else second[own, own]


def _dense(found):
    return join_bands(torch.stack([left @ right for left, right in found]))
