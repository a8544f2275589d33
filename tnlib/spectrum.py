"""The needed part of a singular value decomposition, and no more.

Every decomposition in tnlib truncates the spectrum of some unfolding that is short one way and long the other. The
eigenvectors of the short side's Gram matrix are all that is needed: m*m*n multiplications for the Gram and m^3 for its
eigenvectors, instead of a full SVD. A Gram squares the matrix and loses half the digits: it is formed in float64, unless
the matrix is large and the cut discards so much that float32 cannot be seen in the error. Where both sides are long and few
triplets are wanted, block Lanczos iteration finds them, and the error that is left is checked between iterations.
"""

from dataclasses import dataclass

import torch

GRAM_LIMIT = 2048  # short side up to which the Gram's eigenvectors are taken: 2048^3 float64 takes about 1 s on 2 cores
SQUARE_LIMIT = 768  # the same in float32 where few triplets are wanted of nearly square matrices: there they cost most
LARGE = 1 << 20  # numbers from which on float32 is tried, 1.3 to 1.8 times as quick: below, digits shall hang on no thread count
DEEP = 0.01  # share of the energy discarded from which on float32 is enough: a relative error of 0.1, known to 1e-4 of it
STRIPS = 256  # short side from which on only the lower triangle of a Gram is formed: 1.2 to 1.6 times as quick
PIECE = 1 << 18  # numbers of the matrix that are held in float64 at a time
KRYLOV_GAIN = 3e-5  # stop when a step lowers the relative error by less than this; what is left out then is about as much
BLOCK = 32  # vectors a step of the iteration adds


@dataclass(frozen=True)
class Truncation:
    """left @ right is the best rank-r approximation of a matrix; see `truncate`."""

    left: torch.Tensor  # (…, m, r)
    right: torch.Tensor  # (…, r, n)
    values: torch.Tensor  # (…, r) singular values kept, float64, descending
    discarded: torch.Tensor  # (…,) squared Frobenius norm of what was cut away, float64
    total: torch.Tensor  # (…,) squared Frobenius norm of the matrix, float64
    orthonormal: str  # "left" or "right": the side whose vectors are orthonormal; the other carries the values

    @property
    def rank(self):
        return self.values.shape[-1]

    def balanced(self):
        """The same product with the singular values shared evenly, so that left and right have equal norms."""
        floor = 1e-7 * self.values.amax(-1, keepdim=True)  # below this a value is rounding: do not divide by its root
        root = torch.where(floor > 0, self.values.clamp_min(floor), 1.0).sqrt().to(self.left.dtype)  # (…, r)
        if self.orthonormal == "left":
            return self.left * root[..., None, :], self.right / root[..., :, None]
        return self.left / root[..., None, :], self.right * root[..., :, None]


def truncate(matrix, max_rank=None, tolerance=0.0):
    """Best low-rank approximation of `matrix` by its leading singular triplets only.

    matrix: (…, m, n), any float dtype (half precisions are computed in float32); leading axes are a batch
    max_rank: most triplets to keep; more than min(m, n) keeps min(m, n)
    tolerance: keep the fewest triplets whose discarded energy is at most tolerance^2 of the total (in a batch: the most any needs)
    Returns: Truncation; the shorter side is orthonormal, so `discarded` is the exact error of left @ right
    Few triplets of a matrix that is long both ways come from an iteration: its relative error is the best one plus less than 1e-4.
    Source: Eckart & Young 1936. Exact when max_rank >= min(m, n): left @ right equals matrix to rounding.
    """
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    m, n = matrix.shape[-2:]
    full = min(m, n)
    rank = full if max_rank is None else min(max_rank, full)
    if not tolerance and _few(matrix, rank):
        found = _krylov(matrix, rank)
        if full > GRAM_LIMIT or bool((found.discarded >= DEEP * found.total).all()):
            return found
    return _exact(matrix, rank, tolerance)


def whole(matrix):
    """All singular vectors of the short side, for those who have a smaller tensor to turn into them than the long side's.

    matrix: (…, m, n), float32 or float64
    Returns: Truncation, of which the short side has the vectors and the other is `matrix` itself, not turned; and the vectors as
    columns (…, short, short). Turned by them it would be what `truncate(matrix)` returns.
    """
    gram = _gram(matrix, None if matrix.numel() >= LARGE else torch.float64)  # any rotation is exact: only their order hangs on it
    vectors, values, total = _leading(gram.double(), gram.shape[-1])
    vectors, none = vectors.to(matrix.dtype), torch.zeros_like(total)
    if matrix.shape[-2] <= matrix.shape[-1]:
        return Truncation(vectors, matrix, values, none, total, "left"), vectors
    return Truncation(matrix, vectors.mT, values, none, total, "right"), vectors


def _few(matrix, rank):
    """Whether iteration is the quicker way: 1.8 to 30 times where the second rule holds, at spectra from flat to i^-0.7.

    Timed with 1024 x 1024, 1024 x 4096 and 1536 x 1536, 10 and 64 triplets, one core; with 1024 x 16384 it can lose.
    """
    short, long = sorted(matrix.shape[-2:])
    if short > GRAM_LIMIT:
        return rank <= short // 8
    return matrix.dtype == torch.float32 and short > SQUARE_LIMIT and long <= 4 * short and rank <= short // 16


