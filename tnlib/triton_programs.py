"""The Triton programs behind triton_kernels.py, their tiles and their launch. Contiguous tensors only; nothing is checked here.

Checked in Triton's interpreter on a CPU, and compiled for sm_90: never run nor timed on a GPU so far. The tiles are chosen on paper.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

triton = tl = WIDE = None  # set by load: nobody else pays for the import
_kept = {}  # counters by device and stream
COUNTERS = 4096  # of one launch of _low_rank: two, and one for every tile of tokens


class Tiles(NamedTuple):
    """What one program computes: rows x columns of a product, `depth` numbers summed at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


DECODE, MIDDLE, PREFILL = Tiles(16, 16, 256, 4, 4), Tiles(64, 64, 64, 4, 4), Tiles(128, 128, 64, 8, 3)
MOST_TOKENS = (COUNTERS - 2) * MIDDLE.rows


def interpreted():
    """Whether Triton's interpreter stands in for a GPU, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def load(where):
    """Import triton and make the functions below its kernels.

    Raises: ImportError without triton, RuntimeError without a GPU
    """
    global triton, tl, WIDE
    if not interpreted() and not torch.cuda.is_available():
        raise RuntimeError(
            f"{where}: torch finds no GPU; needed CUDA. Keep FactorizedLinear as it is, or try the kernels on a CPU with "
            "TRITON_INTERPRET=1 in the environment from the start."
        )
    if tl is None:
        try:
            import triton
            import triton.language as tl
        except ImportError as error:
            raise ImportError(
                f"{where}: triton cannot be imported ({error}); needed the optional extra. Run: pip install 'tnlib[gpu]'"
            ) from None
        WIDE = tl.constexpr(interpreted())  # the interpreter multiplies the bits of bfloat16 as if they were integers
        for function in (_dot, _product, _low_rank, _load_x, _load_a, _load_b, _kronecker):
            globals()[function.__name__] = triton.jit(function)


def _dot(a, b, total):
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


def _product(x, w, row, tokens, column, width, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Rows of x (tokens, depth) times rows of w (width, depth), in float32: (ROWS, COLUMNS)."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        d = start + tl.arange(0, DEPTH)
        inside = (row[:, None] < tokens) & (d[None, :] < depth)
        # not from L1: another SM may just have written x
        xs = tl.load(x + row[:, None] * depth + d[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        inside = (d[:, None] < depth) & (column[None, :] < width)
        ws = tl.load(w + column[None, :] * depth + d[:, None], mask=inside, other=0.0)
        total = _dot(xs, ws, total)
    return total


def _low_rank(
    x, right, left, bias, z, y, state, tokens, width, rank, out,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of z = x right^T (tokens, rank), or one of y = z left^T, by the order in which programs start.

    state: started programs, finished tiles of y, then finished tiles of z for each tile of tokens. No deadlock: when a
    program that waits has started, all those that it waits for have started too, and they do not wait.
    """
    tiles, inner, outer = tl.cdiv(tokens, ROWS), tl.cdiv(rank, COLUMNS), tl.cdiv(out, COLUMNS)
    ticket = tl.atomic_add(state, 1)
    if ticket < tiles * inner:
        tile = ticket // inner
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        column = ticket % inner * COLUMNS + tl.arange(0, COLUMNS)
        total = _product(x, right, row, tokens, column, rank, width, ROWS, COLUMNS, DEPTH)
        inside = (row[:, None] < tokens) & (column[None, :] < rank)
        tl.store(z + row[:, None] * rank + column[None, :], total.to(z.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # all warps have stored before one thread says so
        tl.atomic_add(state + 2 + tile, 1)
    else:
        ticket -= tiles * inner
        tile = ticket // outer
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        column = ticket % outer * COLUMNS + tl.arange(0, COLUMNS)
        while tl.atomic_add(state + 2 + tile, 0) < inner:
            pass
        tl.debug_barrier()
        total = _product(z, left, row, tokens, column, out, rank, ROWS, COLUMNS, DEPTH)
        if BIAS:
            total += tl.load(bias + column, mask=column < out, other=0.0).to(tl.float32)[None, :]
        inside = (row[:, None] < tokens) & (column[None, :] < out)
        tl.store(y + row[:, None] * out + column[None, :], total.to(y.dtype.element_ty), mask=inside)
        if tl.atomic_add(state + 1, 1) == tiles * outer - 1:  # the last one leaves zeros for the next launch
            for n in range(2 + tiles):
                tl.store(state + n, 0)


def _load_x(x, row, start, tokens, l1, r1: tl.constexpr, R1: tl.constexpr, DEPTH: tl.constexpr):
    """x[row, start : start + DEPTH, :] of x (tokens, l1, r1), 0 outside: (rows, DEPTH, R1)."""
    n = tl.arange(0, DEPTH * R1)
    if r1 == R1:
        at = start * r1 + n  # one run of memory
        inside = at < l1 * r1
    else:
        at = (start + n // R1) * r1 + n % R1
        inside = (start + n // R1 < l1) & (n % R1 < r1)
    xs = tl.load(x + row[:, None] * (l1 * r1) + at[None, :], mask=(row[:, None] < tokens) & inside[None, :], other=0.0)
    return tl.reshape(xs, (row.shape[0], DEPTH, R1))


def _load_a(a, k, i, start, l0, l1, DEPTH: tl.constexpr):
    """a[k, i, start : start + DEPTH] of a (terms, l0, l1), transposed: (DEPTH, columns)."""
    p = start + tl.arange(0, DEPTH)
    row = (k * l0 + i).to(tl.int64)
    return tl.load(a + row[None, :] * l1 + p[:, None], mask=(i[None, :] < l0) & (p[:, None] < l1), other=0.0)


def _load_b(b, k, r0: tl.constexpr, r1: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr):
    """b[k] of b (terms, r0, r1), transposed, in float32: (R1, R0)."""
    q, j = tl.arange(0, R1)[:, None], tl.arange(0, R0)[None, :]
    return tl.load(b + (k * r0 + j) * r1 + q, mask=(q < r1) & (j < r0), other=0.0).to(tl.float32)


def _kronecker(
    x, a, b, bias, y, tokens, terms, l0, l1, r0: tl.constexpr, r1: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr,
    BIAS: tl.constexpr, LEFT_FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y[t, i, j] for ROWS tokens, COLUMNS values of i and every j; intermediate results in registers."""
    tiles, columns = tl.cdiv(tokens, ROWS), tl.cdiv(l0, COLUMNS)
    program = tl.program_id(0)
    # programs that run together share x and a in L2
    tile, column = tl.swizzle2d(program // columns, program % columns, tiles, columns, 8)
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    i = column * COLUMNS + tl.arange(0, COLUMNS)
    if LEFT_FIRST:
        total = tl.zeros((ROWS, COLUMNS, R0), tl.float32)
        for k in range(terms):
            z = tl.zeros((ROWS * R1, COLUMNS), tl.float32)
            for start in range(0, l1, DEPTH):
                xs = tl.permute(_load_x(x, row, start, tokens, l1, r1, R1, DEPTH), (0, 2, 1))  # (ROWS, R1, DEPTH)
                xs = tl.reshape(xs, (ROWS * R1, DEPTH))
                z = _dot(xs, _load_a(a, k, i, start, l0, l1, DEPTH), z)
            z = tl.reshape(z, (ROWS, R1, COLUMNS))[:, :, :, None]
            total += tl.sum(z * _load_b(b, k, r0, r1, R0, R1)[None, :, None, :], axis=1)  # q summed
    else:
        total = tl.zeros((ROWS * R0, COLUMNS), tl.float32)
        for start in range(0, l1, DEPTH):
            xs = _load_x(x, row, start, tokens, l1, r1, R1, DEPTH)[:, :, :, None]  # (ROWS, DEPTH, R1, 1)
            for k in range(terms):
                z = tl.sum(xs * _load_b(b, k, r0, r1, R0, R1)[None, None, :, :], axis=2)  # (ROWS, DEPTH, R0), q summed
                z = tl.reshape(tl.permute(z, (0, 2, 1)), (ROWS * R0, DEPTH)).to(x.dtype.element_ty)
                total = _dot(z, _load_a(a, k, i, start, l0, l1, DEPTH), total)
        total = tl.permute(tl.reshape(total, (ROWS, R0, COLUMNS)), (0, 2, 1))  # (ROWS, COLUMNS, R0)
    total = tl.reshape(total, (ROWS, COLUMNS * R0))
    n = tl.arange(0, COLUMNS * R0)
    at = column * COLUMNS * r0 + (n if r0 == R0 else n // R0 * r0 + n % R0)
    inside = (column * COLUMNS + n // R0 < l0) & (n % R0 < r0)
    if BIAS:
        total += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    inside = (row[:, None] < tokens) & inside[None, :]
    tl.store(y + row[:, None] * (l0 * r0) + at[None, :], total.to(y.dtype.element_ty), mask=inside)


def run_low_rank(x, left, right, bias):
    """x (tokens, in), left (out, rank), right (rank, in) -> (tokens, out); tokens at most MOST_TOKENS."""
    (tokens, width), (out, rank) = x.shape, left.shape
    t = _tiles(x)
    rows = triton.cdiv(tokens, t.rows)
    z, y = x.new_empty(tokens, rank), x.new_empty(tokens, out)
    grid = (rows * (triton.cdiv(rank, t.columns) + triton.cdiv(out, t.columns)),)
    operands = (x, right, left, bias, z, y, _counters(x.device), tokens, width, rank, out)
    with torch.cuda.device_of(x):
        _low_rank[grid](*operands, bias is not None, *t[:3], num_warps=t.warps, num_stages=t.stages)
    return y


def run_kronecker(x, left, right, bias):
    """x (tokens, l1*r1), left (terms, l0, l1), right (terms, r0, r1) -> (tokens, l0*r0)."""
    tokens, (terms, l0, l1), (r0, r1) = len(x), left.shape, right.shape[1:]
    R0, R1 = triton.next_power_of_2(r0), triton.next_power_of_2(r1)
    t = _kronecker_tiles(x, l1, R0, R1, r1 <= r0)
    y, grid = x.new_empty(tokens, l0 * r0), (triton.cdiv(tokens, t.rows) * triton.cdiv(l0, t.columns),)
    operands = (x, left, right, bias, y, tokens, terms, l0, l1, r0, r1, R0, R1, bias is not None, r1 <= r0)
    with torch.cuda.device_of(x):
        _kronecker[grid](*operands, *t[:3], num_warps=t.warps, num_stages=t.stages)
    return y


def _tiles(x):
    """By the number of tokens; what is in flight fits into shared memory (227 KB on an H100)."""
    few, many = len(x) <= DECODE.rows, len(x) > MIDDLE.rows and x.element_size() == 2
    tiles = DECODE if few else PREFILL if many else MIDDLE
    return tiles._replace(depth=tiles.depth * 2 // x.element_size())


def _kronecker_tiles(x, l1, R0, R1, left_first):
    """Tiles whose `rows` are tokens: a product has a row for each token and column (or row) of the right factor."""
    t, side, few = _tiles(x), R1 if left_first else R0, len(x) <= DECODE.rows
    rows = max(16 // side, triton.next_power_of_2(len(x)) if few else t.rows // side)  # a product needs 16 rows
    depth = max(16, min(t.depth, triton.next_power_of_2(l1), t.rows * t.depth // (rows * side)))
    columns, most = t.columns, 4096 * t.warps // (R0 * R1)  # numbers in registers while q is summed
    while rows * (columns if left_first else depth) > most and max(rows * side, columns if left_first else depth) > 16:
        if left_first and columns > 16:
            columns //= 2
        elif not left_first and depth > 16:
            depth //= 2
        else:
            rows //= 2
    return Tiles(rows, columns, depth, t.warps, t.stages)


def _counters(device):
    """Zeros, as every launch leaves them: one buffer a stream, and one of its own in a CUDA graph, which may run beside others."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    if stream is not None and torch.cuda.is_current_stream_capturing():
        return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    if (device, stream) not in _kept:
        _kept[device, stream] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _kept[device, stream]
