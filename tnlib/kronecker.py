"""Kronecker products: weight ~ sum_k scale_k * kron(left_k, right_k).

Van Loan's observation: reorder the weight so that each block becomes a row. A Kronecker product then becomes an outer
product, so the nearest sum of Kronecker products is a truncated SVD of the reordered weight, `rearrange(weight)`.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tnlib.contract import Plan
from tnlib.form import Form, check_kept, measured_error, positive, refuse_init, relative
from tnlib.shapes import ShapeError, check_weight
from tnlib.spectrum import truncate


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
    """weight (out, in) ~ sum over `terms` of kron(left (l0, l1), right (r0, r1)). Stored: terms*(l0*l1 + r0*r1 [+ 1]).

    Give `left` or `right`; the other is inferred from the weight. `terms`, or `kept` = share of out*in to store.
    scaled: one learnable scalar a term (Krony-PT), stored beside the factors
    """

    left: tuple[int, int] | None = None
    right: tuple[int, int] | None = None
    terms: int | None = None
    kept: float | None = None
    scaled: bool = False

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
                f"both sizes. Choose rows from {_divisors(shape[0])} and columns from {_divisors(shape[1])}."
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

    def _summands(self):
        return self.terms

    def decompose(self, weight, init="svd", generator=None):
        """weight (…, out, in) -> factors by name, relative error (…,).

        init: 'svd' (Van Loan), 'norm' (Van Loan, rescaled to the weight's norm), 'prune' (Krony-PT, one term only)
        """
        refuse_init("Kronecker", init, ("svd", "norm", "prune"))
        if init == "prune" and self.terms != 1:
            raise ShapeError(
                f"Kronecker: init='prune' with terms={self.terms}; needed terms=1, the only case the paper defines."
            )
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
            error = measured_error(weight, self.to_dense(factors, weight.shape[-2:]))
        return factors, error

    def to_dense(self, factors, shape):
        """The weight (…, out, in) that the factors stand for, by one GEMM over the terms."""
        return sum_of_products(self._scaled_left(factors), factors["right"])

    def _scaled_left(self, factors):
        left = factors["left"]
        return left * factors["scale"][..., None, None] if self.scaled else left  # (…, terms, l0, l1)

    def plans(self, shape, tokens):
        """'left first', 'right first': two contractions, all terms at once; 'rebuild': the weight, then one GEMM."""
        (l0, l1), (r0, r1), k = self.left, self.right, self.terms
        ends = tokens * (shape[0] + shape[1]) + k * (l0 * l1 + r0 * r1)
        left = Plan(
            "left first",
            2 * tokens * k * l0 * r1 * (l1 + r0),
            ends + tokens * (shape[1] * (r1 > 1) + 4 * k * l0 * r1),
            4,
        )
        right = Plan(
            "right first", 2 * tokens * k * l1 * r0 * (r1 + l0), ends + tokens * (2 * shape[0] + 4 * k * l1 * r0), 4
        )
        return [left, right, self._rebuild_plan(shape, tokens, 2 * k * math.prod(shape))]

    def contract(self, x, factors, shape, plan="left first"):
        """x (tokens, in) -> (tokens, out): y[i, j] = sum_{k, p, q} left[k, i, p] right[k, j, q] x[p, q]."""
        (l0, l1), (r0, r1), k = self.left, self.right, self.terms
        a, b = self._scaled_left(factors), factors["right"]  # (k, l0, l1), (k, r0, r1)
        x = x.reshape(-1, l1, r1)  # (tokens, l1, r1)
        if plan == "left first":
            z = F.linear(x.transpose(1, 2), a.reshape(k * l0, l1))  # (tokens, r1, k*l0)
            z = z.reshape(-1, r1 * k, l0).transpose(1, 2)  # (tokens, l0, r1*k)
            y = z @ b.permute(2, 0, 1).reshape(r1 * k, r0)  # (tokens, l0, r0)
        else:
            z = F.linear(x, b.reshape(k * r0, r1)).reshape(-1, l1 * k, r0)  # (tokens, l1*k, r0)
            y = a.permute(1, 2, 0).reshape(l0, l1 * k) @ z  # (tokens, l0, r0)
        return y.reshape(-1, shape[0])  # (tokens, out)

    def row_plans(self, shape, tokens):
        """One way to look up rows: gather from both factors, multiply."""
        return [Plan("gather", 2 * tokens * self.terms * shape[1], 2 * tokens * self.terms * shape[1], 4)]

    def rows(self, ids, factors, shape, plan="gather"):
        """Rows `ids` (tokens,) of the weight, without building it: (tokens, in)."""
        a, b = self._scaled_left(factors), factors["right"]
        outer, inner = ids // self.right[0], ids % self.right[0]
        a, b = a[:, outer].movedim(0, -1), b[:, inner].movedim(0, -2)  # (tokens, l1, k), (tokens, k, r1)
        return (a @ b).reshape(-1, shape[1])  # (tokens, in)


def _divisors(size):
    return [d for d in range(1, size + 1) if size % d == 0]
