"""Row and column orders in which a weight is nearer to a sum of Kronecker products: two searches, and their gain on noise.

A search always finds something: on a Gaussian matrix, too, rho rises. `permutation_gain` therefore runs the same search on
noise of the same shape and reports the difference. Sorting large rows together is worth something as well, whatever stands
in them, so there is a second null: noise with the weight's own row and column norms.
"""

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from tnlib.arrange import SMALL, Arrangement, reassign, regroup, sorted_orders
from tnlib.assign import assign
from tnlib.form import positive
from tnlib.shapes import ShapeError
from tnlib.van_loan import check_products

AXES = {"rows": ("rows",), "columns": ("columns",), "both": ("rows", "columns")}
SEARCHES = ("sorted", "damped")


class Permutation(NamedTuple):
    """Result of `permute_kronecker`: weight[rows][:, columns] is what the sum of products approximates."""

    rows: torch.Tensor  # (out,) int64
    columns: torch.Tensor  # (in,) int64
    rho: float  # of the order found
    before: float  # of the order as given
    history: tuple[float, ...]  # rho of the winning start, then after each of its sweeps
    start: str  # which start won


def permute_kronecker(
    weight, left, right, terms=1, axes="both", search="sorted", sweeps=None, starts=None, seed=0
):  # fmt: skip
    """Row and column order of `weight` that raises rho = ||nearest sum of Kronecker products|| / ||weight||.

    weight: (out, in) = (l0*r0, l1*r1), float; left, right, terms: as nearest_kronecker takes them
    axes: "both", "rows" or "columns", the ones that may be reordered
    search: "sorted": from the order as given and from sorting singular vectors of |weight| (`arrange.sorted_orders`), with
        moves that never lower rho, until it stands still. "damped": the published one, from random orders and a random target
    sweeps: most passes over the axes; default 20 for "sorted", 5 for "damped"
    starts: "damped" only: random starts to take the best of (default 1), or "identity"; seed: of the random starts
    Returns: Permutation
    Raises: ShapeError on sizes that do not multiply to the weight's, on unknown axes and searches, NaN weights
    Source: "damped" after TQCompressor (arXiv 2401.16367) as papers describe it; "sorted" is this library's.
    Exact: rho is sqrt(1 - error^2) of nearest_kronecker(weight[rows][:, columns], …), up to the iteration's 1e-4 where both
        factors have more than 512 numbers; "sorted" is never below `before`.
    """
    check_products("permute_kronecker", weight, left, right, terms)
    positive("permute_kronecker", sweeps=sweeps)
    if axes not in AXES or search not in SEARCHES or weight.dim() != 2:
        raise ShapeError(
            f"permute_kronecker: got axes={axes!r}, search={search!r}, weight {tuple(weight.shape)}; needed axes of "
            f"{', '.join(AXES)}, a search of {', '.join(SEARCHES)}, one (out, in) weight. Loop over a batch."
        )
    weight = weight.detach().cpu()  # the assignments run there
    weight = weight if weight.dtype == torch.float64 else weight.float()
    tall = axes == "columns" and right[0] == 1 and weight.shape[0] > weight.shape[1]
    full, weight, left = weight, *(_columns_only(weight, left) if tall else (weight, left))
    small_right = left[0] * left[1] >= right[0] * right[1]  # else search for kron(B, A), which is kron(A, B) shuffled
    sides = (tuple(left), tuple(right)) if small_right else (tuple(right), tuple(left))
    given = Arrangement(weight, *sides, terms, *(_natural(n, a, small_right) for n, a in zip(weight.shape, left)))
    given.fit()
    if search == "sorted":
        runs = _sorted(given, AXES[axes], sweeps or 20)
    else:
        runs = _damped(given, AXES[axes], sweeps or 5, starts, seed)
    best, history, start = max(runs, key=lambda run: run[0].rho)
    rows, columns = (_shuffled(o, b, small_right) for o, b in zip((best.rows, best.columns), left))
    rows = torch.arange(len(full)) if tall else rows
    return Permutation(rows, columns, best.rho, given.rho, tuple(history), start)


def _columns_only(weight, left):
    """A square matrix with the columns' inner products, for a tall one whose columns alone move: an embedding.

    With a right factor of one row, rho depends on the columns' Gram matrix only, whatever their order.
    """
    small = torch.linalg.qr(weight, mode="r").R  # (in, in)
    return small, (len(small), left[1])


def _natural(size, l_size, small_right):
    """The order as given; with the factors' roles exchanged, the shuffle that makes kron(A, B) of kron(B, A)."""
    order = torch.arange(size)
    return order if small_right else order.reshape(l_size, -1).T.flatten()


def _shuffled(order, l_size, small_right):
    """Undo that shuffle in an order that was found."""
    return order if small_right else order.reshape(-1, l_size).T.flatten()


