"""Integer grids: which numbers a tensor may hold after quantization, and how gradients pass the rounding.

One function, `round_to_grid`, decides for training (fake quantization, here) and for storage (packing.py) alike, so that
what was trained is what is stored. A grid is a scale s and integers low..high: every number becomes s times one of them.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

STARTS = ("max", "percentile", "mse", "lsq")
LEARN = ("plain", "lsq", "frozen", "follow")
PERCENTILE = 99.9  # of |x|, for start="percentile"
PIECE = 1 << 17  # numbers: 512 KiB each of four tensors
EDGE = 1e-4  # of a step: a number on the bound itself is inside, whatever the rounding of x/s
SHRINK = tuple(0.9**k for k in range(40))  # shares of max that start="mse" tries; a core's max may be 40 deviations


class QuantizeError(ValueError):
    """A grid that cannot be; the message names the field and what would do."""


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Which tensors get an integer grid, of what kind, and when.

    bits: 2 to 8 in training; stored are 2, 4 and 8
    what: "factors" (of factorized layers) or "dense" (the matrices that no rule touched: two axes or more)
    when: "during" healing (fake quantization) or "after" it
    scales: one for each "tensor", for each "channel" (axis 0 of a matrix, a mode index of a core), or for each group of so
        many consecutive numbers
    symmetric: integers -2^(b-1)..2^(b-1)-1; else a range that begins at the smallest number, or at 0
    start: where a scale starts. "max": max|x| / high; "percentile" (of |x|, PERCENTILE) / high; "mse": the smallest
        squared error among the shares SHRINK of max; "lsq": 2 mean|x| / sqrt(high), Esser et al. 2020
    learn: "plain": by its gradient as it is, the paper's variant; "lsq": by its gradient over sqrt(n high), n numbers a
        scale; "frozen": not at all; "follow": not learned, started anew from the tensor at every step
    activation_bits: of inputs and intermediate results of factorized layers, one scale each; None: not quantized
    Raises: QuantizeError naming the field
    """

    bits: int
    what: str = "factors"
    when: str = "during"
    scales: str | int = "tensor"
    symmetric: bool = True
    start: str = "max"
    learn: str = "plain"
    activation_bits: int | None = None
    source: str = ""

    def __post_init__(self):
        known = {"what": ("factors", "dense"), "when": ("during", "after"), "start": STARTS, "learn": LEARN}
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise QuantizeError(
                    f"Quantize: got {name}={getattr(self, name)!r}; needed one of {', '.join(allowed)}."
                )
        for name in ("bits", "activation_bits"):
            check_bits(name, getattr(self, name), optional=name == "activation_bits")
        group = isinstance(self.scales, int) and not isinstance(self.scales, bool) and self.scales > 0
        if not group and self.scales not in ("tensor", "channel"):
            raise QuantizeError(
                f"Quantize: got scales={self.scales!r}; needed 'tensor', 'channel' or a group's size, e.g. 64."
            )
        if self.activation_bits and self.what == "dense":
            raise QuantizeError(
                "Quantize: got activation_bits with what='dense'; needed what='factors', whose layers have places for it."
            )


def check_bits(name, bits, optional=False):
    """Refuse widths that are no grid. Raises: QuantizeError"""
    if bits is None and optional:
        return
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise QuantizeError(f"Quantize: got {name}={bits!r}; needed a whole number from 2 to 8.")


def round_to_grid(x, scale, low, high, out=None):
    """The integers that stand for x: round(x / scale), clipped to low..high; ties to even.

    x, scale, low, high: broadcast against each other; low and high numbers or tensors
    Returns: integers in x's own float type. Exact: of s*k it is k for every integer k of the grid.
    """
    return (
        torch.div(x, scale, out=out).round_().clamp_min_(low).clamp_max_(high)
    )  # clamp_ of tensors is ten times slower


def blocks(x, scales):
    """x with one row for each scale: (blocks, numbers); a last group that is not full ends in zeros."""
    if scales == "tensor":
        return x.reshape(1, -1)
    if scales == "channel":
        axis = _channel_axis(x.dim())
        return x.movedim(axis, 0).reshape(x.shape[axis], -1)
    return F.pad(x.reshape(-1), (0, -x.numel() % scales)).reshape(-1, scales)


