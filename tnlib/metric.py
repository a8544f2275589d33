"""How much each error of a weight matters: the norm that activation-aware fits minimize, and coordinates in which it is nearly plain."""

import math
from dataclasses import dataclass

import torch

RIDGE = 1e-6  # of a mode's mean power, added so that its moment has a root


@dataclass(frozen=True)
class Metric:
    """The squared size of an error D (out, in): tr(outputs D second D.T), and for look-ups sum(rows * |D_row|^2).

    `second` is the second moment of the inputs; `outputs`, if given, that of the loss's gradient at the outputs. `second` and
    `rows` are given together for a table that is an embedding and an output head; each is then relative to the weight's own norm.
    """

    second: torch.Tensor | None = None  # (in, in), positive definite
    rows: torch.Tensor | None = None  # (out,), positive
    outputs: torch.Tensor | None = None  # (out, out), positive definite

    def relative_to(self, weight):
        """The same metric with squared norm 1 (2 where look-ups are given too) for `weight`; a weight of norm 0 is left alone."""
        second, rows, outputs = self.second, self.rows, self.outputs
        if second is not None or outputs is not None:
            size = max(1e-300, Metric(second=second, outputs=outputs).square(weight))
            second, outputs = (second, outputs / size) if second is None else (second / size, outputs)
        if rows is not None:
            rows = rows / max(1e-300, Metric(rows=rows).square(weight))
        return Metric(second, rows, outputs)

    def to(self, dtype):
        return Metric(*(None if part is None else part.to(dtype) for part in (self.second, self.rows, self.outputs)))

    def times(self, difference):
        """D (out, in) -> outputs @ D @ second + rows * D (out, in): half the gradient of the squared error."""
        out = 0
        if self.second is not None or self.outputs is not None:
            out = difference if self.second is None else difference @ self.second
            out = out if self.outputs is None else self.outputs @ out
        return out if self.rows is None else out + self.rows[:, None] * difference

    def square(self, difference):
        """|D|^2 in this metric."""
        return float((difference * self.times(difference)).sum())

    def error(self, difference, weight):
        """|D| / |W| in this metric; 0 for a weight of norm 0."""
        total = self.square(weight)
        return math.sqrt(max(0.0, self.square(difference)) / total) if total > 0 else 0.0


def mode_roots(second, modes):
    """Roots S_k (n_k, n_k) of what each mode alone shows of a second moment: kron(S_1, …, S_d) is a root of its stand-in.

    second: (n, n), positive semidefinite, with n = n_1 * … * n_d = product of `modes`
    Returns: lower triangular matrices, each of mean squared row norm 1
    Exact: if second is a Kronecker product of matrices over the modes, kron(S) kron(S).T is proportional to it (but for RIDGE).
    Source: partial traces, the mean-field estimate of a Kronecker-factored covariance (K-FAC's, Martens & Grosse 2015, is one).
    """
    roots, before = [], 1
    for n in modes:
        after = second.shape[0] // (before * n)
        part = torch.einsum("anbamb->nm", second.reshape(before, n, after, before, n, after).double())  # (n, n)
        part = part * (n / part.trace().clamp_min(1e-300)) + RIDGE * torch.eye(n, dtype=part.dtype, device=part.device)
        roots.append(torch.linalg.cholesky(part).to(second.dtype))
        before *= n
    return roots


def inverses(roots):
    """The inverse of each lower triangular root."""
    return [
        torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype, device=root.device), upper=False)
        for root in roots
    ]


def through(matrix, tools):
    """matrix (m, n) @ kron(T_1, …, T_d), one mode after the other: (m, n).

    Exact: equals the product with torch.kron of all tools.
    """
    found = matrix.reshape(len(matrix), *(len(tool) for tool in tools))
    for tool in tools:
        found = torch.tensordot(
            found, tool, dims=([1], [0])
        )  # the mode goes to the end; after all of them the order is back
    return found.reshape(len(matrix), -1)


def both_sides(second, tools):
    """kron(T).T @ second @ kron(T) (n, n), symmetric."""
    half = through(second, tools)
    whole = through(half.T.contiguous(), tools)
    return (whole + whole.T) / 2
