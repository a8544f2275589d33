"""Carrying out a plan: one small matrix after the other, each times a batch of blocks of the tokens' state.

Tokens go through the whole chain in groups whose largest intermediate result stays in the cache. Training keeps of the
intermediate results those that are no larger than the input, and the others if all of them are fewer numbers than the
factors save against the dense weight; else these are computed again. So what a call holds, factors included, is never more
than a dense weight, beside x and results of no more than its size, and of no more than TINY numbers each.
"""

import itertools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from tnlib.links import Apart, Link, Turn, apply_link, few_grads, in_rows, matrix_grad, state_grad
from tnlib.one_token import steps_for_one

# Bytes of the largest intermediate result of a group of tokens, by timing 0.5 to 1000 MiB at 4,096 tokens. Where arithmetic is
# cheap beside it, what the caches hold; else less than what the system hands out as fresh pages, and takes back, at every call.
GROUP = 2 << 20
LARGE_GROUP = 32 << 20
CHEAP = 256  # FLOPs for each number of the largest intermediate result
TINY = 1 << 18  # numbers of an intermediate result up to which torch's own backward pass, in C++, is quicker, by timing
GROUP_ELSEWHERE = 256 << 20  # on an accelerator, where many tokens at once are worth more


class Chain:
    """Links, Terms, Aparts and Turns.

    sizes: numbers that a token has before, between and after them
    spare: numbers that the factors, and what was merged of them, save against the dense weight
    """

    def __init__(self, links, sizes, spare=0):
        self.links, self.sizes, self.spare = links, sizes, spare
        self.matrices = [link.matrix for link in links if not isinstance(link, Turn)]
        self.widest = max(sizes[1:-1], default=0)

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
            x = apply_link(link, x)
        x = x.view(-1, self.sizes[-1])
        return x if bias is None else x.add_(bias)

    def prepared(self, tokens):
        """`at_once` for calls with up to so many tokens, as a function of them and the bias: for one, all that can be done before is."""
        if len(self.links) == 1:
            matrix = self.matrices[0]
            return lambda x, bias=None: F.linear(x, matrix, bias)
        if tokens > 1:
            return self.at_once
        steps = steps_for_one(self.links, self.sizes)

        def once(x, bias=None):
            for step in steps:
                x = step(x)
            x = x.view(1, -1)
            return x if bias is None else x.add_(bias)

        return once

    def keeps(self, tokens):
        """Whether training keeps each of the intermediate results."""
        between = self.sizes[1:-1]
        larger = tokens * sum(size for size in between if size > self.sizes[0])
        return [size <= self.sizes[0] or larger <= self.spare for size in between]

    def suits_torch(self, tokens):
        """Whether torch's own backward pass keeps no more than the one here, and makes nothing large of its own."""
        plain = all(in_rows(link) or few_grads(link) for link in self.links if isinstance(link, Link))
        plain = plain and not any(isinstance(link, Apart) for link in self.links)  # it copies the gradient of x there
        return tokens * self.widest <= TINY or (plain and all(self.keeps(tokens)))

    def _flops(self):
        """Of one token."""
        links = zip(self.sizes, self.links)
        return sum(2 * size * link.matrix.shape[-2] for size, link in links if not isinstance(link, Turn))

    def bare(self):
        """All but the matrices: what has no part in an autograd graph."""
        links = [link if isinstance(link, Turn) else link._replace(matrix=None) for link in self.links]
        return links, self.sizes, self.spare

    @classmethod
    def filled(cls, bare, matrices):
        """The Chain again."""
        given, (links, *rest) = iter(matrices), bare
        return cls([link if isinstance(link, Turn) else link._replace(matrix=next(given)) for link in links], *rest)


def run(x, chain, bias=None, between=None):
    """x (tokens, in) through a Chain, plus bias: (tokens, out).

    between: a function of (state, number of the link), applied to what every link but the last gives
    Exact: with one link, x @ matrix.T + bias; what is kept for the backward pass beside x: intermediate results no larger
        than x, and others if all of them together have no more numbers than `chain.spare`.
    """
    if len(chain.links) == 1:
        return F.linear(x, chain.matrices[0], bias)
    x = x.contiguous()
    through = _plain if torch.compiler.is_compiling() else _recorded
    if between is None:
        return through(x, chain, bias)
    count = 0
    for link, sizes in zip(chain.links, itertools.pairwise(chain.sizes)):
        x = through(x, Chain([link], sizes))  # (tokens, size)
        if not isinstance(link, Turn):
            count += 1
            x = between(x, count - 1) if count < len(chain.matrices) else x
    return x if bias is None else x + bias


def _plain(x, chain, bias=None):
    """By torch's own operations and their own gradients."""
    for link in chain.links:
        x = apply_link(link, x, plain=True)
    x = x.reshape(-1, chain.sizes[-1])
    return x if bias is None else x + bias


def _recorded(x, chain, bias=None):
    """The chain as one operation of the autograd graph, where there is one."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *chain.matrices)):
        if chain.suits_torch(x.shape[0]):
            return _plain(x, chain, bias)
        return _Chain.apply(chain.bare(), x, bias, *chain.matrices)
    return _forward(x, chain, bias)


class _Chain(torch.autograd.Function):
    """`run` with a backward pass of its own: torch's, for a matrix that many blocks share, makes a copy of it per block."""

    @staticmethod
    def forward(ctx, bare, x, bias, *matrices):
        ctx.bare, chain, tokens = bare, Chain.filled(bare, matrices), x.shape[0]
        states = [x.new_empty(tokens, size) if kept else None for size, kept in zip(chain.sizes[1:-1], chain.keeps(tokens))]
        y = _forward(x, chain, bias, states)
        ctx.save_for_backward(x, *matrices, *(state for state in states if state is not None))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        wants_x, wants_bias, *wants = ctx.needs_input_grad[1:]
        x, *saved = ctx.saved_tensors
        chain, states = Chain.filled(ctx.bare, saved[: len(wants)]), iter(saved[len(wants) :])
        states = [next(states) if kept else None for kept in chain.keeps(x.shape[0])]
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
            state = apply_link(link, state, None if place is None else place[group])
        if bias is not None:
            y[group] += bias
    return y


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
        before.append(apply_link(link, before[-1]) if state is None else state)
    for at in range(len(before) - 1, -1, -1):
        link, seen = chain.links[at], before.pop()
        if not isinstance(link, Turn):
            number -= 1
            if wants[number]:
                totals[number] = matrix_grad(link, grad, seen, totals[number])
        if at or wants_x:
            grad = state_grad(link, grad, None if at else gx)
    return grad.view(x.shape) if wants_x else None, totals
