"""Tensor rings: an MPO whose ends are joined, so that an entry of the weight is the trace of a product of matrices.

W[o, i] = tr G_1[o_1, i_1] G_2[o_2, i_2] … G_d[o_d, i_d]. No cut through a ring leaves it in two parts at one bond, so there is no
SVD that gives the nearest ring; it is approached downhill. In return the numbers reach further than in an open chain, whose first
and last cores are short: with two sites a ring is Van Loan's sum of rank^2 Kronecker products, with three or more it is something
else. Source: Zhao et al. 2016 (arXiv 1606.05535); physics calls it a matrix product operator with periodic boundary.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tnlib.chain import Chain
from tnlib.contract import Copy, Plan, Product, merge, merge_steps
from tnlib.form import Form, check_kept, evened, measured_error, positive, refuse_init
from tnlib.links import Link
from tnlib.shapes import ShapeError, balanced_modes, check_weight
from tnlib.tensor_train import names, possible_ranks, take_modes
from tnlib.tt_matrix import TTMatrix

STEPS = 60  # of L-BFGS in `decompose`: sixty more lower the error of a 1536 x 576 up-projection at 30 % by a fiftieth
HISTORY = 10  # steps that L-BFGS looks back on: with 100 an equal fit of such a matrix at 60 or 80 % takes 15 to 50 % longer
NOISE = 0.1  # in the start, where the open chain has zeros: of the entries of a random ring as large as the weight
ROOM = 1 << 24  # numbers at once while rows are looked up


@dataclass(frozen=True)
class TensorRing(Form):
    """weight (out, in) as cores (rank, out_k, in_k, rank), joined in a ring. Stored: rank^2 * sum(out_k * in_k).

    Modes of both sides, or `order` = how many balanced modes a side gets; `rank` of all bonds, or `kept`, the share of out*in
    to store. Ranks beyond the largest that an open chain can use become that.
    A ring saves numbers and no arithmetic: the weight is rebuilt for every batch of tokens, at more FLOPs than the dense product
    of thousands of them, unless it is kept, `materialize_(model, "always")`.
    Exact: at full rank it is the weight; of two sites it is a Kronecker sum of rank^2 terms.
    """

    out_modes: tuple[int, ...] | None = None
    in_modes: tuple[int, ...] | None = None
    order: int | None = None
    rank: int | None = None
    kept: float | None = None

    def __post_init__(self):
        positive("TensorRing", out_modes=self.out_modes, in_modes=self.in_modes, order=self.order, rank=self.rank)
        check_kept("TensorRing", self.kept)
        if (self.rank is None) == (self.kept is None):
            raise ShapeError(
                f"TensorRing: got rank={self.rank}, kept={self.kept}; needed one of the two. Give rank=32 or kept=0.5."
            )
        take_modes(self)

    def resolve(self, shape):
        """The same form with modes and the rank that is really used for a weight of `shape` (out, in)."""
        outs = self.out_modes or balanced_modes(shape[0], self.order)
        ins = self.in_modes or balanced_modes(shape[1], self.order)
        sizes = self._open(outs, ins).resolve(shape)._modes()  # which refuses modes that do not fit
        if len(sizes) < 2:
            raise ShapeError(
                f"TensorRing: got modes {outs}, {ins}; needed at least two of each side. Give order=3, or use LowRank."
            )
        rank = self.rank or math.isqrt(int(self.kept * math.prod(shape)) // sum(sizes))
        if rank < 1:
            raise ShapeError(
                f"TensorRing: kept={self.kept} of weight {tuple(shape)} (out, in) leaves rank 0 for sites of {sizes}; raise kept, "
                "or choose more modes."
            )
        rank = min(rank, max(possible_ranks("TensorRing", sizes)))
        return replace(self, out_modes=outs, in_modes=ins, order=None, rank=rank, kept=None)

    def _open(self, outs=None, ins=None):
        """The open chain that this ring starts from."""
        return TTMatrix(out_modes=outs or self.out_modes, in_modes=ins or self.in_modes, max_rank=self.rank)

    def factor_shapes(self, shape):
        """Stored cores by name, (rank, out_k, in_k, rank)."""
        pairs = zip(self.out_modes, self.in_modes)
        return {f"core{k}": (self.rank, o, i, self.rank) for k, (o, i) in enumerate(pairs)}

    def _summands(self):
        return self.rank ** len(self.out_modes)

    def decompose(self, weight, init="svd", generator=None):
        """weight (…, out, in) -> cores by name, relative error (…,). init: 'svd', the TT-SVD of an open chain, then downhill.

        generator: of the noise where the open chain has zeros; None: the same for every weight
        Exact: the error is at most that of the open chain, `MPO` of the same bond dimension.
        """
        refuse_init("TensorRing", init, ("svd",))
        check_weight(weight, "TensorRing")
        shape, work = weight.shape[-2:], weight if weight.dtype == torch.float64 else weight.float()
        found = [self._nearest(one, generator) for one in work.reshape(-1, *shape)]
        factors = found[0]
        if weight.dim() > 2:
            factors = {name: torch.stack([one[name] for one in found]).unflatten(0, weight.shape[:-2]) for name in factors}
        return factors, measured_error(work, self.to_dense(factors, tuple(shape)))

    def _nearest(self, weight, generator):
        """Cores for one weight (out, in)."""
        form = self._open().resolve(tuple(weight.shape))
        cores, error = form.decompose(weight)
        cores, total = evened(cores), weight.square().sum()
        d, room = len(cores), [self.rank - core.shape[-1] for core in cores.values()]  # what the open chain leaves of each bond
        opened = {n: F.pad(c, (0, room[k], 0, 0, 0, 0, 0, room[k - 1])) for k, (n, c) in enumerate(cores.items())}
        if float(error) < 1e-6 or total == 0:
            return opened
        size = NOISE * float(total / weight.numel() / self.rank**d) ** (1 / (2 * d))
        generator = generator or torch.Generator().manual_seed(0)
        how = {"generator": generator, "dtype": weight.dtype, "device": generator.device}
        noisy = {name: core + size * torch.randn(core.shape, **how).to(core) for name, core in opened.items()}
        found = downhill(self, noisy, weight, lambda difference: difference / total, STEPS)
        return found if measured_error(weight, self.to_dense(found, tuple(weight.shape))) <= error else opened

    def to_dense(self, factors, shape):
        """The weight (…, out, in) that the cores stand for; leading axes of the cores are a batch."""
        *front, last = names(factors)
        front = merge(front)  # (…, r, O, I, s)
        tall, wide = front.shape[-3:-1]
        left = front.movedim(-4, -2).flatten(-2).flatten(-3, -2)  # (…, O*I, r*s)
        right = last.movedim(-1, -4).flatten(-2).flatten(-3, -2)  # (…, r*s, o*i)
        whole = (left @ right).unflatten(-1, last.shape[-3:-1]).unflatten(-3, (tall, wide))  # (…, O, I, o, i)
        return whole.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def arrangements(self, shape):
        """None but to rebuild the weight: a ring has no end to start a sweep from."""
        return ()

    def chain(self, factors, shape, plan):
        """The Chain that carries out a plan. In training only the weight is held for the backward pass: what it is built from is
        rank^2 / (out_d * in_d) times as large, and is built again."""

        def weight(*cores):
            return self.to_dense(dict(zip(factors, cores)), shape)

        cores = tuple(factors.values())
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and any(core.requires_grad for core in cores)):
            built = weight(*cores)
        else:
            built = checkpoint(weight, *cores, use_reentrant=False, preserve_rng_state=False)
        return Chain([Link(built, 1)], (shape[1], shape[0]))

    def priced(self, shape, tokens):
        """The one Plan of a resolved form, 'rebuild'."""
        (out, width), square = shape, self.rank**2
        sizes = tuple(self.factor_shapes(shape).values())
        last = sizes[-1][1] * sizes[-1][2]
        rest = out * width // last
        build = *merge_steps(sizes[:-1]), Copy(rest * square), Product(rest, square, last), Copy(out * width)
        run = (Product(tokens, width, out),)
        return (Plan("rebuild", ((0, len(sizes)),), True, False, False, build, run, out * width),)

    def rows(self, ids, factors, shape, plan=None, kept=None, room=None):
        """Rows `ids` (tokens,) of the weight, without building it: (tokens, in)."""
        cores = names(factors)
        if torch.compiler.is_compiling():
            return self._rows(ids, cores)
        once = max(1, ROOM // (self.rank**2 * shape[1] // self.in_modes[-1]))
        return torch.cat([self._rows(some, cores) for some in ids.split(once)])

    def _rows(self, ids, cores):
        count, below, row = ids.shape[0], math.prod(self.out_modes), None
        for core, o in zip(cores, self.out_modes):
            r, _, i, s = core.shape
            below //= o
            piece = F.embedding(ids // below % o, core.transpose(0, 1).flatten(1)).view(count, r, i, s)
            if row is None:
                row = piece
            elif below > 1:
                row = (row.flatten(1, 2) @ piece.flatten(2)).view(count, r, -1, s)  # (tokens, r, inputs done, s)
        left, right = row.transpose(1, 2).flatten(2), piece.movedim(3, 1).flatten(1, 2)  # (tokens, I, r*s), (tokens, r*s, i)
        return (left @ right).flatten(1)

    def row_plans(self, shape, tokens):
        """The one Plan to look up so many rows: 'gather', a slice of every core."""
        form = self.resolve(shape)
        rank, run, done = form.rank, [], 1
        for k, i in enumerate(form.in_modes):
            run.append(Copy(tokens * rank**2 * i))
            if 0 < k < len(form.in_modes) - 1:
                run.append(Product(rank * done, rank, i * rank, tokens, shared=False))
            elif k:
                run.append(Product(done, rank**2, i, tokens, shared=False))
            done *= i
        return [Plan("gather", tuple((k, k + 1) for k in range(len(form.in_modes))), True, False, False, (), tuple(run), 0)]


def downhill(form, factors, weight, times, steps):
    """Move `factors` by L-BFGS so that the weight they stand for is nearer to `weight` (out, in).

    times: a difference (out, in) -> half the gradient of its squared size
    Returns: factors by name, as `evened` leaves them. Exact: the squared size of what is missed does not rise.
    """
    start = evened({name: core.detach().to(weight.dtype) for name, core in factors.items()})
    points = {name: core.clone(memory_format=torch.contiguous_format).requires_grad_() for name, core in start.items()}
    search = {"history_size": HISTORY, "line_search_fn": "strong_wolfe", "tolerance_grad": 0, "tolerance_change": 1e-12}
    method = torch.optim.LBFGS(points.values(), max_iter=steps, **search)

    def missed():
        method.zero_grad()
        with torch.enable_grad():
            rebuilt = form.to_dense(points, tuple(weight.shape))
        difference = rebuilt.detach() - weight
        half = times(difference)
        rebuilt.backward(2 * half)
        return (difference * half).sum()

    method.step(missed)
    return evened({name: core.detach() for name, core in points.items()})