def unblocks(rows, shape, scales):
    """The tensor of `shape` whose blocks are `rows`. Exact: unblocks(blocks(x, s), x.shape, s) is x."""
    if scales == "channel":
        axis = _channel_axis(len(shape))
        moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        return rows.reshape(moved).movedim(0, axis)
    return rows.reshape(-1)[: math.prod(shape)].reshape(shape)


def _channel_axis(axes):
    return (
        0 if axes < 3 else 1
    )  # of a core (r, mode, …, r') or a stack of terms (terms, rows, columns): the mode, the rows


def start_scale(rows, bits, symmetric=True, start="max"):
    """Scales and smallest integers for blocks of numbers.

    rows: (blocks, numbers)
    Returns: scale (blocks, 1); low (blocks, 1), integers as floats, -2^(bits-1) where symmetric
    Exact: with start="max", numbers that lie on the grid of that scale are kept as they are.
    """
    steps = 2**bits - 1
    if symmetric:
        low = torch.full_like(rows[:, :1], -(2 ** (bits - 1)))
        high = 2 ** (bits - 1) - 1
        scale = _reach(rows.abs(), high, start) / high
    else:
        most, least = (rows.amax(1, keepdim=True).clamp_min(0), rows.amin(1, keepdim=True).clamp_max(0))
        scale = (most - least) / steps
        low = (least / _positive(scale)).round()
    scale = _positive(scale)
    return (_least_error(rows, scale, low, low + steps), low) if start == "mse" else (scale, low)


def _reach(size, high, start):
    """What the largest integer stands for, from |x| (blocks, numbers): (blocks, 1)."""
    if start == "percentile":
        rank = max(1, math.ceil(PERCENTILE / 100 * size.shape[1]))
        return size.kthvalue(rank, dim=1, keepdim=True).values
    if start == "lsq":
        return 2 * size.mean(1, keepdim=True) * math.sqrt(high)
    return size.amax(1, keepdim=True)


