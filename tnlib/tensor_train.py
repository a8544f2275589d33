"""Tensor trains: TT-SVD of a tensor, and the tensor-train weight of Yang et al. The TT-matrix (MPO) is in tt_matrix.py.

A TensorTrain weight runs over the input modes, then the output modes, so it factors as (in, r) times (r, out) at the
middle bond: its matrix rank is at most the middle rank, however large the other ranks are.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tnlib.contract import Arrangement
from tnlib.form import Form, check_kept, largest, positive, refuse_init, relative
from tnlib.shapes import ShapeError, balanced_modes, check_weight
from tnlib.spectrum import truncate, whole
from tnlib.sweeps import als


class TensorTrainFit(NamedTuple):
    """Result of `tt_svd` and `ttm_svd`."""

    cores: list  # tt_svd: (…, r, n, r'); ttm_svd: (…, r, out_k, in_k, r')
    ranks: tuple  # (1, r_1, …, r_{d-1}, 1), the actual ones
    error: torch.Tensor  # (…,) relative Frobenius error, float64
    discarded: tuple  # share of the energy cut at each bond, d-1 tensors (…,); error^2 is their sum


def tt_svd(tensor, max_rank=None, tolerance=0.0, ranks=None, batch_dims=0):
    """Tensor train of `tensor` by successive truncated SVDs, always at the end whose unfolding is shorter.

    tensor: (batch…, n_1, …, n_d), float; `batch_dims` leading axes are a batch
    max_rank: cap on every bond; ranks: a cap for each bond, as a full tuple (1, r_1, …, r_{d-1}, 1). Caps beyond what the
        modes allow are lowered, and `ranks` of the result are the actual ones
    tolerance: relative error allowed for the whole tensor, shared equally (in squares) by the d-1 bonds
    Returns: TensorTrainFit(cores, ranks, error, discarded). Each cut is an orthogonal projection of what the cuts before
        it left, so error^2 = sum(discarded) exactly; each term is at most what the best rank-r_k unfolding discards
    Raises: ShapeError on NaN or infinite entries, on ranks that are not d+1 positive integers with 1 at both ends
    Source: Oseledets 2011, algorithm 1 and theorem 2.2, swept from both ends. Exact at full rank.
    """
    batch, modes = tensor.shape[:batch_dims], tuple(tensor.shape[batch_dims:])
    check_weight(tensor.reshape(1, -1), "tt_svd")
    caps = possible_ranks("tt_svd", modes, max_rank, ranks)
    share = tolerance / math.sqrt(max(1, len(modes) - 1))
    cores, cut = [None] * len(modes), [None] * (len(modes) - 1)  # a cut: energy discarded, and in all
    rest = tensor if tensor.dtype == torch.float64 else tensor.float()
    del tensor  # what is left is held once: a caller who lets go of the tensor saves its size
    first, last, row, column = 0, len(modes) - 1, 1, 1  # modes left to split off, ranks at both ends of the rest
    before, after = None, None  # bases (row, row) and (column, column) into which the rest is still to be turned
    while first < last:
        top, end = row * modes[first], modes[last] * column
        if top <= end:
            step, turn = _split(rest.reshape(*batch, top, -1), caps[first + 1], share)
            cores[first] = _turned(step.left.reshape(*batch, row, modes[first], step.rank), before, None)
            cut[first] = step.discarded, step.total
            rest, row, first, before = step.right, step.rank, first + 1, turn
        else:
            step, turn = _split(rest.reshape(*batch, -1, end), caps[last], share)
            cores[last] = _turned(step.right.reshape(*batch, step.rank, modes[last], column), None, after)
            cut[last - 1] = step.discarded, step.total
            rest, column, last, after = step.left, step.rank, last - 1, turn
    cores[first] = _turned(rest.reshape(*batch, row, modes[first], column), before, after)
    return _finish(cores, cut)


def _split(matrix, cap, tolerance):
    """`truncate`; where nothing is cut, the rest as it is and the basis (short, short) into which a later, smaller core is turned."""
    if cap < min(matrix.shape[-2:]) or tolerance:
        return truncate(matrix, cap, tolerance), None
    return whole(matrix)


def _turned(core, before, after):
    """A core (…, r, n, r') in the bases (…, r, r) and (…, r', r') of its bonds."""
    if before is not None:
        core = (before.mT @ core.flatten(-2)).reshape(core.shape)
    return core if after is None else (core.flatten(-3, -2) @ after).reshape(core.shape)


def best_train(where, tensor, ranks, init, batch_dims):
    """TT-SVD of `tensor`, and for init="als" the sweeps that improve it: cores, relative error (…,)."""
    refuse_init(where, init, ("svd", "als"))
    fit = tt_svd(tensor, ranks=ranks, batch_dims=batch_dims)
    if init == "als":
        fit = als(fit.cores, tensor, batch_dims=batch_dims)
    return fit.cores, fit.error


def _finish(cores, cut):
    """The fit: the largest total is the tensor's own energy, since every later cut saw a projection of it."""
    ranks = (1, *(core.shape[-1] for core in cores))
    if not cut:
        return TensorTrainFit(cores, ranks, torch.zeros(cores[0].shape[:-3], dtype=torch.float64, device=cores[0].device), ())
    total = torch.stack([energy for _, energy in cut]).amax(0)  # (…,)
    shares = tuple(discarded / total.clamp_min(1e-300) for discarded, _ in cut)
    return TensorTrainFit(cores, ranks, relative(sum(shares), torch.ones_like(total)), shares)


def possible_ranks(where, modes, max_rank=None, ranks=None):
    """The full tuple of ranks (1, r_1, …, 1) that a train over `modes` can have under a cap or a cap per bond.

    Raises: ShapeError on caps below 1 or a `ranks` of the wrong length; nothing is dropped silently.
    Exact: with no cap, r_k = min(n_1…n_k, n_{k+1}…n_d).
    """
    positive(where, max_rank=max_rank, ranks=ranks)
    if ranks is not None and (len(ranks) != len(modes) + 1 or ranks[0] != 1 or ranks[-1] != 1):
        raise ShapeError(
            f"{where}: got ranks={tuple(ranks)} for {len(modes)} modes {tuple(modes)}; needed {len(modes) + 1} ranks with 1 at "
            f"both ends. Write all of them, e.g. {(1, *[8] * (len(modes) - 1), 1)}, or give max_rank."
        )
    caps = list(ranks) if ranks is not None else [1, *[max_rank or math.prod(modes)] * (len(modes) - 1), 1]
    for k, n in enumerate(modes[:-1]):
        caps[k + 1] = min(caps[k + 1], caps[k] * n)
    for k in range(len(modes) - 1, 0, -1):
        caps[k] = min(caps[k], caps[k + 1] * modes[k])
    return tuple(caps)


def merge_left(cores):
    """Multiply cores from the left: [(…, 1, n_1, r_1), …] -> (…, n_1*…*n_k, r_k)."""
    merged = cores[0].flatten(-3, -2)  # (…, n_1, r_1)
    for core in cores[1:]:
        merged = (merged @ core.flatten(-2)).unflatten(-1, core.shape[-2:]).flatten(-3, -2)  # (…, N*n, r)
    return merged


def merge_right(cores):
    """Multiply cores from the right: [(…, r_k, n, r), …, (…, r, n_d, 1)] -> (…, r_k, n_{k+1}*…*n_d)."""
    merged = cores[-1].flatten(-2)  # (…, r, n_d)
    for core in reversed(cores[:-1]):
        merged = (core.flatten(-3, -2) @ merged).unflatten(-2, core.shape[-3:-1]).flatten(-2)  # (…, r, n*N)
    return merged


def names(factors):
    """Cores in order out of a dictionary {"core0": …, "core1": …}."""
    return [factors[f"core{k}"] for k in range(len(factors))]


def take_modes(form, *others):
    """Settle the modes that a form was given: a list, as JSON and YAML have them, becomes a tuple; `others` are fields as well.

    Raises: ShapeError where neither order nor the modes of both sides are given.
    """
    for name in ("out_modes", "in_modes", *others):
        if getattr(form, name) is not None:
            object.__setattr__(form, name, tuple(getattr(form, name)))
    if form.order is None and (form.out_modes is None or form.in_modes is None):
        raise ShapeError(
            f"{type(form).__name__}: got out_modes={form.out_modes}, in_modes={form.in_modes}; needed both, or order=3, say."
        )


@dataclass(frozen=True)
class _Train(Form):
    """What TensorTrain and TTMatrix share: modes of both sides, ranks given, capped, or found from a budget.

    Modes as integers whose product is the side, or `order` = how many balanced modes a side gets.
    `ranks` (full tuple), `max_rank` (cap on each bond), or `kept` (share of out*in: the largest cap that fits); with
    none of them the train is exact. Ranks beyond what the modes allow are lowered, unless `redundant`, which stores them as
    given (some papers do; they add parameters and nothing that the smaller train could not represent).
    """

    out_modes: tuple[int, ...] | None = None
    in_modes: tuple[int, ...] | None = None
    order: int | None = None
    ranks: tuple[int, ...] | None = None
    max_rank: int | None = None
    kept: float | None = None
    redundant: bool = False

    def __post_init__(self):
        where = type(self).__name__
        positive(
            where,
            out_modes=self.out_modes,
            in_modes=self.in_modes,
            order=self.order,
            ranks=self.ranks,
            max_rank=self.max_rank,
        )
        check_kept(where, self.kept)
        if sum(given is not None for given in (self.ranks, self.max_rank, self.kept)) > 1:
            raise ShapeError(
                f"{where}: got more than one of ranks={self.ranks}, max_rank={self.max_rank}, kept={self.kept}. Give one."
            )
        take_modes(self, "ranks")

    def resolve(self, shape):
        """The same form with modes and the ranks that are really possible for a weight of `shape` (out, in)."""
        form = replace(
            self,
            out_modes=self.out_modes or self._split_rows(shape[0]),
            in_modes=self.in_modes or balanced_modes(shape[1], self.order),
            order=None,
        )
        form._check_modes(shape)
        where, modes = type(self).__name__, form._modes()
        if self.kept is None:
            ranks = possible_ranks(where, modes, self.max_rank, self.ranks)
            return replace(form, ranks=self.ranks if self.redundant and self.ranks else ranks, max_rank=None)
        limit = self.kept * math.prod(shape)

        def train(cap):
            return replace(form, ranks=possible_ranks(where, modes, cap), max_rank=None, kept=None)

        def fits(cap):
            return sum(math.prod(size) for size in train(cap).factor_shapes(shape).values()) <= limit

        return train(
            largest(
                fits, max(possible_ranks(where, modes)), f"{where} kept={self.kept} of weight {tuple(shape)} (out, in)"
            )
        )

    def _split_rows(self, size):
        return balanced_modes(size, self.order)

    def _check_modes(self, shape):
        for side, modes, size in (("out", self.out_modes, shape[0]), ("in", self.in_modes, shape[1])):
            if math.prod(modes) != size:
                raise ShapeError(
                    f"{type(self).__name__} {side}_modes {modes} multiply to {math.prod(modes)}; needed {size}, the {side} side of "
                    f"weight {tuple(shape)} (out, in). Choose modes whose product is {size}, or give order= for balanced ones."
                )

    def _named(self, cores):
        """Cores by name, zero-padded to redundant ranks."""
        sized = zip(cores, self.ranks, self.ranks[1:])
        padded = [
            F.pad(c, (0, s - c.shape[-1], *[0] * (2 * self._axes), 0, r - c.shape[-2 - self._axes]))
            for c, r, s in sized
        ]
        return {f"core{k}": core for k, core in enumerate(padded)}

    def unpaired(self, cores):
        """Factors by name out of cores as `paired` gives them, zero-padded to redundant ranks."""
        return self._named([core.flatten(-3, -2) for core in cores] if self._axes == 1 else cores)

    def _summands(self):
        return math.prod(self.ranks)


@dataclass(frozen=True)
class TensorTrain(_Train):
    """weight.T (in, out) as a tensor train over the input modes, then the output modes: y = (x @ L) @ R.

    L (in, r) merges the input cores and R (r, out) the output cores, so the matrix rank is at most the middle rank r: a low-rank
    layer whose two factors are themselves trains. Source: Yang et al. 2023, section 3; ranks (1, r_1, …, r_{2d-1}, 1).
    """

    _axes = 1  # mode axes of a core, (r, n, r')

    def _modes(self):
        return (*self.in_modes, *self.out_modes)

    @property
    def middle_rank(self):
        """Rank of the bond between input and output modes: the bound on the weight's matrix rank (resolved forms only)."""
        return self.ranks[len(self.in_modes)]

    def factor_shapes(self, shape):
        """Stored cores by name, (r, mode, r')."""
        return {f"core{k}": (self.ranks[k], n, self.ranks[k + 1]) for k, n in enumerate(self._modes())}

    def decompose(self, weight, init="svd", generator=None):
        """weight (…, out, in) -> cores by name, relative error (…,). init: 'svd' (TT-SVD), 'als' (that, then sweeps)."""
        batch = weight.shape[:-2]
        tensor = weight.mT.reshape(*batch, *self._modes())
        cores, error = best_train("TensorTrain", tensor, self.ranks, init, len(batch))
        return self._named(cores), error

    def paired(self, factors):
        """The cores with a mode of size 1 on the side that they do not have: (…, r, 1, n, r'), then (…, r, n, 1, r')."""
        cores, d = names(factors), len(self.in_modes)
        return [core.unsqueeze(-3) if k < d else core.unsqueeze(-2) for k, core in enumerate(cores)]

    def arrangements(self, shape):
        """'halves': merge each half, two thin products; 'left to right': core by core."""
        d, count = len(self.in_modes), len(self._modes())
        halves = Arrangement("halves", ((0, d), (d, count)))
        return (halves, *super().arrangements(shape)[:1]) if count > 2 else (halves,)

    def places(self, shape):
        """The one intermediate result."""
        return ("rank",)

    def row_groups(self, shape):
        """'halves': merge the halves, gather columns of the second."""
        d, count = len(self.in_modes), len(self._modes())
        return (("halves", ((0, d), (d, count))),)
