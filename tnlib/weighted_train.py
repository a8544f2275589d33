"""A tensor train nearest to a weight in the norm of its inputs: sweeps over the cores, as DMRG in physics has them.

With all other cores fixed, the best core solves a linear least-squares problem. Its matrix is too large to write down (a core
of an MPO has tens of thousands of entries), but cheap to apply: multiply the cores out, multiply by the second moment, project
back. So each core is improved by conjugate gradients, which never go uphill.

Two things make a few iterations enough. What each mode alone shows of the second moment goes into the cores beforehand: a train
times a Kronecker product over its modes is a train of the same ranks. And the cores around the one that is chosen are kept
orthonormal, so that without a metric the first iteration would already be exact.
"""

import math

import torch

from tnlib.contract import merge
from tnlib.metric import Metric, both_sides, inverses, mode_roots, through
from tnlib.spectrum import truncate
from tnlib.tensor_train import possible_ranks, tt_svd
from tnlib.tt_matrix import interleave

ITERATIONS = 8  # of conjugate gradients a core
SETTLED = 2e-3  # sweeps end when one there and back lowers the squared error by less than this share


def sweep_train(cores, weight, metric, sweeps=4, ranks=None, sites=1, tolerance=0.0):
    """Sweep over the cores of a train, there and back, each improved in `metric` with the others in place.

    cores: (r, o, i, s) each, a start of the right modes and ranks; weight: (out, in). Rows of the cores' product beyond `out`
        are free
    ranks: (1, r_1, …, 1), most for each bond; None: those of the start
    sites: 1 keeps the ranks of the start; 2 improves two neighbors at once and cuts them apart again, so that ranks follow the
        spectrum: up to `ranks`, and no more than leaves `tolerance` of the weight's norm at each cut
    Returns: cores; the squared error at the end of every sweep, in units of `metric`
    Starts from `cores` or from the weight's TT-SVD in the modes' own coordinates, whichever is nearer.
    Exact: with sites=1 the errors do not rise; with the identity as metric, one sweep there is als's.
    """
    ranks = tuple([core.shape[0] for core in cores] + [1]) if ranks is None else tuple(ranks)
    view = _Coordinates(weight, metric, [core.shape[1] for core in cores], [core.shape[2] for core in cores])
    given = view.enter([core.to(weight.dtype) for core in cores])
    cut = view.svd(ranks)
    train = _Train(min((given, cut), key=view.missed), view)
    found = []
    for _ in range(sweeps):
        before = view.missed(train.cores)
        train.there(sites, ranks, tolerance)
        train.back(sites, ranks, tolerance)
        found.append(view.missed(train.cores))
        if before - found[-1] <= SETTLED * before:
            break
    return view.leave(train.cores), found


def spread_ranks(weight, metric, out_modes, in_modes, limit):
    """Ranks (1, r_1, …, 1) of a train of at most `limit` numbers, one for each bond, that cut least from the spectra of its bonds.

    Grown from 1, each time at the bond where a number stored saves most; spectra are those of the weight in the modes' own
    coordinates, and what bonds cut is added up, as in tt_svd's bound.
    Exact: the numbers stored are at most `limit` (or those of all ranks 1).
    """
    view = _Coordinates(weight, metric, out_modes, in_modes)
    sizes = [o * i for o, i in zip(out_modes, in_modes)]
    tensor, tails = interleave(view.weight, out_modes, in_modes), []
    for k in range(1, len(sizes)):
        matrix = tensor.reshape(math.prod(sizes[:k]), -1)
        gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
        tails.append(torch.linalg.eigvalsh(gram.double()).flip(0).clamp_min(0))
    ranks = (1,) * (len(sizes) + 1)
    while offers := [offer for k in range(1, len(sizes)) if (offer := _raised(ranks, k, sizes, tails[k - 1], limit))]:
        ranks = max(offers)[1]
    return ranks


def _stored(ranks, sizes):
    return sum(r * n * s for r, n, s in zip(ranks, sizes, ranks[1:]))


