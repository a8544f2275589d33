"""Van Loan's reordering, in which a Kronecker product is an outer product, and the nearest sum of them for one weight.

The format itself is in kronecker.py; the search for better row and column orders in permute.py.
"""

from typing import NamedTuple

import torch

from tnlib.form import positive, relative
from tnlib.shapes import ShapeError, check_weight
from tnlib.spectrum import truncate

GRAM_LIMIT = 512  # block size up to which `right_basis` takes the Gram's eigenvectors: 512^3 float64 takes about 30 ms
COLD, WARM = 24, 6  # most iterations above it, from random vectors and from the last basis


class KroneckerFit(NamedTuple):
    """Result of `nearest_kronecker`."""

    left: torch.Tensor  # (…, terms, l0, l1)
    right: torch.Tensor  # (…, terms, r0, r1)
    error: torch.Tensor  # (…,) relative Frobenius error, float64


def rearrange(weight, left, right):
    """Van Loan's reordering R: (…, l0*r0, l1*r1) -> (…, l0*l1, r0*r1), one block of the weight a row.

    Exact: rearrange(torch.kron(A, B), A.shape, B.shape) is the outer product of A.ravel() and B.ravel().
    In memory the longer axis is the inner one: products with a few long rows take a third of the time of those with long columns.
    Source: Van Loan & Pitsianis 1993, section 2 (blocks in row-major order).
    """
    (l0, l1), (r0, r1) = left, right
    blocks = weight.unflatten(-1, (l1, r1)).unflatten(-3, (l0, r0)).transpose(-3, -2)  # (…, l0, l1, r0, r1)
    if l0 * l1 <= r0 * r1:
        return blocks.flatten(-4, -3).flatten(-2)  # (…, l0*l1, r0*r1)
    return blocks.movedim((-2, -1), (-4, -3)).flatten(-4, -3).flatten(-2).mT


def restore(blocks, left, right):
    """Inverse of `rearrange`: (…, l0*l1, r0*r1) -> (…, l0*r0, l1*r1)."""
    split = blocks.unflatten(-1, tuple(right)).unflatten(-3, tuple(left))  # (…, l0, l1, r0, r1)
    return split.transpose(-3, -2).flatten(-4, -3).flatten(-2)  # (…, l0*r0, l1*r1)


def sum_of_products(left, right):
    """sum_k kron(left[k], right[k]): (…, k, l0, l1), (…, k, r0, r1) -> (…, l0*r0, l1*r1), by one GEMM over the terms."""
    rows = left.flatten(-2).mT @ right.flatten(-2)  # (…, l0*l1, r0*r1): the rearranged weight
    return restore(rows, left.shape[-2:], right.shape[-2:])


def nearest_kronecker(weight, left, right, terms=1):
    """Sum of `terms` Kronecker products closest to `weight` in Frobenius norm.

    weight: (…, out, in) = (…, l0*r0, l1*r1), float; leading axes are a batch of weights
    left, right: (l0, l1), (r0, r1)
    terms: at least 1; above min(l0*l1, r0*r1) the actual number is that minimum
    Returns: KroneckerFit(left, right, error); sum_k kron(left[k], right[k]) ~ weight
    Raises: ShapeError if the sizes do not multiply to the weight's, on NaN or infinite weights and on terms < 1
    Source: Van Loan & Pitsianis 1993. Exact when terms = min(l0*l1, r0*r1).
    """
    check_products("nearest_kronecker", weight, left, right, terms)
    cut = truncate(rearrange(weight, left, right), terms)
    a, b = cut.balanced()  # (…, l0*l1, terms), (…, terms, r0*r1)
    return KroneckerFit(a.mT.unflatten(-1, left), b.unflatten(-1, right), relative(cut.discarded, cut.total))


def check_products(where, weight, left, right, terms):
    """Raises: ShapeError if left times right is not the weight's shape, on bad weights and on sizes or terms below 1."""
    positive(where, left=tuple(left), right=tuple(right), terms=terms)
    check_weight(weight, where)
    product, shape = (left[0] * right[0], left[1] * right[1]), tuple(weight.shape[-2:])
    if product != shape:
        raise ShapeError(
            f"{where}: left {tuple(left)} times right {tuple(right)} is {product}; needed weight {shape} (out, in). "
            "Choose factors whose sizes multiply to it."
        )


def right_basis(blocks, terms, start=None):
    """Orthonormal right factors of the best sum of products, and the energy that they find.

    blocks: (l0*l1, r0*r1), a rearranged weight; start: (r0*r1, terms), a basis to iterate from
    Returns: basis (r0*r1, terms); ||blocks @ basis||^2
    Exact up to r0*r1 = 512, by the Gram matrix; above that by subspace iteration, which never ends below where it started.
    """
    width = blocks.shape[1]
    if width <= GRAM_LIMIT:
        wide = blocks.double()
        squares, basis = torch.linalg.eigh(wide.T @ wide)  # ascending
        return basis[:, -terms:].to(blocks.dtype), float(squares[-terms:].clamp_min(0).sum())
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(width, terms + 7, generator=generator).to(blocks)  # (width, terms + 7)
    if start is not None:
        block[:, :terms] = start
    block, found = torch.linalg.qr(block).Q, 0.0
    for _ in range(COLD if start is None else WARM):
        image = blocks @ block  # (l0*l1, terms + 7)
        squares, turn = torch.linalg.eigh(image.T @ image)  # ascending
        best, now = block @ turn[:, -terms:], float(squares[-terms:].sum())
        if now - found <= 1e-4 * now:
            break
        block, found = torch.linalg.qr(blocks.T @ image @ turn.flip(1)).Q, now
    return best, now
