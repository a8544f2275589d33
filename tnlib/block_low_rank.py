"""Low rank in column bands: weight ~ [left_1 @ right_1 | … | left_b @ right_b], a low-rank matrix for each band of the inputs.

At equal numbers each band has a smaller rank than one low-rank matrix would have, and the whole has a larger one: the bands'
ranks add up. One of the block tensor trains of Qiu et al. 2024 (arXiv 2406.06248): two cores, and only columns are cut.
"""

import math
from dataclasses import dataclass, replace

import torch.nn.functional as F

from tnlib.chain import Chain
from tnlib.contract import Arrangement, Copy, Plan, Product
from tnlib.form import Form, check_kept, positive, refuse_init, relative
from tnlib.links import Apart, Link, apply_link
from tnlib.shapes import ShapeError, check_weight, divisors
from tnlib.spectrum import truncate


def cut_bands(matrix, bands):
    """Equal bands of columns as a batch, a view: (…, rows, bands*n) -> (…, bands, rows, n)."""
    return matrix.unflatten(-1, (bands, -1)).movedim(-2, -3)


def join_bands(blocks):
    """The matrix whose column bands are `blocks`: (…, bands, rows, n) -> (…, rows, bands*n). Exact: undoes cut_bands."""
    return blocks.movedim(-3, -2).flatten(-2)


@dataclass(frozen=True)
class BlockLowRank(Form):
    """weight (out, in) ~ `bands` low-rank matrices (out, in/bands) side by side. Stored: rank*(bands*out + in).

    bands: must divide in. Give `rank`, that of each band, or `kept`, the share of out*in to store. A rank above
    min(out, in/bands) becomes that.
    Exact: bands=1 is LowRank; at full rank it is the weight.
    """

    bands: int = 2
    rank: int | None = None
    kept: float | None = None

    def __post_init__(self):
        positive("BlockLowRank", bands=self.bands, rank=self.rank)
        check_kept("BlockLowRank", self.kept)
        if (self.rank is None) == (self.kept is None):
            raise ShapeError(
                f"BlockLowRank: got rank={self.rank}, kept={self.kept}; needed one of the two. Give rank=64 or kept=0.5."
            )

    def resolve(self, shape):
        """The same form with the rank that is really used for (out, in)."""
        out, width = shape
        if width % self.bands:
            raise ShapeError(
                f"BlockLowRank: bands={self.bands} do not divide weight {tuple(shape)} (out, in); needed a divisor of its "
                f"{width} inputs. Choose bands from {divisors(width)}."
            )
        rank = self.rank
        if rank is None:
            rank = int(self.kept * math.prod(shape) / (self.bands * out + width))
        if rank < 1:
            raise ShapeError(
                f"BlockLowRank: kept={self.kept} of weight {tuple(shape)} (out, in) leaves rank 0 for each of {self.bands} "
                "bands; raise kept, or choose fewer bands."
            )
        return replace(self, rank=min(rank, out, width // self.bands), kept=None)

    def factor_shapes(self, shape):
        """Stored tensors by name; `left` has the bands' left factors side by side."""
        out, width = shape
        return {"left": (out, self.bands * self.rank), "right": (self.bands, self.rank, width // self.bands)}

    def _summands(self):
        return self.rank

    def decompose(self, weight, init="svd", generator=None):
        """weight (…, out, in) -> factors by name, relative error (…,): the nearest there is, as bands do not meet in the norm."""
        refuse_init("BlockLowRank", init, ("svd",))
        check_weight(weight, "BlockLowRank")
        cut = truncate(cut_bands(weight, self.bands), self.rank)
        left, right = cut.balanced()  # (…, bands, out, rank), (…, bands, rank, in/bands)
        return {"left": join_bands(left), "right": right}, relative(cut.discarded.sum(-1), cut.total.sum(-1))

    def to_dense(self, factors, shape):
        """The weight (…, out, in) that the factors stand for; leading axes of the factors are a batch."""
        return join_bands(cut_bands(factors["left"], self.bands) @ factors["right"])

    def arrangements(self, shape):
        """'factors': a batch of thin products, one a band, and a product with all left factors, which adds up."""
        return (Arrangement("factors", ((0, 1), (1, 2))),)

    def places(self, shape):
        """The one intermediate result."""
        return ("rank",)

    def chain(self, factors, shape, plan):
        """The Chain that carries out a plan, see chain.py."""
        if plan.name == "rebuild":
            return super().chain(factors, shape, plan)
        links = [Apart(factors["right"]), Link(factors["left"], 1)]
        return Chain(links, (shape[1], self.bands * self.rank, shape[0]))

    def priced(self, shape, tokens):
        """The Plans 'factors' and 'rebuild' of a resolved form."""
        (out, width), rank, bands = shape, self.rank, self.bands
        thin = Product(rank, width // bands, tokens, bands, shared=False), Product(tokens, bands * rank, out)
        build = Product(out, rank, width // bands, bands, shared=False), Copy(out * width, width // bands)
        return (
            Plan("factors", ((0, 1), (1, 2)), True, False, False, (), thin, 0),
            Plan("rebuild", ((0, 2),), True, False, False, build, (Product(tokens, width, out),), out * width),
        )

    def rows(self, ids, factors, shape, plan=None, kept=None, room=None):
        """Rows `ids` (tokens,) of the weight, without building it: (tokens, in)."""
        parts = F.embedding(ids, factors["left"])  # (tokens, bands*rank)
        return apply_link(Apart(factors["right"].mT), parts, plain=True)

    def row_plans(self, shape, tokens):
        """The one Plan to look up so many rows: 'gather', rows of the left factors."""
        form = self.resolve(shape)
        rank, bands = form.rank, form.bands
        run = Copy(tokens * bands * rank), Product(shape[1] // bands, rank, tokens, bands, shared=False)
        return [Plan("gather", ((0, 1), (1, 2)), True, False, False, (), run, 0)]
