"""Steps of a chain for a single token, prepared: views of the matrices are made once, and nothing is asked when they are called.

A small layer's products take about as long as what Python does between them: this takes a third off a call.
"""

from functools import partial

import torch

from tnlib.links import MANY, Link, Terms, Turn, apply_link, in_rows, is_thin, product, side_by_side


def steps_for_one(links, sizes):
    """Functions of the state before each link that give the state after it; sizes: of the states, see chain.Chain.

    Exact: what apply_link gives for one token, in any shape.
    """
    return [_step(link, numbers) for link, numbers in zip(links, sizes)]


def _step(link, numbers):
    if isinstance(link, Turn):
        size = -1, link.rows, link.columns
        return lambda state: state.view(size).mT.contiguous()
    if isinstance(link, Terms):
        return _sum(*link)
    if not isinstance(link, Link) or numbers > MANY:
        return partial(apply_link, link)
    return _product(link, numbers)


def _product(link, numbers):
    matrix, width, turned_in, turned_out = link
    (m, k), turned = matrix.shape, matrix.t()
    count = numbers // (k * width)
    if in_rows(link):
        return lambda state: torch.mm(state.view(-1, k), turned)
    if count == 1 and turned_in:
        return lambda state: torch.mm(matrix, state.view(width, k).t())
    if count == 1 and turned_out:
        return lambda state: torch.mm(state.view(k, width).t(), turned)
    if count == 1 and is_thin(matrix, width):
        return lambda state: product(matrix, state.view(k, width))
    if count == 1:
        return lambda state: torch.mm(matrix, state.view(k, width))
    if turned_in or turned_out or side_by_side(m, k, width, count):
        return partial(apply_link, link)
    shared = matrix.expand(count, m, k)
    return lambda state: torch.bmm(shared, state.view(count, k, width))


def _sum(matrix, width, last):
    (k, _, n), turned = matrix.shape, matrix.mT
    if last:
        return lambda state: torch.bmm(state.view(k, width, n), turned).sum(0)
    return lambda state: torch.bmm(matrix, state.view(n, k, width).transpose(0, 1)).sum(0)
