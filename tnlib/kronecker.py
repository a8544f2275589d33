"""Kronecker products: weight ~ P (sum_k scale_k * kron(left_k, right_k)) Q, the permutations P and Q optional.

The nearest sum of products is Van Loan's (van_loan.py), the orders are found by permute.py.
"""

import math
from dataclasses import dataclass, replace

import torch

from tnlib.contract import Arrangement
from tnlib.form import Form, check_kept, measured_error, positive, refuse_init
from tnlib.permute import AXES, SEARCHES, permute_kronecker
from tnlib.shapes import ShapeError, check_weight, divisors
from tnlib.van_loan import KroneckerFit, nearest_kronecker, rearrange, sum_of_products

__all__ = ["Kronecker", "KroneckerFit", "nearest_kronecker", "norm_preserving_scale", "prune_factors", "rearrange"]


def norm_preserving_scale(weight, approximation):
    """alpha = ||weight|| / ||approximation|| over the last two axes: (…,).

    Krony-PT multiplies every term by it, so that the compressed weight has the original norm. It raises the Frobenius
    error: with rho = ||approximation||/||weight||, from sqrt(1 - rho^2) to sqrt(2 - 2 rho).
    Source: Krony-PT v2, "adaptive normalization". Exact: alpha * ||approximation|| equals ||weight||.
    """
    return torch.linalg.matrix_norm(weight.double()) / torch.linalg.matrix_norm(approximation.double()).clamp_min(
        1e-300
    )


def prune_factors(weight, left, right):
    """Krony-PT's pruning initialization: left takes every r0-th row and r1-th column, right is 1 in its corner, else 0.1.

    weight: (…, l0*r0, l1*r1)
    Returns: left (…, 1, l0, l1), right (…, 1, r0, r1)
    Source: Krony-PT v2, 96M model (B = [1, 0.1] rather than [1, 0], so that gradients reach every entry).
    Exact: rows and columns ::r0, ::r1 of the product equal the weight's.
    """
    r0, r1 = right
    a = weight[..., ::r0, ::r1].clone()  # (…, l0, l1)
    b = torch.full((*weight.shape[:-2], r0, r1), 0.1, dtype=weight.dtype, device=weight.device)
    b[..., 0, 0] = 1.0
    return a.unsqueeze(-3), b.unsqueeze(-3)


