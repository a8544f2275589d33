"""Triton kernels (extra "gpu") for low-rank and Kronecker layers in inference: one launch from x to y, bias included.

Checked in Triton's interpreter on a CPU only, and compiled for sm_90: never run nor timed on a GPU so far.

What they save is traffic and launches. A Kronecker sum with a small right factor does few multiply-adds for each number of its
intermediate result, which is as large as the output or larger: here that stays in registers. A low-rank product does
many, so its (tokens, rank) numbers may pass through L2: one launch computes them, and the programs of its second half
wait for their own tokens only. tests/benchmarks/gpu_kernels.py times all of it where there is a GPU.
"""

import math

import torch
import torch.nn.functional as F

from tnlib.kronecker import Kronecker
from tnlib.layers import FactorizedLinear
from tnlib.low_rank import LowRank
from tnlib.shapes import ShapeError
from tnlib.triton_programs import MOST_TOKENS, interpreted, load, run_kronecker, run_low_rank

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST = 16  # side of a right factor


def low_rank_linear(x, left, right, bias=None):
    """y = x right^T left^T + bias in one launch, for inference: x (…, in) -> (…, out).

    left, right, bias: (out, rank), (rank, in), (out,); all of x's type (bfloat16, float16, float32) and CUDA device
    Sums are float32, the (tokens, rank) result between the products has x's type. Where a gradient is needed: plain products.
    Raises: ShapeError for shapes that do not chain, ValueError for types or devices, ImportError without triton,
        RuntimeError without a GPU
    Exact: the same bits at every call; integers in float32 come out exact while every sum is below 2^24.
    """
    where, shapes = "low_rank_linear", f"left {tuple(left.shape)}, right {tuple(right.shape)}"
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
        raise ShapeError(f"{where}: got {shapes}; needed (out, rank) and (rank, in). Transpose or cut one of them.")
    out, width = left.shape[0], right.shape[1]
    plain = _plain(where, x, (left, right), bias, (out, width))
    flat = x.reshape(-1, width).contiguous()  # (tokens, in)
    if plain or len(flat) > MOST_TOKENS:
        y = F.linear(F.linear(flat, right), left, bias)  # (tokens, rank) -> (tokens, out)
    else:
        y = run_low_rank(flat, left.contiguous(), right.contiguous(), bias)  # (tokens, out)
    return y.reshape(*x.shape[:-1], out)


def kronecker_linear(x, left, right, bias=None):
    """y[…, i, j] = sum_{k, p, q} left[k, i, p] right[k, j, q] x[…, p, q] + bias in one launch, for inference.

    x: (…, l1*r1) -> (…, l0*r0); left, right: (terms, l0, l1), (terms, r0, r1) with r0 and r1 at most 16; bias: (l0*r0,);
        all of x's type (bfloat16, float16, float32) and CUDA device. Sums are float32
    The side of `right` that is smaller decides the order: r1 <= r0 contracts left first. Where a gradient is needed: plain products.
    Raises: ShapeError for shapes that do not chain, ValueError for types or devices, ImportError without triton,
        RuntimeError without a GPU
    Exact: the same bits at every call; integers in float32 come out exact while every sum is below 2^24.
    """
    where, shapes = "kronecker_linear", f"left {tuple(left.shape)}, right {tuple(right.shape)}"
    if left.dim() != 3 or right.dim() != 3 or len(left) != len(right) or max(right.shape[1:]) > LARGEST:
        raise ShapeError(
            f"{where}: got {shapes}; needed (terms, l0, l1) and (terms, r0, r1), r0 and r1 at most {LARGEST}. "
            "Use FactorizedLinear for other sizes."
        )
    (l0, l1), (r0, r1) = left.shape[1:], right.shape[1:]
    plain = _plain(where, x, (left, right), bias, (l0 * r0, l1 * r1))
    flat = x.reshape(-1, l1 * r1).contiguous()  # (tokens, in)
    if not plain:
        y = run_kronecker(flat, left.contiguous(), right.contiguous(), bias)  # (tokens, out)
    else:
        z = torch.einsum("tpq,kjq->tkjp", flat.reshape(-1, l1, r1), right)  # (tokens, terms, r0, l1), q summed
        y = torch.einsum("tkjp,kip->tij", z, left).reshape(-1, l0 * r0)  # (tokens, out), k and p summed
        y = y if bias is None else y + bias
    return y.reshape(*x.shape[:-1], l0 * r0)


