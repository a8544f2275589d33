"""Carrying out a plan: one small matrix after the other, each times a batch of blocks of the tokens' state.

Tokens go through the whole chain in groups whose largest intermediate result stays in the cache. Training keeps of the
intermediate results only those that are no larger than the input, and computes the others again.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Bytes of the largest intermediate result of a group of tokens, by timing 0.5 to 1000 MiB at 4,096 tokens. Where arithmetic is
# cheap beside it, what the caches hold; else less than what the system hands out as fresh pages, and takes back, at every call.
GROUP = 2 << 20
LARGE_GROUP = 32 << 20
CHEAP = 256  # FLOPs for each number of the largest intermediate result
FEW = 4  # entries of a matrix for which a product is slower than one operation an entry
TINY = 1 << 14  # numbers of an intermediate result below which torch's own backward pass, in C++, is quicker than the one here
GROUP_ELSEWHERE = 256 << 20  # on an accelerator, where many tokens at once are worth more


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


class Chain:
    """Links and Turns for tokens of `width` numbers."""

    def __init__(self, links, width, sizes=None):
        self.links = links
        self.matrices = [link.matrix for link in links if isinstance(link, Link)]
        self.sizes = sizes or _sizes(links, width)  # numbers a token has before, between and after the links
        self.widest = max(self.sizes[1:-1], default=0)

    def groups(self, x):
        """Slices of the tokens, of about equal sizes; one for all if they are few."""
        tokens, size = x.shape[0], self.widest * x.element_size()
        if self.one_group(tokens, x):
            return [slice(0, tokens)]
        limit = GROUP_ELSEWHERE
        if x.device.type == "cpu":
            limit = GROUP if self._flops() < CHEAP * self.widest else LARGE_GROUP
        count = -(-tokens * size // limit)
        step = -(-tokens // count)
        return [slice(start, start + step) for start in range(0, tokens, step)]

    def one_group(self, tokens, like):
        """Whether so many tokens are few enough to go through together, whatever the device."""
        return tokens * self.widest * like.element_size() <= GROUP

    def at_once(self, x, bias=None):
        """`run` of contiguous tokens that are one group, without gradients and without looking at either."""
        for link in self.links:
            x = _apply(link, x)
        x = x.view(-1, self.sizes[-1])
        return x if bias is None else x.add_(bias)

    def _flops(self):
        """Of one token."""
        links = zip(self.sizes, self.links)
        return sum(2 * size * link.matrix.shape[0] for size, link in links if isinstance(link, Link))

    def bare(self):
        """The links without their matrices, and the sizes: what has no part in an autograd graph."""
        return [link if isinstance(link, Turn) else link._replace(matrix=None) for link in self.links], self.sizes

    @classmethod
    def filled(cls, bare, matrices):
        """The Chain again."""
        given, (links, sizes) = iter(matrices), bare
        links = [link if isinstance(link, Turn) else link._replace(matrix=next(given)) for link in links]
        return cls(links, sizes[0], sizes)


def _sizes(links, width):
    sizes = [width]
    for link in links:
        m, k = (1, 1) if isinstance(link, Turn) else link.matrix.shape
        sizes.append(sizes[-1] // k * m)
    return sizes


def run(x, chain, bias=None, between=None):
    """x (tokens, in) through a Chain, plus bias: (tokens, out).

    between: a function of (state, number of the link), applied to what every link but the last gives
    Exact: with one link, x @ matrix.T + bias; intermediate results kept for the backward pass are no larger than x.
    """
    if len(chain.links) == 1:
        return F.linear(x, chain.matrices[0], bias)
    x = x.contiguous()
    if torch.compiler.is_compiling():
        return _plain(x, chain, bias)
    if between is None:
        return _recorded(x, chain, bias)
    count = 0
    for link in chain.links:
        x = _recorded(x, Chain([link], x.shape[1]))  # (tokens, size)
        if isinstance(link, Link):
            count += 1
            x = between(x, count - 1) if count < len(chain.matrices) else x
    return x if bias is None else x + bias


def _plain(x, chain, bias):
    """By torch's own operations and their own gradients."""
    for link in chain.links:
        x = _apply(link, x, plain=True)
    x = x.reshape(-1, chain.sizes[-1])
    return x if bias is None else x + bias


def _recorded(x, chain, bias=None):
    """The chain as one operation of the autograd graph, where there is one."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *chain.matrices)):
        if x.shape[0] * chain.widest <= TINY:
            return _plain(x, chain, bias)
        return _Chain.apply(chain.bare(), x, bias, *chain.matrices)
    return _forward(x, chain, bias)


class _Chain(torch.autograd.Function):
    """`run` with a backward pass of its own: torch's, for a matrix that many blocks share, makes a copy of it per block."""

    @staticmethod
    def forward(ctx, bare, x, bias, *matrices):
        ctx.bare, (tokens, width) = bare, x.shape
        states = [x.new_empty(tokens, size) if size <= width else None for size in bare[1][1:-1]]
        y = _forward(x, Chain.filled(bare, matrices), bias, states)
        ctx.save_for_backward(x, *matrices, *(state for state in states if state is not None))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        wants_x, wants_bias, *wants = ctx.needs_input_grad[1:]
        x, *saved = ctx.saved_tensors
        kept, width = iter(saved[len(wants) :]), x.shape[1]
        states = [next(kept) if size <= width else None for size in ctx.bare[1][1:-1]]
        chain = Chain.filled(ctx.bare, saved[: len(wants)])
        gx, gradients = _backward(x, chain, states, grad.contiguous(), wants_x, wants)
        return None, gx, grad.sum(0) if wants_bias else None, *gradients


