"""One step of a chain: small matrices times a batch of blocks of the tokens' state, and the gradients of that."""

from typing import NamedTuple

import torch

FEW = 4  # entries of a matrix for which a product is slower than one operation an entry
MANY = 1 << 14  # rows from which on it is
NARROW = 16  # columns of a block below which a batch of products is several times slower than one product
# A product with a few columns, float32, MKL, two AMD cores, by timing 32 x 32 to 3072 x 384 with 2 to 32 columns: where each column, or
# each row of the turned result, lies in one piece, 256 x 256 goes twice as quick, 1536 x 768 two to nine times.
THIN = 8  # columns up to which that holds
LARGE = 1 << 15  # numbers of the matrix from which on the copy is worth it


class Link(NamedTuple):
    """A matrix (m, k) and the blocks (k, width) of the state that it multiplies, each giving (m, width)."""

    matrix: torch.Tensor
    width: int
    turned_in: bool = False  # blocks are held as (width, k)
    turned_out: bool = False  # they are to be given as (width, m)


class Turn(NamedTuple):
    """Blocks (rows, columns) of the state copied as (columns, rows)."""

    rows: int
    columns: int


class Terms(NamedTuple):
    """Matrices (k, m, n), each for a part of the state of its own; what they give is added up.

    They stay where they are: for few tokens the state is less to copy.
    """

    matrix: torch.Tensor
    width: int
    last: bool = False  # blocks (k, width, n) give (width, m); else (n, k, width) give (m, width)


class Apart(NamedTuple):
    """Matrices (k, m, n), each for a part (n,) of a token's state of its own; what they give, (m,) each, stays side by side."""

    matrix: torch.Tensor


def apply_link(link, state, out=None, plain=False):
    """One step. The state before and after is a contiguous tensor of any shape, its numbers in the order of the tokens."""
    if type(link) is not Link:
        return _apply_other(link, state, out, plain)
    matrix, width, turned_in, turned_out = link
    m, k = matrix.shape
    if in_rows(link):
        rows = state.view(-1, k)
        if k == 1 and m <= FEW and rows.shape[0] > MANY and not plain:
            return _spread(rows[:, 0], matrix[:, 0], out)
        return torch.mm(rows, matrix.t()) if out is None else torch.mm(rows, matrix.t(), out=out.view(-1, m))
    if out is None and not (turned_in or turned_out) and _one_block(state, k * width):
        return product(matrix, state.view(k, width))
    count = state.numel() // (k * width)
    if _in_one_product(link, count, state, plain):
        return _side_by_side(link, state, out)
    blocks = state.view(-1, width, k).mT if turned_in else state.view(-1, k, width)
    if turned_out:
        shape, pair = (count, width, m), (blocks.mT, matrix.t().expand(count, k, m))
    else:
        shape, pair = (count, m, width), (matrix.expand(count, m, k), blocks)
    return torch.bmm(*pair) if out is None else torch.bmm(*pair, out=out.view(shape))


def product(matrix, blocks):
    """matrix (m, k) @ blocks (k, columns): contiguous."""
    if not is_thin(matrix, blocks.shape[1]):
        return torch.mm(matrix, blocks)
    if matrix.stride(1) == 1:
        return torch.mm(matrix, blocks.t().contiguous().t())
    return torch.mm(blocks.t(), matrix.t()).t().contiguous()


def is_thin(matrix, columns):
    """Whether a product with so many columns goes quicker when each lies in one piece."""
    return 1 < columns <= THIN and matrix.numel() >= LARGE and matrix.is_cpu


def _one_block(state, numbers):
    """Whether the state is a single block, which is multiplied as it lies; a compiled graph does not ask."""
    return not torch.compiler.is_compiling() and state.numel() == numbers


def _apply_other(link, state, out, plain):
    if isinstance(link, Terms):
        return _add_up(link, state, out)
    if isinstance(link, Apart):
        return _each(link, state, out, plain)
    turned = state.view(-1, link.rows, link.columns).mT
    return turned.contiguous() if out is None else out.view(turned.shape).copy_(turned)


def side_by_side(m, k, width, count):
    """Whether `count` blocks (k, width), copied beside one another for a single product, go quicker than one product each.

    By timing matrices from 64 x 64 to 1024 x 512, 2 to 96 columns and 2 to 1,024 blocks on two x86 cores, MKL, float32: 1.1 to 18
    times quicker where this holds, but for a few cases near its border.
    """
    reuse = m * k / (m + k)  # operations for each number that is copied, halved
    return count == 1 or (reuse >= width * (4 if width < NARROW else 8) and count * reuse >= 256)


def _in_one_product(link, count, state, plain):
    if torch.compiler.is_compiling() or not state.is_cpu:  # a compiled graph asks nothing about the number of tokens
        return False
    if plain and not few_grads(link):  # torch's own backward pass would make a gradient of the matrix for every block
        return True
    return side_by_side(*link.matrix.shape, link.width, count)


def _side_by_side(link, state, out):
    matrix, width, turned_in, turned_out = link
    m, k = matrix.shape
    blocks = _beside(state, k, width, turned_in)  # (k, count*width)
    if turned_out:
        return torch.mm(blocks.t(), matrix.t()) if out is None else torch.mm(blocks.t(), matrix.t(), out=out.view(-1, m))
    y = product(matrix, blocks).view(m, -1, width).transpose(0, 1)  # (count, m, width)
    return y.contiguous() if out is None else out.view(y.shape).copy_(y)