def use_triton_(model, on=True):
    """Run the LowRank and Kronecker layers of a model (right factors up to 16 x 16) by these kernels from now on, in place.

    The layers stay FactorizedLinear with the same tensors: only their class is a subclass, which on=False takes back. They do
    what they did before in training mode, where a gradient is needed, under autocast and torch.compile, on a CPU, with
    quantized activations, and for many tokens where the factors cost as many multiply-adds as the dense weight.
    Raises: ShapeError for a model without such layers, ImportError without triton, RuntimeError without a GPU
    Exact: after use_triton_(model, on=False) every layer computes the bits that it did before.
    """
    if on:
        load("use_triton_")
    old, new = (FactorizedLinear, TritonLinear) if on else (TritonLinear, FactorizedLinear)
    layers = [layer for layer in model.modules() if type(layer) is old and _covers(layer.form)]
    if on and not layers:
        raise ShapeError(
            f"use_triton_: got a model with no LowRank or Kronecker layers, right factor at most {LARGEST} x {LARGEST}, that "
            "are neither quantized nor switched yet; needed some. Call factorize_ first."
        )
    for layer in layers:
        layer.__class__ = new


class TritonLinear(FactorizedLinear):
    """A FactorizedLinear that use_triton_ has switched."""

    def forward(self, x):
        """x: (…, in). Returns: (…, out), by a kernel in inference, else as FactorizedLinear does."""
        named, bias = self.operands, self.bias
        if not self._runs(x, [t for t in (x, *named.values(), bias) if t is not None and t.is_floating_point()]):
            return super().forward(x)
        if isinstance(self.form, LowRank):
            return low_rank_linear(x, named["left"], named["right"], bias)
        right = named["right"]  # (terms, r0, r1)
        if "scale" in named:
            right = right * named["scale"][:, None, None]
        if "column_order" in named:
            x = x.index_select(-1, named["column_order"])
        if "row_order" not in named:
            return kronecker_linear(x, named["left"], right, bias)
        y = kronecker_linear(x, named["left"], right).index_select(-1, named["row_order"])
        return y if bias is None else y + bias

    def _runs(self, x, tensors):
        """Whether the kernels can, and should: few tokens cost the reading of the factors, many their multiply-adds."""
        (out, width), form, kind = self.shape, self.form, x.device.type
        if self.training or getattr(self, "between", None) is not None or _gradients(tensors) or not _alike(tensors):
            return False
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(kind):
            return False
        if kind != ("cpu" if interpreted() else "cuda"):
            return False
        if x.shape[-1] != width or x.numel() == 0:
            return False
        low = isinstance(form, LowRank)
        each = form.rank * (out + width) if low else form.terms * math.prod(form.left) * min(form.right)
        return x.numel() // width <= 16 or each < out * width


def _covers(form):
    return isinstance(form, LowRank) or (isinstance(form, Kronecker) and max(form.right) <= LARGEST)


def _plain(where, x, factors, bias, shape):
    """Refuse what the kernels would read wrongly. Returns: whether plain products must do, for gradients or no tokens."""
    out, width = shape
    if x.shape[-1] != width or (bias is not None and tuple(bias.shape) != (out,)):
        found = None if bias is None else tuple(bias.shape)
        raise ShapeError(
            f"{where}: got x {tuple(x.shape)}, bias {found}; needed (…, {width}) and ({out},). Cut or pad."
        )
    tensors = [tensor for tensor in (x, *factors, bias) if tensor is not None]
    if not _alike(tensors):
        found = ", ".join(sorted({f"{tensor.dtype} on {tensor.device}" for tensor in tensors}))
        raise ValueError(
            f"{where}: got {found}; needed bfloat16, float16 or float32, one for all, on one device. Use .to()."
        )
    if x.numel() == 0 or _gradients(tensors):
        return True
    load(where)
    if x.device.type != ("cpu" if interpreted() else "cuda"):
        raise RuntimeError(
            f"{where}: got tensors on {x.device}; needed a GPU. Move them there, or use FactorizedLinear."
        )
    return False


def _alike(tensors):
    first = tensors[0]
    return first.dtype in DTYPES and all((t.dtype, t.device) == (first.dtype, first.device) for t in tensors)


def _gradients(tensors):
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