def _exact(matrix, rank, tolerance=0.0):
    """By the Gram of the short side."""
    full = min(matrix.shape[-2:])
    if matrix.dtype == torch.float32 and matrix.numel() >= LARGE and rank < full and not tolerance:
        found = _assemble(matrix, *_leading(_gram(matrix), rank))
        if bool((found.discarded >= DEEP * found.total).all()):
            return found
    gram = _gram(matrix, torch.float64)
    return _assemble(matrix, *_leading(gram, rank, tolerance))


def _gram(matrix, dtype=None):
    """Gram matrix of the short side, (…, short, short), its lower triangle; in another dtype by pieces: no second matrix is held."""
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT  # (…, short, long)
    short, pieces = wide.shape[-2], (wide,)
    if dtype not in (None, matrix.dtype):
        pieces = wide.split(max(1024, PIECE // short), -1)
    total = torch.zeros(*wide.shape[:-1], short, dtype=dtype or matrix.dtype, device=wide.device)
    strip = short if short < STRIPS else -(-short // 4)  # four strips have 10 of 16 blocks: the rest mirrors them
    for piece in pieces:
        piece = piece.to(total.dtype)
        for at in range(0, short, strip):
            total[..., at:, at : at + strip] += piece[..., at:, :] @ piece[..., at : at + strip, :].mT
    return total


def _leading(gram, rank, tolerance=0.0):
    """Leading eigenvectors (…, short, rank), roots of their eigenvalues (…, rank), and the trace (…,)."""
    total = gram.diagonal(dim1=-2, dim2=-1).double().sum(-1)
    squares, basis = torch.linalg.eigh(gram)  # of the lower triangle; ascending
    squares = squares.flip(-1).clamp_min(0)
    if tolerance:
        rank = min(rank, _rank_within(squares, total, tolerance))
    return basis[..., -rank:].flip(-1), squares[..., :rank].double().sqrt(), total


def _rank_within(squares, total, tolerance):
    """Fewest leading triplets that leave at most tolerance^2 of the energy; at least 1; the most over the batch."""
    left_over = total[..., None] - squares.cumsum(-1)  # (…, short): energy left after keeping 1, 2, …
    needed = (left_over > tolerance**2 * total[..., None]).sum(-1) + 1
    return int(needed.max().clamp(max=squares.shape[-1]))


def _krylov(matrix, rank):
    """Block Lanczos with full reorthogonalization, until what a step adds no longer shows in the error.

    The basis of the short side grows by BLOCK vectors a step, at the price of one product with the matrix and one with its
    transpose. It holds far more of a flat spectrum than as many steps of subspace iteration, which forget all but the last.
    Source: Golub, Luk & Overton 1981; Musco & Musco 2015 for the start from random vectors.
    """
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT  # (…, short, long)
    generator = torch.Generator(device=matrix.device).manual_seed(0)  # own generator: the caller's stream is not touched
    start = torch.randn(wide.shape[-1], BLOCK, generator=generator, dtype=wide.dtype, device=wide.device)
    total = torch.linalg.vector_norm(wide, dim=-1).double().square().sum(-1)
    batch, short, long = wide.shape[:-2], *wide.shape[-2:]
    basis, images = wide.new_empty(*batch, short // 2, short), wide.new_empty(*batch, short // 2, long)  # pages come when written
    block, gram, misses = _orthonormal(wide @ start), None, []
    for m in range(BLOCK, short // 2 + 1, BLOCK):
        done, seen = basis[..., :m, :], images[..., :m, :]  # (…, m, short), and done @ wide
        done[..., -BLOCK:, :] = block
        image = block @ wide  # (…, BLOCK, long)
        seen[..., -BLOCK:, :] = image
        gram = _bordered(gram, seen @ image.mT)
        if m >= rank + BLOCK:
            misses.append(_missed(torch.linalg.eigvalsh(gram), rank, total))
            if len(misses) > 1 and bool((misses[-2] - misses[-1]).max() < KRYLOV_GAIN):
                turn, values, _ = _leading(gram.double(), rank)
                return _assemble(matrix, (turn.mT.to(wide.dtype) @ done).mT, values, total)
        block = image @ wide.mT
        for _ in range(2):  # once leaves what float32 cannot resolve
            block = _orthonormal((block - (block @ done.mT) @ done).mT)
    return _exact(matrix, rank)  # half of all directions did not suffice


def _orthonormal(columns):
    """Rows (…, k, short) that span the columns (…, short, k)."""
    return torch.linalg.qr(columns).Q.mT


def _bordered(gram, columns):
    """A Gram (…, m, m), or None, with the columns (…, m + k, k) that k more vectors give it."""
    if gram is None:
        return columns
    top, corner = columns[..., : gram.shape[-1], :], columns[..., gram.shape[-1] :, :]
    return torch.cat([torch.cat([gram, top], -1), torch.cat([top.mT, corner], -1)], -2)


def _missed(squares, rank, total):
    """Relative error that the `rank` largest of ascending squares leave."""
    return (1 - squares[..., -rank:].double().sum(-1) / total.clamp_min(1e-300)).clamp_min(0).sqrt()


def _assemble(matrix, basis, values, total):
    """Project onto the orthonormal basis of the short side; the other factor then carries the singular values."""
    basis = basis.to(matrix.dtype)  # (…, short, r)
    whole = basis.shape[-1] == min(matrix.shape[-2:])  # nothing cut: do not report rounding as an error
    discarded = torch.zeros_like(total) if whole else (total - (values**2).sum(-1)).clamp_min(0)
    if matrix.shape[-2] <= matrix.shape[-1]:
        return Truncation(basis, basis.mT @ matrix, values, discarded, total, "left")
    return Truncation(matrix @ basis, basis.mT, values, discarded, total, "right")
