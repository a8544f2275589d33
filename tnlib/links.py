"""One step of a chain: a small matrix times a batch of blocks of the tokens' state, and the gradients of that."""

from typing import NamedTuple

import torch

FEW = 4  # entries of a matrix for which a product is slower than one operation an entry
MANY = 1 << 14  # rows from which on it is


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


def apply_link(link, state, out=None, plain=False):
    """One link or turn. The state before and after is a contiguous tensor of any shape, its numbers in the order of the tokens."""
    if isinstance(link, Turn):
        turned = state.view(-1, link.rows, link.columns).mT
        return turned.contiguous() if out is None else out.view(turned.shape).copy_(turned)
    matrix, width, turned_in, turned_out = link
    m, k = matrix.shape
    if in_rows(link):
        rows = state.view(-1, k)
        if k == 1 and m <= FEW and rows.shape[0] > MANY and not plain:
            return _spread(rows[:, 0], matrix[:, 0], out)
        return torch.mm(rows, matrix.t()) if out is None else torch.mm(rows, matrix.t(), out=out.view(-1, m))
    blocks = state.view(-1, width, k).mT if turned_in else state.view(-1, k, width)
    count = blocks.shape[0]
    if turned_out:
        shape, pair = (count, width, m), (blocks.mT, matrix.t().expand(count, k, m))
    else:
        shape, pair = (count, m, width), (matrix.expand(count, m, k), blocks)
    return torch.bmm(*pair) if out is None else torch.bmm(*pair, out=out.view(shape))


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


def transposed(link):
    """The link that takes gradients back."""
    if isinstance(link, Turn):
        return Turn(link.columns, link.rows)
    return Link(link.matrix.t(), link.width, link.turned_out, link.turned_in)


def matrix_grad(link, grad, seen, total):
    """total (m, k), or nothing, plus the sum of grad (m, width) times seen (k, width) transposed over all blocks."""
    matrix, width, turned_in, turned_out = link
    m, k = matrix.shape
    if not in_rows(link):
        g = grad.view(-1, width, m) if turned_out else grad.view(-1, m, width).mT  # (blocks, width, m)
        s = seen.view(-1, width, k) if turned_in else seen.view(-1, k, width).mT  # (blocks, width, k)
        if few_grads(link):
            found = torch.bmm(g.mT, s).sum(0)
            return found if total is None else total.add_(found)
        grad, seen = g.reshape(-1, m), s.reshape(-1, k)
    g, s = grad.view(-1, m), seen.view(-1, k)
    if m * k <= FEW and total is None and g.dtype in (torch.float32, torch.float64):
        return torch.stack([torch.stack([torch.dot(a, b) for b in s.unbind(1)]) for a in g.unbind(1)])
    if total is None:  # in the layout of the matrix, which is that of the factor
        return torch.mm(g.t(), s) if matrix.stride(1) == 1 else torch.mm(s.t(), g).t()
    return total.addmm_(g.t(), s) if total.dtype == g.dtype else total.add_(torch.mm(g.t(), s))