def _sorted(given, axes, sweeps):
    """From the order as given and from the best of the sorted ones a first sweep each; the better goes on alone."""
    candidates = []
    for rows, columns in sorted_orders(given.weight, given.left, given.right):
        order = {"rows": rows, "columns": columns}
        candidates.append(replace(given, basis=None, **{axis: order[axis] for axis in axes}))
        candidates[-1].fit()
    runs = [(replace(given), [given.rho], "as given")]
    if candidates:
        best = max(candidates, key=lambda c: c.rho)
        runs.append((best, [best.rho], "sorted"))
    for state, history, _ in runs:
        _climb(state, axes, 1, history)
    ahead = max(runs, key=lambda run: run[0].rho)
    _climb(ahead[0], axes, sweeps - 1, ahead[1])
    yield ahead


def _climb(state, axes, sweeps, history):
    """Moves that never lower rho, until a sweep gains less than 1e-5 of it; `history` grows by rho after each."""
    moves = (reassign, regroup) if state.right[0] * state.right[1] <= SMALL else (reassign,)
    for _ in range(sweeps):
        if len(history) > 2 and history[-1] - history[-2] <= 1e-5 * history[-2]:
            break
        for axis, move in itertools.product(axes, moves):
            state.fit()
            setattr(state, axis, move([state if axis == "rows" else state.T]))
        state.fit()
        history.append(state.rho)


def _damped(given, axes, sweeps, starts, seed):
    """The published alternation: the target is a mixture of its past and the fit, t from 1/2 to 1, then one assignment."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(1 if starts in (None, "identity") else starts):
        state = replace(given)
        target = state.product()
        if starts != "identity":
            for axis in axes:
                order = torch.randperm(len(getattr(given, axis)), generator=generator)
                setattr(state, axis, order)
            target = torch.randn(given.weight.shape, generator=generator).to(target) * given.weight.std()
        state.basis = None
        state.fit()
        history = [state.rho]
        for sweep in range(sweeps):
            t = 0.5 + 0.5 * sweep / max(1, sweeps - 1)
            for axis in axes:
                target = target.lerp(state.product(), t)
                if axis == "rows":
                    state.rows = assign(target @ state.weight[:, state.columns].T, state.rows, state.exact)
                else:
                    state.columns = assign(target.T @ state.weight[state.rows], state.columns, state.exact)
            state.fit()
            history.append(state.rho)
        yield state, history, "identity" if starts == "identity" else f"random {number}"


@dataclass(frozen=True)
class Gain:
    """What a search gained on one weight, beside the same search on Gaussian noise of the same shape."""

    before: float  # rho in the order as given
    after: float
    null_gain: float  # on Gaussian noise, mean over seeds
    null_std: float
    norms_gain: float  # on noise with the row and column norms of the weight, mean over seeds

    @property
    def gain(self):
        return self.after - self.before

    @property
    def beyond_null(self):
        """Gain minus the gain on Gaussian noise: what reordering found that was in the weight, its norms included."""
        return self.gain - self.null_gain

    @property
    def beyond_norms(self):
        """Gain minus the gain on noise of equal row and column norms: structure, not sizes."""
        return self.gain - self.norms_gain


def permutation_gain(weight, left, right, terms=1, seeds=3, **options):
    """Gain in rho of permute_kronecker(weight, left, right, terms, **options), and of the same call on two kinds of noise."""
    found = permute_kronecker(weight, left, right, terms, **options)
    null = _null(tuple(weight.shape), tuple(left), tuple(right), terms, seeds, tuple(sorted(options.items())))
    twins = [permute_kronecker(noise_like(weight, seed), left, right, terms, **options) for seed in range(seeds)]
    return Gain(found.before, found.rho, *null, sum(twin.rho - twin.before for twin in twins) / seeds)


def noise_like(weight, seed=0):
    """Gaussian noise, its rows and columns scaled to the norms of those of `weight` (out, in).

    Source: alternating scaling of rows and columns (Sinkhorn 1964, on the squares), 20 times.
    Exact: the column norms are the weight's; the row norms to a few parts in a million.
    """
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight)
    squares, rows, columns = noise.square(), weight.square().sum(1), weight.square().sum(0)
    by_column = torch.ones_like(columns)
    for _ in range(20):  # scales, squared; two passes over the squares
        by_row = rows / (squares @ by_column).clamp_min(1e-30)
        by_column = columns / (by_row @ squares).clamp_min(1e-30)
    return noise * by_row.sqrt()[:, None] * by_column.sqrt()


@lru_cache(maxsize=1024)
def _null(shape, left, right, terms, seeds, options):
    search, gains = partial(permute_kronecker, left=left, right=right, terms=terms, **dict(options)), []
    for seed in range(seeds):
        found = search(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        gains.append(found.rho - found.before)
    gains = torch.tensor(gains, dtype=torch.float64)
    return float(gains.mean()), float(gains.std(correction=0))
