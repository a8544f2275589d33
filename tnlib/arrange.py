"""A weight in some row and column order, and the moves that bring it nearer to a sum of Kronecker products.

Two moves, each of which cannot lower rho = ||nearest sum of products|| / ||weight||. Both act on rows; columns are the rows
of the transposed weight, and several weights that must share one order are moved together.

reassign  every row goes where the current sum of products wants it: one GEMM of inner products, one assignment
regroup   the rows of one slot (one right index) are dealt out anew over the groups (left indices), scored against what the
          *other* rows of each group say. `reassign` scores a row against a fit that contains the row itself, and where groups
          are small a row likes its own echo best: then every order is a fixed point, and only this move leads on
"""

import itertools
from dataclasses import dataclass, replace

import torch

from tnlib.assign import EXACT, assign
from tnlib.spectrum import truncate
from tnlib.van_loan import rearrange, restore, right_basis

SMALL = 64  # numbers in a right factor up to which `regroup` helps, and long assignments are quick
SWAPPED = 8  # most slots whose rows are also exchanged in pairs: beyond it reassign does as well


@dataclass
class Arrangement:
    """weight[rows][:, columns], fitted by `terms` products of left (l0, l1) and right (r0, r1)."""

    weight: torch.Tensor  # (out, in)
    left: tuple[int, int]
    right: tuple[int, int]
    terms: int
    rows: torch.Tensor  # (out,) row of the weight at each place
    columns: torch.Tensor  # (in,)
    basis: torch.Tensor | None = None  # (r0*r1, terms), orthonormal right factors, once fitted
    rho: float = 0.0
    energy: float | None = None  # ||weight||^2
    fitted: tuple | None = None  # the rows and columns that basis and rho are for

    @property
    def T(self):
        """The same for the transposed weight: kron(A, B).T is kron(A.T, B.T)."""
        basis = self.basis
        if basis is not None:
            basis = basis.unflatten(0, self.right).transpose(0, 1).flatten(0, 1)  # (r1*r0, terms)
        flipped = {"left": self.left[::-1], "right": self.right[::-1], "rows": self.columns, "columns": self.rows}
        return replace(self, weight=self.weight.T, basis=basis, fitted=self.fitted and self.fitted[::-1], **flipped)

    @property
    def fresh(self):
        """Whether the basis is that of the present order."""
        known = self.basis is not None and self.fitted is not None
        return known and self.fitted[0] is self.rows and self.fitted[1] is self.columns

    def fit(self):
        """Find basis and rho of the present order, from the last basis, unless they are known."""
        if self.fresh:
            return
        blocks = self._blocks()
        self.basis, found = right_basis(blocks, self.terms, self.basis)
        if self.energy is None:
            self.energy = max(float(blocks.double().square().sum()), 1e-300)
        self.rho, self.fitted = min(1.0, found / self.energy) ** 0.5, (self.rows, self.columns)

    def _blocks(self):
        """The rearranged weight in the present order (l0*l1, r0*r1)."""
        return rearrange(self.weight[self.rows][:, self.columns], self.left, self.right)

    @property
    def exact(self):
        """Rows up to which assignments are solved exactly: with few right factors any number takes little time."""
        return 1 << 20 if self.right[0] * self.right[1] <= SMALL else EXACT

    def product(self):
        """The nearest sum of products (out, in), in the present order."""
        self.fit()
        return restore((self._blocks() @ self.basis) @ self.basis.T, self.left, self.right)


def reassign(views):
    """Shared rows of some arrangements, each where the sums of products want it: (out,).

    Exact: no rho falls in sum of squares, because the old order scores ||product||^2 and the new one no less.
    """
    scores = sum(view.product() @ view.weight[:, view.columns].T for view in views)  # (places, rows)
    return assign(scores, views[0].rows, views[0].exact)


def regroup(views):
    """Shared rows, slot after slot dealt out over the groups by inner products with the rest of each group: (out,).

    Needs fitted views that agree in (l0, r0). Exact: the sum of ||blocks @ basis||^2 does not fall.
    """
    place = views[0].rows.reshape(views[0].left[0], views[0].right[0]).clone()  # (groups, slots)
    part = _Parts(views)
    parts = [part(place[:, slot], slot) for slot in range(place.shape[1])]
    total = sum(parts)  # (groups, features)
    for slot, own in enumerate(parts):
        rest = total - own
        order = assign(rest @ own.T)  # (groups,)
        place[:, slot], parts[slot] = place[order, slot], own[order]
        total = rest + parts[slot]
    if place.shape[1] <= SWAPPED:
        for one, other in itertools.combinations(range(place.shape[1]), 2):
            total = _swap(part, parts, place, total, one, other)
    return place.flatten()


class _Parts:
    """What rows (groups,) in a slot add to the left factors of every view: (groups, sum of l1*terms)."""

    def __init__(self, views):
        self.split = [v.weight[:, v.columns].unflatten(1, (v.left[1], v.right[1])) for v in views]  # (out, l1, r1)
        self.right = [v.basis.unflatten(0, v.right) for v in views]  # (r0, r1, terms)

    def __call__(self, rows, slot):
        return torch.cat([(x[rows] @ b[slot]).flatten(1) for x, b in zip(self.split, self.right)], 1)


def _swap(part, parts, place, total, one, other):
    """Exchange two slots inside every group that gains by it, in `place` and `parts`; returns the new total."""
    a, b = place[:, one].clone(), place[:, other].clone()
    new_one, new_other = part(b, one), part(a, other)
    change = new_one + new_other - parts[one] - parts[other]
    gain = (change * (2 * total + change)).sum(1, keepdim=True)  # (groups, 1): ||total + change||^2 - ||total||^2
    better = gain > 1e-6 * total.square().sum(1).mean()
    place[:, one], place[:, other] = torch.where(better[:, 0], b, a), torch.where(better[:, 0], a, b)
    parts[one], parts[other] = torch.where(better, new_one, parts[one]), torch.where(better, new_other, parts[other])
    return total + change * better


def sorted_orders(weight, left, right, functions=4):
    """Row and column orders from sorting: pairs of (rows, columns), each (out,), (in,).

    |kron(A, B)| is kron(|A|, |B|), however scrambled, and its singular vectors are products u(i) v(j) of those of |A| and |B|.
    The first, u0(i) v0(j), is positive everywhere; the ratio of another to it may depend on i alone, or on j alone. Sorting
    by the first kind finds the groups, sorting each group by the second the slots. Which singular vectors are of which kind is
    unknown, so every ordered pair of the next `functions` is tried.
    Source: own. Exact: recovers any one-term product whose |A| and |B| have singular values and vectors without ties.
    """
    cut = truncate(weight.abs().double(), functions + 1)
    by_row, by_column = cut.left, cut.right.T  # (out, functions + 1), (in, functions + 1)
    by_row, by_column = ((f[:, 1:] / f[:, :1]).nan_to_num(0, 0, 0) for f in (by_row, by_column))
    for group, slot in itertools.permutations(range(by_row.shape[1]), 2):
        yield (
            _double_sort(by_row[:, group], by_row[:, slot], left[0]),
            _double_sort(by_column[:, group], by_column[:, slot], left[1]),
        )


def _double_sort(group, slot, groups):
    """Order (n,): cut the sorted `group` values into equal groups, sort each by `slot`."""
    order = group.argsort(stable=True).reshape(groups, -1)  # (groups, slots)
    return order.gather(1, slot[order].argsort(dim=1, stable=True)).flatten()