@dataclass(frozen=True)
class Kronecker(Form):
    """weight (out, in) ~ P (sum over `terms` of kron(left (l0, l1), right (r0, r1))) Q. Stored: terms*(l0*l1 + r0*r1 [+ 1]).

    Give `left` or `right`; the other is inferred from the weight. `terms`, or `kept` = share of out*in to store.
    scaled: one learnable scalar a term (Krony-PT), stored beside the factors
    permute: "", "rows", "columns" or "both": reorder before fitting. The orders are integer buffers of the layer, no
        parameters: num_params does not count them
    search: "sorted" or "damped", see permute_kronecker
    """

    left: tuple[int, int] | None = None
    right: tuple[int, int] | None = None
    terms: int | None = None
    kept: float | None = None
    scaled: bool = False
    permute: str = ""
    search: str = "sorted"

    def __post_init__(self):
        positive("Kronecker", left=self.left, right=self.right, terms=self.terms)
        check_kept("Kronecker", self.kept)
        for name in ("left", "right"):
            pair = getattr(self, name)
            if pair is not None:
                if len(pair) != 2:
                    raise ShapeError(
                        f"Kronecker: got {name}={pair}; needed two sizes (rows, columns), e.g. {name}=(4, 2)."
                    )
                object.__setattr__(self, name, tuple(pair))  # a list from JSON or YAML is welcome
        if self.left is None and self.right is None:
            raise ShapeError(
                "Kronecker: got neither left nor right; needed one of the two factor shapes, e.g. right=(4, 2)."
            )
        if self.terms is not None and self.kept is not None:
            raise ShapeError(f"Kronecker: got terms={self.terms} and kept={self.kept}; needed one of the two.")
        if self.permute not in ("", *AXES) or self.search not in SEARCHES:
            raise ShapeError(
                f"Kronecker: got permute={self.permute!r}, search={self.search!r}; needed permute '' or one of "
                f"{', '.join(AXES)}, and a search of {', '.join(SEARCHES)}."
            )

    def resolve(self, shape):
        """The same form with both factor shapes and the number of terms really used for (out, in)."""
        left, right = self._both(shape)
        most = min(math.prod(left), math.prod(right))
        if self.kept is None:
            terms = min(self.terms or 1, most)
        else:
            each = math.prod(left) + math.prod(right) + self.scaled
            terms = min(int(self.kept * math.prod(shape) / each), most)
            if terms < 1:
                raise ShapeError(
                    f"Kronecker: one term {left} x {right} stores {each:,}; needed at most kept={self.kept} of weight {shape} "
                    f"(out, in) = {int(self.kept * math.prod(shape)):,}. Raise kept, or choose a larger right factor."
                )
        return replace(self, left=left, right=right, terms=terms, kept=None)

    def _both(self, shape):
        given, name = (self.left, "left") if self.left else (self.right, "right")
        if shape[0] % given[0] or shape[1] % given[1]:
            raise ShapeError(
                f"Kronecker {name} factor {given} does not divide weight {tuple(shape)} (out, in); needed divisors of "
                f"both sizes. Choose rows from {divisors(shape[0])} and columns from {divisors(shape[1])}."
            )
        other = (shape[0] // given[0], shape[1] // given[1])
        left, right = (given, self.right or other) if self.left else (other, given)
        if (left[0] * right[0], left[1] * right[1]) != tuple(shape):
            raise ShapeError(
                f"Kronecker: left {left} times right {right} is not weight {tuple(shape)} (out, in). Give only one of them."
            )
        return left, right

    def factor_shapes(self, shape):
        """Stored tensors by name."""
        sizes = {"left": (self.terms, *self.left), "right": (self.terms, *self.right)}
        return sizes | {"scale": (self.terms,)} if self.scaled else sizes

    def index_shapes(self, shape):
        """Orders stored beside the factors, int32: `row_order`, `column_order`."""
        return {f"{axis[:-1]}_order": (shape[axis == "columns"],) for axis in AXES.get(self.permute, ())}

    def _summands(self):
        return self.terms

    def decompose(self, weight, init="svd", generator=None):
        """weight (…, out, in) -> factors by name, relative error (…,).

        init: 'svd' (Van Loan), 'norm' (Van Loan, rescaled to the weight's norm), 'prune' (Krony-PT, one term only);
            each after the search for orders, if `permute` asks for one
        generator: only the search "damped" draws from it
        """
        refuse_init("Kronecker", init, ("svd", "norm", "prune"))
        if init == "prune" and self.terms != 1:
            raise ShapeError(
                f"Kronecker: init='prune' with terms={self.terms}; needed terms=1, the only case the paper defines."
            )
        weight, orders = self._reorder(weight, generator) if self.permute else (weight, {})
        if init == "prune":
            a, b = prune_factors(weight, self.left, self.right)
        else:
            a, b, error = nearest_kronecker(weight, self.left, self.right, self.terms)
        factors = {"left": a, "right": b}
        alpha = 1.0
        if init == "norm":
            alpha = norm_preserving_scale(weight, sum_of_products(a, b))[..., None].to(a.dtype)  # (…, 1)
        if self.scaled:
            factors["scale"] = alpha * torch.ones(a.shape[:-2], dtype=a.dtype, device=a.device)  # (…, terms)
        elif init == "norm":
            factors["left"] = a * alpha[..., None, None]
        if init != "svd":
            error = measured_error(weight, sum_of_products(self._scaled_left(factors), b))
        return factors | orders, error

    def _reorder(self, weight, generator):
        """The weight in the order that the search finds, and the orders as `contract` and `to_dense` take them."""
        check_weight(weight, "Kronecker")
        seed = 0 if generator is None else int(torch.randint(2**31, (), generator=generator))
        batch = weight.reshape(-1, *weight.shape[-2:])
        options = {"axes": self.permute, "search": self.search, "seed": seed}
        found = [permute_kronecker(one, self.left, self.right, self.terms, **options) for one in batch]
        moved = torch.stack([one[f.rows][:, f.columns] for one, f in zip(batch, found)]).reshape(weight.shape)
        orders = {"row_order": [f.rows.argsort() for f in found], "column_order": [f.columns for f in found]}
        kept = {name: orders[name] for name in self.index_shapes(weight.shape[-2:])}
        orders = {n: torch.stack(o).int().reshape(*weight.shape[:-2], -1) for n, o in kept.items()}
        return moved, {name: order.to(weight.device) for name, order in orders.items()}

    def paired(self, factors):
        """The factors as two cores, (…, 1, l0, l1, terms) and (…, terms, r0, r1, 1)."""
        left, right = self._scaled_left(factors), factors["right"]  # (…, k, l0, l1), (…, k, r0, r1)
        left = left[..., None] if self.terms == 1 else left.movedim(-3, -1)[..., None, :, :, :]
        return [left, right[..., None]]

    def to_dense(self, factors, shape):
        """The weight (…, out, in) that the factors stand for, by one GEMM over the terms."""
        dense = super().to_dense(factors, shape)
        if "row_order" in factors:
            dense = _take(dense, factors["row_order"], -2)
        return self._back(dense, factors)

    def _back(self, rows, factors):
        """Columns of the sum of products put where the weight has them: (…, in)."""
        return _take(rows, factors["column_order"].argsort(-1), -1) if "column_order" in factors else rows

    def _scaled_left(self, factors):
        left = factors["left"]
        return left * factors["scale"][..., None, None] if self.scaled else left  # (…, terms, l0, l1)

    @property
    def reordered(self):
        """Axes of the weight that have an order of their own."""
        return AXES.get(self.permute, ())

    def arrangements(self, shape):
        """'left first', 'right first': all terms at once, the other factor next; 'turned' for a small right factor.

        'by terms': the second factor for each term, and a sum; nothing but the state is copied, which suits few tokens.
        """
        cores = ((0, 1), (1, 2))
        found = [Arrangement("left first", cores), Arrangement("right first", cores, forward=False)]
        if self.right[1] > 1:
            found.append(Arrangement("left first, turned", cores, turned=True))
        if self.right[0] > 1:
            found.append(Arrangement("right first, turned", cores, forward=False, turned=True))
        if self.terms > 1:
            found.append(Arrangement("left first, by terms", cores, by_terms=True))
            found.append(Arrangement("right first, by terms", cores, forward=False, by_terms=True))
        return tuple(found)

    def places(self, shape):
        """The one intermediate result."""
        return ("left",)

    def _enter(self, x, factors):
        return x.index_select(1, factors["column_order"]) if "column_order" in factors else x

    def _leave(self, y, factors, shape):
        return y.index_select(1, factors["row_order"])

    def _ends_elsewhere(self, shape):
        return "rows" in self.reordered

    def rows(self, ids, factors, shape, plan=None, kept=None, room=None):
        """Rows `ids` (tokens,) of the weight, without building it: (tokens, in)."""
        if "row_order" in factors:
            ids = factors["row_order"][ids]
        return self._back(super().rows(ids, factors, shape, plan, kept, room), factors)  # (tokens, in)


def _take(x, order, dim):
    """Entries of x along `dim` (-1 or -2) in `order` (n,), or (…, n) for a batch."""
    if order.dim() == 1:
        return x.index_select(dim, order)
    index = order.long().unsqueeze(-1 if dim == -2 else -2)  # (…, n, 1) or (…, 1, n)
    return x.gather(dim, index.expand(x.shape))
