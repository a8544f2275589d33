"""Low rank: weight ~ left @ right. The baseline that every tensor format must beat at equal parameters."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tnlib.contract import Arrangement
from tnlib.form import Form, check_kept, positive, refuse_init, relative
from tnlib.shapes import ShapeError, check_weight
from tnlib.spectrum import truncate


class LowRankFit(NamedTuple):
    """Result of `low_rank`."""

    left: torch.Tensor  # (…, out, r)
    right: torch.Tensor  # (…, r, in)
    error: torch.Tensor  # (…,) relative Frobenius error, float64


def low_rank(weight, max_rank=None, tolerance=0.0):
    """Best rank-`max_rank` factors of `weight` in Frobenius norm, singular values shared evenly by both.

    weight: (…, out, in), float; leading axes are a batch of weights
    max_rank: at least 1; above min(out, in) the actual rank is min(out, in)
    tolerance: relative error allowed; keeps the fewest singular values that reach it
    Returns: LowRankFit(left, right, error); error is computed from the spectrum, not by subtracting
    Raises: ShapeError on NaN, infinite or misshapen weights and on rank 0
    Source: Eckart & Young 1936. Exact when max_rank >= min(out, in).
    """
    positive("low_rank", max_rank=max_rank)
    check_weight(weight, "low_rank")
    cut = truncate(weight, max_rank, tolerance)
    left, right = cut.balanced()
    return LowRankFit(left, right, relative(cut.discarded, cut.total))


def low_rank_errors(weight):
    """Relative error of the best rank-r approximation for every r = 1 … min(out, in), from one spectrum: (…, min(out, in)).

    Exact: entry r-1 equals low_rank(weight, r).error.
    """
    check_weight(weight, "low_rank_errors")
    cut = truncate(weight)
    tail = (cut.values**2).flip(-1).cumsum(-1).flip(-1)[..., 1:]  # energy left after 1, 2, …; summed small to large
    return relative(F.pad(tail, (0, 1)), cut.total[..., None])


@dataclass(frozen=True)
class LowRank(Form):
    """weight (out, in) ~ left (out, rank) @ right (rank, in). Stored: rank*(out+in).

    Give `rank`, or `kept`, the share of out*in to store. A rank above min(out, in) becomes min(out, in).
    """

    rank: int | None = None
    kept: float | None = None

    def __post_init__(self):
        positive("LowRank", rank=self.rank)
        check_kept("LowRank", self.kept)
        if (self.rank is None) == (self.kept is None):
            raise ShapeError(
                f"LowRank: got rank={self.rank}, kept={self.kept}; needed one of the two. Give rank=64 or kept=0.5."
            )

    def resolve(self, shape):
        """The same form with the rank that is really used for (out, in)."""
        rank = int(self.kept * math.prod(shape) / sum(shape)) if self.rank is None else self.rank
        if rank < 1:
            raise ShapeError(f"LowRank: kept={self.kept} of weight {shape} (out, in) leaves rank 0; raise kept.")
        return replace(self, rank=min(rank, *shape), kept=None)

    def factor_shapes(self, shape):
        """Stored tensors by name."""
        return {"left": (shape[0], self.rank), "right": (self.rank, shape[1])}

    def _summands(self):
        return self.rank

    def decompose(self, weight, init="svd", generator=None):
        """weight (…, out, in) -> factors by name, relative error (…,)."""
        refuse_init("LowRank", init, ("svd",))
        left, right, error = low_rank(weight, self.rank)
        return {"left": left, "right": right}, error

    def paired(self, factors):
        """The factors as two cores, (…, 1, 1, in, rank) and (…, rank, out, 1, 1)."""
        left, right = factors["left"], factors["right"]
        return [right.mT[..., None, None, :, :], left.mT[..., :, :, None, None]]

    def arrangements(self, shape):
        """'factors': two thin products."""
        return (Arrangement("factors", ((0, 1), (1, 2))),)

    def places(self, shape):
        """The one intermediate result."""
        return ("rank",)
