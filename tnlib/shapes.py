"""Shapes: the (out, in) convention, GPT-2's Conv1D, unfolding, and how a size splits into modes.

Everywhere in tnlib a weight is (out, in), as in nn.Linear. GPT-2 stores its Conv1D weights (in, out);
they are turned here, at the border, and nowhere else.
"""

import math
from functools import lru_cache

import torch
from torch import nn


class ShapeError(ValueError):
    """A weight, its modes or its ranks do not fit together; the message says what was got and what would fit."""


def is_conv1d(layer):
    """True for GPT-2's Conv1D, parametrized or not (by name, so that transformers need not be imported)."""
    return any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__) and hasattr(layer, "nf")


def weight_of(layer):
    """The weight of a dense layer as (out, in); for an embedding (rows, dim). A view, never a copy.

    Raises: ShapeError for anything that is not nn.Linear, Conv1D or nn.Embedding.
    Exact: weight_of(Conv1D) is its stored weight, transposed.
    """
    if isinstance(layer, (nn.Linear, nn.Embedding)):
        return layer.weight
    if is_conv1d(layer):
        return layer.weight.T
    raise ShapeError(
        f"{type(layer).__name__} has no (out, in) weight that tnlib knows; needed nn.Linear, Conv1D or nn.Embedding. "
        "Pass the weight tensor itself."
    )


def check_weight(weight, where="weight"):
    """Refuse what no decomposition can digest: not (…, out, in), not floating point, empty, NaN or infinite entries.

    Raises: ShapeError naming `where`, what was found and what to do.
    """
    got = f"{where}: got {tuple(weight.shape)} {weight.dtype}".replace("torch.", "")
    if weight.dim() < 2 or weight.numel() == 0:
        raise ShapeError(f"{got}; needed a non-empty (out, in) weight. Pass a matrix, or a stack (batch, out, in).")
    if not weight.is_floating_point():
        raise ShapeError(f"{got}; needed a floating-point weight. Dequantize it first, e.g. weight.float().")
    if weight.device.type != "meta" and not math.isfinite(weight.detach().sum()):  # one pass, where counting takes four
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            raise ShapeError(
                f"{got} with {bad} of {weight.numel()} entries NaN or infinite; needed finite weights. "
                "The checkpoint is damaged or half-trained: reload it, or find the layer that overflowed."
            )


def divisors(size):
    """All divisors of a size, ascending."""
    return [d for d in range(1, size + 1) if size % d == 0]


def unfold(x, mode):
    """Mode-`mode` unfolding: (n_0, …, n_{d-1}) -> (n_mode, product of the others), modes counted from 0.

    Exact: fold(unfold(x, k), k, x.shape) equals x. Source: Kolda & Bader 2009, section 2.4 (row-major columns).
    """
    return x.movedim(mode, 0).reshape(x.shape[mode], -1)  # (n_mode, rest)


def fold(matrix, mode, shape):
    """Inverse of `unfold`: (n_mode, rest) back to `shape`."""
    rest = [n for k, n in enumerate(shape) if k != mode]
    return matrix.reshape(shape[mode], *rest).movedim(0, mode)  # shape


def prod(sizes):
    """Product of a few integers, 1 for none."""
    return math.prod(sizes)


@lru_cache(maxsize=4096)
def balanced_modes(size, order):
    """Split `size` into `order` integer modes, all at least 2, as equal as possible, ascending: (576, 3) -> (8, 8, 9).

    'As equal as possible' is the smallest sum, ties broken by the smallest largest mode.
    Raises: ShapeError when there is no such split (a prime size, or too few prime factors).
    Exact: the product of the modes is `size`.
    """
    if size < 1 or order < 1:
        raise ShapeError(f"balanced_modes(size={size}, order={order}); needed two positive integers.")
    found = _best_split(size, order, 2) if order > 1 else (size,)
    if found is None:
        factors = prime_factors(size)
        raise ShapeError(
            f"size {size} has no {order} modes of at least 2: its prime factors are {factors}. "
            f"Use order <= {len(factors)}, give the modes yourself, or pad the axis to "
            f"{_next_splittable(size, order)} = {_times(balanced_modes(_next_splittable(size, order), order))}."
        )
    return found


def padded_modes(size, order):
    """Modes whose product is the smallest number from `size` on that splits well: no mode more than twice another.

    Exact: (12, 13, 14, 14) for BERT's 30,522 words, 54 rows of padding.
    """
    return balanced_modes(_next_splittable(size - 1, order), order)


def prime_factors(size):
    """Prime factors of `size`, ascending with repetition: 12 -> (2, 2, 3)."""
    factors, p = [], 2
    while p * p <= size:
        while size % p == 0:
            factors.append(p)
            size //= p
        p += 1
    return (*factors, size) if size > 1 else tuple(factors)


def _best_split(size, order, least):
    """Best ascending split of `size` into `order` parts, each at least `least`; None if there is none."""
    if order == 1:
        return (size,) if size >= least else None
    best = None
    for first in range(least, round(size ** (1 / order)) + 2):
        if size % first == 0:
            rest = _best_split(size // first, order - 1, first)
            if rest and (best is None or _badness((first, *rest)) < _badness(best)):
                best = (first, *rest)
    return best


def _badness(modes):
    return sum(modes), max(modes)


def _next_splittable(size, order):
    """Smallest size above `size` that splits well: no mode more than twice another."""
    size += 1
    while (split := _best_split(size, order, 2)) is None or split[-1] > 2 * split[0]:
        size += 1
    return size


def _times(modes):
    return "*".join(map(str, modes))