def _least_error(rows, scale, low, high):
    """The share of `scale` in SHRINK that leaves the smallest squared error, block by block, as many at once as a cache holds."""
    at_once = max(1, PIECE // rows.shape[1])
    parts = zip(*(part.split(at_once) for part in (rows.detach(), scale, low, high)))
    return torch.cat([_search(*part) for part in parts])


def _search(rows, scale, low, high):
    """_least_error of some blocks: (blocks, 1)."""
    best, error = scale, torch.full_like(scale, math.inf)
    buffer = torch.empty_like(rows)
    for share in SHRINK:
        tried = share * scale
        miss = round_to_grid(rows, tried, low, high, out=buffer).mul_(tried).sub_(rows)
        new = torch.linalg.vecdot(miss, miss)[:, None]
        best, error = torch.where(new < error, tried, best), torch.minimum(new, error)
    return best


def _positive(scale):
    """Scales away from 0: a block of zeros gets 1."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


class _StraightThrough(torch.autograd.Function):
    """Forward: scale * round_to_grid(x). Backward: the rounding passed straight through, clipping not.

    The slope in the scale is q - x/s inside the range and q, the bound, outside; summed against the gradient g that is
    (g.out - g_x.x) / s with out = s q and g_x the gradient of x, so that no slope is formed.
    """

    @staticmethod
    def forward(ctx, x, learned, scale, low, steps, gain):
        out = torch.empty_like(x)
        for some, seen in _pieces(x, out):
            round_to_grid(some, scale, low, low + steps, out=seen).mul_(scale)
        ctx.save_for_backward(x, out, learned, scale, low)
        ctx.steps, ctx.gain = steps, gain
        return out

    @staticmethod
    def backward(ctx, grad):
        """grad of the output (blocks, numbers) -> gradients of x and of the scale."""
        x, out, learned, scale, low = ctx.saved_tensors
        to_x, total = torch.empty_like(x), torch.zeros_like(scale)
        for some, seen, slope, passed in _pieces(x, out, grad.contiguous(), to_x):
            _pass_inside(slope, some, scale, low, ctx.steps, out=passed)
            if ctx.needs_input_grad[1]:
                total += _dot(slope, seen) - _dot(passed, some)
        to_scale = total.div_(scale).mul_(learned.sign()).mul_(ctx.gain) if ctx.needs_input_grad[1] else None
        return to_x, to_scale, None, None, None, None


def _traced(x, learned, scale, low, steps, gain):
    """_StraightThrough by operations that a compiled or exported graph may hold, for any number of blocks; the same numbers."""
    size = learned.abs()
    scale = scale + gain * (size - size.detach())  # which brings its gradient and no change
    seen = (x / scale).clamp(low - EDGE, low + steps + EDGE)
    return (seen + (seen.round() - seen).detach()) * scale


def _pass_inside(slope, x, scale, low, steps, out):
    """Into `out`: `slope` where low <= x/scale <= low + steps, 0 elsewhere."""
    if _in_pieces(x):  # bounds of x itself spare two passes; elsewhere they would stop an accelerator's queue
        step, least = float(scale), float(low)
        bounds = (least - EDGE) * step, (least + steps + EDGE) * step
    else:
        x, bounds = torch.div(x, scale, out=out).sub_(low), (-EDGE, steps + EDGE)
    torch.ops.aten.hardtanh_backward.grad_input(slope, x, *bounds, grad_input=out)


def _dot(a, b):
    """Inner product of each block: (blocks, 1)."""
    return torch.dot(a[0], b[0]) if _in_pieces(a) else torch.linalg.vecdot(a, b)[:, None]  # the latter makes a product


def _pieces(*tensors):
    """Tensors (blocks, numbers) in pieces that stay in a processor's cache while several passes go over them."""
    return zip(*(tensor.split(PIECE, 1) if _in_pieces(tensor) else (tensor,) for tensor in tensors))


def _in_pieces(x):
    return len(x) == 1 and x.device.type == "cpu"


class FakeQuantize(nn.Module):
    """A tensor seen through its grid, in float: what a parametrization of a weight or a core computes.

    tensor: the one to start from; quantize: a Quantize; bits: instead of its own
    forward: x of the tensor's shape, or of any shape where scales="tensor" -> the nearest point of the grid, x's dtype;
        computed in float32, or float64 for float64
    Raises: QuantizeError for numbers that are NaN or infinite
    Gradients: of x where low <= x/s <= high, else 0; of s: q - x/s there, else the bound (Esser et al. 2020, equations 3 and 5).
    Exact: a point of the grid is itself.
    """

    def __init__(self, tensor, quantize, bits=None):
        super().__init__()
        if tensor.device.type != "meta" and not bool(tensor.isfinite().all()):
            raise QuantizeError(
                f"FakeQuantize: {int((~tensor.isfinite()).sum())} of {tensor.numel()} numbers are NaN or infinite; needed finite ones."
            )
        self.quantize, self.bits = quantize, bits or quantize.bits
        scale, low = self._start(blocks(wide(tensor.detach()), quantize.scales))
        self.register_buffer("low", low)  # (blocks, 1)
        if quantize.learn in ("frozen", "follow"):
            self.register_buffer("scale", scale)
        else:
            self.scale = nn.Parameter(scale)

    def _start(self, rows):
        return start_scale(rows, self.bits, self.quantize.symmetric, self.quantize.start)

    def grid(self, rows=None):
        """Scale and smallest integer (blocks, 1), started anew from `rows` where a scale follows its tensor."""
        if self.quantize.learn == "follow" and self.training and rows is not None:
            # new tensors, not new numbers in the old ones: a tied weight is read twice before the backward pass
            self.scale, self.low = self._start(rows.detach())
        # a step may carry a scale across 0, where the grid is the same mirrored
        return self.scale.detach().abs().clamp_min(1e-12), self.low

    def forward(self, x):
        """x through the grid, same shape and dtype."""
        rows = blocks(wide(x), self.quantize.scales)  # (blocks, numbers)
        gain = 1 / math.sqrt(rows.shape[1] * (2 ** (self.bits - 1) - 1)) if self.quantize.learn == "lsq" else 1.0
        through = _traced if torch.compiler.is_compiling() else _StraightThrough.apply
        seen = through(rows, self.scale, *self.grid(rows), 2**self.bits - 1, gain)
        return unblocks(seen, x.shape, self.quantize.scales).to(x.dtype)

    def extra_repr(self):
        return f"bits={self.bits}, scales={self.quantize.scales} ({self.scale.numel()}), learn={self.quantize.learn}"


def wide(x):
    """At least float32: what grids are computed in."""
    return x if x.dtype == torch.float64 else x.float()