def _raised(ranks, k, sizes, values, limit):
    """(energy saved per number stored, ranks) with bond k raised by an eighth or by what still fits; None where nothing does."""
    step = max(1, ranks[k] // 8)
    while step:
        more = (*ranks[:k], ranks[k] + step, *ranks[k + 1 :])
        if _stored(more, sizes) <= limit and possible_ranks("spread_ranks", sizes, ranks=more) == more:
            return float(values[ranks[k] : more[k]].sum()) / (_stored(more, sizes) - _stored(ranks, sizes)), more
        step //= 2
    return None


class _Coordinates:
    """Weight and metric after each mode's own moment has been taken into the cores; `enter` and `leave` do it to cores."""

    def __init__(self, weight, metric, out_modes, in_modes):
        self.outs, self.ins = tuple(out_modes), tuple(in_modes)
        self.live, pad = len(weight), math.prod(self.outs) - len(weight)  # rows that count, and rows of padding behind them
        self.into, self.over = ([_eye(n, weight) for n in modes] for modes in (self.ins, self.outs))
        if metric.second is not None:
            self.into = mode_roots(metric.second, self.ins)
        turned = metric.outputs is not None and metric.rows is None and not pad  # else rows stay as they are
        if turned:
            self.over = mode_roots(metric.outputs, self.outs)
        self.out_of, self.down = inverses(self.into), inverses(self.over)
        second = None if metric.second is None else both_sides(metric.second, [tool.T for tool in self.out_of])
        outputs = both_sides(metric.outputs, [tool.T for tool in self.down]) if turned else metric.outputs
        self.metric = Metric(second, outputs=outputs)
        self.rows = metric.rows  # look-ups: the plain norm of a row is another one in these coordinates
        self.unmixed = None if self.rows is None else both_sides(_eye(weight.shape[1], weight), [tool.T for tool in self.out_of])
        inside = through(weight, self.into)
        if turned:
            inside = through(inside.T.contiguous(), self.over).T
        self.weight = torch.nn.functional.pad(inside, (0, 0, 0, pad)).contiguous()

    def times(self, difference):
        """Half the gradient of the squared error at a difference (padded out, in)."""
        live = difference[: self.live]
        found = self.metric.times(live)  # 0 for look-ups alone
        if self.rows is not None:
            found = found + self.rows[:, None] * (live @ self.unmixed)
        return torch.nn.functional.pad(found, (0, 0, 0, len(difference) - self.live))

    def missed(self, cores):
        """Squared error of a train."""
        difference = self.weight - merge(cores).squeeze(-1).squeeze(0)
        return float((difference * self.times(difference)).sum())

    def enter(self, cores):
        return [torch.einsum("roin,ij,op->rpjn", core, a, b) for core, a, b in zip(cores, self.into, self.over)]

    def leave(self, cores):
        return [torch.einsum("roin,ij,op->rpjn", core, a, b) for core, a, b in zip(cores, self.out_of, self.down)]

    def svd(self, ranks):
        """TT-SVD of the weight in these coordinates, with at most these ranks."""
        fit = tt_svd(interleave(self.weight, self.outs, self.ins), ranks=ranks)
        return [core.unflatten(1, (o, i)).to(self.weight.dtype) for core, o, i in zip(fit.cores, self.outs, self.ins)]


def _eye(n, like):
    return torch.eye(n, dtype=like.dtype, device=like.device)


class _Train:
    """Cores around the one that is chosen: those before it are orthonormal seen from the left, those behind it from the right."""

    def __init__(self, cores, view):
        self.cores, self.view = list(cores), view
        for k in range(len(cores) - 1, 0, -1):
            self._pass_left(k)

    def there(self, sites, ranks, tolerance):
        """Choose every core from the first on."""
        for k in range(len(self.cores) - sites + 1):
            self._choose(k, sites)
            if sites == 2:
                self._cut(k, ranks[k + 1], tolerance, "left")
            elif k < len(self.cores) - 1:
                self._pass_right(k)

    def back(self, sites, ranks, tolerance):
        """Choose every core from the last on."""
        for k in range(len(self.cores) - sites, -1, -1):
            self._choose(k, sites)
            if sites == 2:
                self._cut(k, ranks[k + 1], tolerance, "right")
            elif k > 0:
                self._pass_left(k)

    def _choose(self, k, sites):
        """Improve core k, or cores k and k + 1 as one, which then is at place k."""
        left, right = self._side(self.cores[:k]), self._side(self.cores[k + sites :])
        core = merge(self.cores[k : k + sites])
        if sites == 2 and len(self.cores) == 2:  # nothing else is there: the weight itself
            core, sides = self.view.weight.reshape(core.shape), None
        else:
            sides = _Sides(left, right, core.shape)
            core = _improve(core, sides, self.view)
        self.cores[k : k + sites] = [core] if sites == 1 else [core, None]

    def _side(self, cores):
        if cores:
            return merge(cores)
        return self.view.weight.new_ones(1, 1, 1, 1)

    def _cut(self, k, most, tolerance, side):
        """Two cores again out of the one at place k; the singular values go to the right ("left": what is behind is next)."""
        (o, p), (i, j) = self.view.outs[k : k + 2], self.view.ins[k : k + 2]
        r, _, _, s = self.cores[k].shape
        matrix = self.cores[k].reshape(r, o, p, i, j, s).permute(0, 1, 3, 2, 4, 5).reshape(r * o * i, p * j * s)
        cut = truncate(matrix, most, tolerance)
        left, right = cut.left, cut.right
        if side == "left" and cut.orthonormal == "right":
            left, carry = torch.linalg.qr(left)
            right = carry @ right
        if side == "right" and cut.orthonormal == "left":
            basis, carry = torch.linalg.qr(right.T)
            left, right = left @ carry.T, basis.T
        self.cores[k], self.cores[k + 1] = left.reshape(r, o, i, -1), right.reshape(-1, p, j, s)

    def _pass_right(self, k):
        """Make core k orthonormal seen from the left; the rest of it goes into the next one."""
        core = self.cores[k]
        basis, carry = torch.linalg.qr(core.flatten(0, 2))
        self.cores[k] = basis.reshape(*core.shape[:3], -1)
        self.cores[k + 1] = torch.tensordot(carry, self.cores[k + 1], 1)

    def _pass_left(self, k):
        """Make core k orthonormal seen from the right; the rest of it goes into the one before."""
        core = self.cores[k]
        basis, carry = torch.linalg.qr(core.flatten(1).T)
        self.cores[k] = basis.T.reshape(-1, *core.shape[1:])
        self.cores[k - 1] = torch.tensordot(self.cores[k - 1], carry.T, 1)


class _Sides:
    """What a core becomes in the weight, and back: left (1, O, I, r) and right (s, P, J, 1) are fixed."""

    def __init__(self, left, right, shape):
        _, big, wide, r = left.shape
        s, tall, long, _ = right.shape
        self.left, self.right, self.shape = left.reshape(-1, r), right.reshape(s, -1), shape  # (O*I, r), (s, P*J)
        self.sizes = big, wide, tall, long

    def weight(self, core):
        """The weight (out, in) of a core (r, o, i, s)."""
        (big, wide, tall, long), (r, o, i, s) = self.sizes, self.shape
        part = self.left @ core.reshape(r, o * i * s)  # (O*I, o*i*s)
        whole = (part.reshape(-1, s) @ self.right).reshape(big, wide, o, i, tall, long)
        return whole.permute(0, 2, 4, 1, 3, 5).reshape(big * o * tall, wide * i * long)

    def core(self, weight):
        """The core-shaped part of a weight (out, in): the transpose of `weight`."""
        (big, wide, tall, long), (r, o, i, s) = self.sizes, self.shape
        whole = weight.reshape(big, o, tall, wide, i, long).permute(0, 3, 1, 4, 2, 5).reshape(big * wide, -1)
        part = self.left.T @ whole  # (r, o*i*P*J)
        return (part.reshape(r * o * i, tall * long) @ self.right.T).reshape(r, o, i, s)


def _improve(core, sides, view):
    """A few conjugate gradients for the best core, from the one there is."""
    residual = sides.core(view.times(view.weight - sides.weight(core)))
    square = float(residual.square().sum())
    direction = residual
    for _ in range(ITERATIONS):
        if square == 0:
            break
        image = sides.core(view.times(sides.weight(direction)))
        curvature = float((direction * image).sum())
        if not curvature > 0:
            break
        core = core + (square / curvature) * direction
        residual = residual - (square / curvature) * image
        before, square = square, float(residual.square().sum())
        direction = residual + (square / before) * direction
    return core