def _forward(x, chain, bias=None, states=None):
    """y (tokens, out); `states`: for each intermediate result a tensor (tokens, size) to fill, or None."""
    groups, out = chain.groups(x), chain.sizes[-1]
    if len(groups) == 1 and not (states and any(state is not None for state in states)):
        return chain.at_once(x, bias)
    y = x.new_empty(x.shape[0], out)
    places = [*(states or [None] * (len(chain.links) - 1)), y]
    for group in groups:
        state = x[group]
        for link, place in zip(chain.links, places):
            state = _apply(link, state, None if place is None else place[group])
        if bias is not None:
            y[group] += bias
    return y


def _apply(link, state, out=None, plain=False):
    """One link or turn. The state before and after is a contiguous tensor of any shape, its numbers in the order of the tokens."""
    if isinstance(link, Turn):
        turned = state.view(-1, link.rows, link.columns).mT
        return turned.contiguous() if out is None else out.view(turned.shape).copy_(turned)
    matrix, width, turned_in, turned_out = link
    m, k = matrix.shape
    if width == 1 or (turned_in and turned_out):
        rows = state.view(-1, k)
        if k == 1 and m <= FEW and rows.shape[0] > TINY and not plain:
            return _spread(rows[:, 0], matrix[:, 0], out)
        return torch.mm(rows, matrix.t()) if out is None else torch.mm(rows, matrix.t(), out=out.view(-1, m))
    blocks = state.view(-1, width, k).mT if turned_in else state.view(-1, k, width)
    count = blocks.shape[0]
    if turned_out:
        shape, pair = (count, width, m), (blocks.mT, matrix.t().expand(count, k, m))
    else:
        shape, pair = (count, m, width), (matrix.expand(count, m, k), blocks)
    return torch.bmm(*pair) if out is None else torch.bmm(*pair, out=out.view(shape))


def _spread(numbers, factors, out):
    """Each number times each of a few factors, (n,), (m,) -> (n, m): a column at a time is twice as fast as a product."""
    out = numbers.new_empty(numbers.shape[0], factors.shape[0]) if out is None else out.view(-1, factors.shape[0])
    for column, factor in zip(out.unbind(1), factors.unbind(0)):
        torch.mul(numbers, factor, out=column)
    return out


def _backward(x, chain, states, grad, wants_x, wants):
    """Gradients of x (or None) and of the matrices (None where not wanted), group by group."""
    groups, totals = chain.groups(x), [None] * len(wants)
    if len(groups) == 1:
        return _group_backward(x, chain, states, grad, wants_x, wants, totals)
    gx = torch.empty_like(x) if wants_x else None
    if x.dtype in (torch.float16, torch.bfloat16):  # many small sums: in float32
        totals = [torch.zeros(matrix.shape, device=x.device) for matrix in chain.matrices]
    for group in groups:
        held = [None if state is None else state[group] for state in states]
        place = gx[group] if wants_x else None
        _, totals = _group_backward(x[group], chain, held, grad[group], wants_x, wants, totals, place)
    return gx, [total.to(x.dtype) if want else None for total, want in zip(totals, wants)]


def _group_backward(x, chain, states, grad, wants_x, wants, totals, gx=None):
    """The same for one group of tokens; to `totals` its share is added, in `gx` it is written."""
    before, totals, number = [x], list(totals), len(wants)  # what each link saw
    for link, state in zip(chain.links[:-1], states):
        before.append(_apply(link, before[-1]) if state is None else state)
    for at in range(len(before) - 1, -1, -1):
        link, seen = chain.links[at], before.pop()
        if isinstance(link, Link):
            number -= 1
            if wants[number]:
                totals[number] = _matrix_grad(link, grad, seen, totals[number])
        if at or wants_x:
            grad = _apply(_transposed(link), grad, None if at else gx)
    return grad.view(x.shape) if wants_x else None, totals


def _transposed(link):
    """The link that takes gradients back."""
    if isinstance(link, Turn):
        return Turn(link.columns, link.rows)
    return Link(link.matrix.t(), link.width, link.turned_out, link.turned_in)


def _matrix_grad(link, grad, seen, total):
    """total (m, k), or nothing, plus the sum of grad (m, width) times seen (k, width) transposed over all blocks."""
    matrix, width, turned_in, turned_out = link
    m, k = matrix.shape
    if not (turned_in and turned_out) and width > 1:
        g = grad.view(-1, width, m) if turned_out else grad.view(-1, m, width).mT  # (blocks, width, m)
        s = seen.view(-1, width, k) if turned_in else seen.view(-1, k, width).mT  # (blocks, width, k)
        if m * k <= (m + k) * width:
            found = torch.bmm(g.mT, s).sum(0)
            return found if total is None else total.add_(found)
        grad, seen = g.reshape(-1, m), s.reshape(-1, k)
    g, s = grad.view(-1, m), seen.view(-1, k)
    if m * k <= FEW and total is None and g.dtype in (torch.float32, torch.float64):
        return torch.stack([torch.stack([torch.dot(a, b) for b in s.unbind(1)]) for a in g.unbind(1)])
    if total is None:  # in the layout of the matrix, which is that of the factor
        return torch.mm(g.t(), s) if matrix.stride(1) == 1 else torch.mm(s.t(), g).t()
    return total.addmm_(g.t(), s) if total.dtype == g.dtype else total.add_(torch.mm(g.t(), s))
