"""What every format offers: a Form is shapes and ranks, never tensors.

The formats are in low_rank.py, block_low_rank.py, kronecker.py, tensor_train.py, tt_matrix.py and tensor_ring.py, one file each.
A Form may be loose ("keep half", "right factor 2 x 2, rest inferred"); `resolve(shape)` makes it definite for one weight, with
the ranks that are really possible.
"""

import math
from dataclasses import dataclass, fields

import torch

from tnlib.applied import Applied
from tnlib.contract import Arrangement, merge, plans_of, train_plans
from tnlib.lookup import row_plans_of
from tnlib.shapes import ShapeError


@dataclass(frozen=True)
class Form(Applied):
    """Base of LowRank, BlockLowRank, Kronecker, TensorTrain, TTMatrix and TensorRing.

    Shapes are always (out, in) of the weight replaced.

    A format defines: resolve, factor_shapes, decompose, `paired` (its factors as a train of cores, see contract.py),
    `arrangements` (its plans), and _summands (how many products are summed into one entry of the weight). The rest follows.
    A format that is no train defines in place of `paired`: to_dense, priced, chain, rows and row_plans.
    """

    reordered = ()  # axes of the weight, "rows" or "columns", that have an order of their own

    def arrangements(self, shape):
        """Arrangement of every plan but "rebuild"; by default the sweep over the cores as they are, from either end."""
        cores = tuple((k, k + 1) for k in range(len(self.paired(self._meta(shape)))))
        return (Arrangement("left to right", cores), Arrangement("right to left", cores, forward=False))

    def _meta(self, shape):
        return {name: torch.empty(size, device="meta") for name, size in self.factor_shapes(shape).items()}

    def to_dense(self, factors, shape):
        """The weight (…, out, in) that the factors stand for; leading axes of the factors are a batch."""
        whole = merge(self.paired(factors))  # (…, 1, out, in, 1)
        return whole.squeeze(-1).squeeze(-3)

    def row_groups(self, shape):
        """(name, groups of cores merged) of every way to look up rows; by default one: a part of each core is gathered."""
        return (("gather", self.arrangements(shape)[0].groups),)

    def row_plans(self, shape, tokens):
        """Every Plan to look up so many rows."""
        return list(row_plans_of(self.resolve(shape), tuple(shape), tokens))

    def plans(self, shape, tokens):
        """Every Plan for so many tokens, "rebuild" (the weight, then one product) the last one."""
        return list(plans_of(self.resolve(shape), tuple(shape), tokens))

    def priced(self, shape, tokens):
        """`plans` of a resolved form; to be asked through contract.plans_of, which remembers them."""
        return train_plans(self, shape, tokens)

    def num_params(self, shape):
        """Numbers stored for a weight of `shape` (out, in). Exact: equals the elements of the factors built."""
        return sum(math.prod(size) for size in self.resolve(shape).factor_shapes(shape).values())

    def index_shapes(self, shape):
        """Integer tensors stored beside the factors, by name: int32 buffers, no parameters. Most formats have none."""
        return {}

    def share(self, shape):
        """num_params over the dense out*in; above 1 the form costs more than it saves."""
        return self.num_params(shape) / math.prod(shape)

    def flops(self, shape, tokens=1):
        """Multiply-adds times two of the plan with the fewest, for `tokens` inputs, bias not counted."""
        return min(plan.flops for plan in self.resolve(shape).plans(shape, tokens))

    def random(self, shape, std=None, generator=None, dtype=torch.float32, device=None):
        """Gaussian factors whose product has entries of standard deviation `std` (default: Xavier, sqrt(2/(out+in))).

        Every factor gets the same std: (std^2 / summands)^(1/(2*factors)). A per-core Xavier std, as some published
        code uses, makes the product too small by orders of magnitude: the cores' stds multiply.
        Exact: the mean square of to_dense(random(…)) tends to std^2.
        """
        form = self.resolve(shape)
        std = math.sqrt(2 / sum(shape)) if std is None else std
        sizes = form.factor_shapes(shape)
        drawn = {name: size for name, size in sizes.items() if name != "scale"}
        each = (std**2 / form._summands()) ** (1 / (2 * len(drawn)))
        factors = {n: each * torch.randn(*s, generator=generator, dtype=dtype, device=device) for n, s in drawn.items()}
        if "scale" in sizes:
            factors["scale"] = torch.ones(sizes["scale"], dtype=dtype, device=device)
        return factors | self.natural_orders(shape, device)

    def natural_orders(self, shape, device=None):
        """The integer tensors of a weight that is not reordered."""
        sizes = self.resolve(shape).index_shapes(shape).items()
        return {name: torch.arange(*size, dtype=torch.int32, device=device) for name, size in sizes}

    def __str__(self):
        given = [
            f"{f.name}={_short(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(given)})"


def _short(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def positive(where, **values):
    """Refuse ranks, terms and modes that are not positive integers; None passes.

    Raises: ShapeError naming the field, what was got and what is needed.
    """
    for name, value in values.items():
        for number in value if isinstance(value, (tuple, list)) else [value]:
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ShapeError(f"{where}: got {name}={value!r}; needed positive integers. Use at least 1.")


def check_kept(where, kept):
    """Refuse a budget outside (0, 1]; None passes."""
    if kept is not None and not 0 < kept <= 1:
        raise ShapeError(f"{where}: got kept={kept!r}; needed a share above 0 and at most 1, e.g. kept=0.5.")


def largest(fits, upper, where):
    """Largest integer in 1..upper for which `fits` holds (it must be monotone), by bisection.

    Raises: ShapeError when even 1 does not fit.
    """
    if not fits(1):
        raise ShapeError(f"{where}: even rank 1 needs more than the budget; raise kept=, or choose a smaller format.")
    low, high = 1, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def refuse_init(where, init, known):
    """Raises: ShapeError when `init` is not one of the format's initializations."""
    if init not in known:
        raise ShapeError(
            f"{where}: got init={init!r}; this format knows {', '.join(known)} (and 'random' and 'scratch' in a recipe)."
        )


def evened(factors):
    """The same product with equal root mean squares in all factors (a scale keeps its own): one learning rate suits them all.

    factors: by name. Exact: the product is the same; with a factor of zeros nothing changes.
    """
    sizes = {n: float(f.square().mean().sqrt()) for n, f in factors.items() if n != "scale"}
    if min(sizes.values()) == 0:
        return factors
    even = math.exp(sum(map(math.log, sizes.values())) / len(sizes))
    return {name: factor * (even / sizes[name]) if name in sizes else factor for name, factor in factors.items()}


def relative(discarded, total):
    """sqrt(discarded / total), 0 for a zero weight; both squared norms, (…,)."""
    return (discarded / total.clamp_min(1e-300)).sqrt()


def measured_error(weight, approximation):
    """||weight - approximation|| / ||weight|| over the last two axes, float64, by subtracting: (…,)."""
    difference = torch.linalg.matrix_norm(weight.double() - approximation.double())
    return difference / torch.linalg.matrix_norm(weight.double()).clamp_min(1e-300)