def _beside(state, size, width, turned):
    """All blocks (size, width) of the state beside one another: (size, count*width), a view if they are held turned."""
    if turned or width == 1:
        return state.view(-1, size).t()
    return state.view(-1, size, width).transpose(0, 1).reshape(size, -1)


def _add_up(link, state, out):
    (matrix, width, last), m = link, link.matrix.shape[1]
    parts = _parts(link, state)
    if last:
        y = torch.bmm(parts, matrix.mT).sum(0)  # (tokens*width, m)
    else:
        y = torch.bmm(matrix, parts).sum(0).view(m, -1, width).transpose(0, 1)  # (tokens, m, width)
    return y.contiguous() if out is None else out.view(y.shape).copy_(y)


def _parts(link, state):
    """What each matrix meets: (k, tokens, n) of an Apart; of Terms (k, tokens*width, n) if `last`, else (k, n, tokens*width)."""
    k, _, n = link.matrix.shape
    if isinstance(link, Apart):
        return state.view(-1, k, n).transpose(0, 1)
    if link.last:
        return state.view(-1, k, link.width, n).transpose(0, 1).reshape(k, -1, n)
    return state.view(-1, n, k, link.width).permute(2, 1, 0, 3).reshape(k, n, -1)


def _each(link, state, out, plain):
    parts, (k, m, _) = _parts(link, state), link.matrix.shape
    if plain:
        return torch.bmm(parts, link.matrix.mT).transpose(0, 1).reshape(-1, k * m)
    out = state.new_empty(parts.shape[1], k * m) if out is None else out
    torch.bmm(parts, link.matrix.mT, out=out.view(-1, k, m).transpose(0, 1))  # side by side at once, no copy
    return out


def in_rows(link):
    """Whether all blocks are multiplied at once, as the rows of one product."""
    return link.width == 1 or (link.turned_in and link.turned_out)


def few_grads(link):
    """Whether the matrix's gradients by one block each are fewer numbers than the block and what it gave."""
    m, k = link.matrix.shape
    return m * k <= (m + k) * link.width


def _spread(numbers, factors, out):
    """Each number times each of a few factors, (n,), (m,) -> (n, m): a column at a time is twice as fast as a product."""
    out = numbers.new_empty(numbers.shape[0], factors.shape[0]) if out is None else out.view(-1, factors.shape[0])
    for column, factor in zip(out.unbind(1), factors.unbind(0)):
        torch.mul(numbers, factor, out=column)
    return out


def state_grad(link, grad, out=None):
    """Gradient of the state before a step, from that of the state after it."""
    if isinstance(link, Turn):
        return apply_link(Turn(link.columns, link.rows), grad, out)
    if isinstance(link, Apart):
        return apply_link(Apart(link.matrix.mT), grad, out)
    if isinstance(link, Link):
        return apply_link(Link(link.matrix.t(), link.width, link.turned_out, link.turned_in), grad, out)
    matrix, width, last = link
    k, m, n = matrix.shape
    if last:
        back = torch.matmul(grad.view(-1, m), matrix).view(k, -1, width, n).transpose(0, 1)  # (tokens, k, width, n)
    else:
        g = grad.view(-1, m, width).transpose(0, 1).reshape(m, -1)  # (m, tokens*width)
        back = torch.matmul(matrix.mT, g).view(k, n, -1, width).permute(2, 1, 0, 3)  # (tokens, n, k, width)
    return back.contiguous() if out is None else out.view(back.shape).copy_(back)


def matrix_grad(link, grad, seen, total):
    """total (m, k), or nothing, plus the sum of grad (m, width) times seen (k, width) transposed over all blocks."""
    if not isinstance(link, Link):
        found = _term_grads(link, grad, seen)  # (k, m, n)
        return found if total is None else total.add_(found)
    matrix, width, turned_in, turned_out = link
    m, k = matrix.shape
    if not in_rows(link) and few_grads(link):
        g = grad.view(-1, width, m) if turned_out else grad.view(-1, m, width).mT  # (blocks, width, m)
        s = seen.view(-1, width, k) if turned_in else seen.view(-1, k, width).mT  # (blocks, width, k)
        found = torch.bmm(g.mT, s).sum(0)
        return found if total is None else total.add_(found)
    g, s = _beside(grad, m, width, turned_out), _beside(seen, k, width, turned_in)  # (m, columns), (k, columns)
    if m * k <= FEW and total is None and g.dtype in (torch.float32, torch.float64):
        return torch.stack([torch.stack([torch.dot(a, b) for b in s]) for a in g])
    if total is None:  # in the layout of the matrix, which is that of the factor
        return torch.mm(g, s.t()) if matrix.stride(1) == 1 else torch.mm(s, g.t()).t()
    return total.addmm_(g, s.t()) if total.dtype == g.dtype else total.add_(torch.mm(g, s.t()))


def _term_grads(link, grad, seen):
    """Gradients of the matrices of Terms, or of an Apart: (k, m, n)."""
    (k, m, _), parts = link.matrix.shape, _parts(link, seen)
    if isinstance(link, Apart):
        return torch.bmm(grad.view(-1, k, m).permute(1, 2, 0), parts)
    if link.last:
        return torch.matmul(grad.view(-1, m).t(), parts)
    return torch.matmul(grad.view(-1, m, link.width).transpose(0, 1).reshape(m, -1), parts.mT)
