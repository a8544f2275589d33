"""Rows of a weight held as factors: gather from each (merged) core what a row needs, and multiply; the weight is never built."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tnlib.contract import Copy, Plan, Product, is_view, merge, merge_steps, merged_shape


class Table(NamedTuple):
    """A core (r, o, i, s) by output mode: row j is what an id whose digit is j needs."""

    entries: torch.Tensor  # (o, r*i*s)
    size: tuple  # (r, o, i, s)


def tables(cores, groups):
    """The Tables of cores (r, o, i, s), neighbors merged as `groups` says."""
    merged = [merge(cores[first:end]) for first, end in groups]
    return [Table(core.transpose(0, 1).flatten(1), tuple(core.shape)) for core in merged]


def look_up(ids, tables):
    """Rows `ids` (tokens,) of the weight that the Tables stand for: (tokens, in).

    Exact: equals the weight's rows, to rounding.
    """
    if len(tables) == 2 and tables[0].size[1] == tables[1].size[2] == 1:  # low rank: all rows share the first core
        shared, own = tables
        return F.embedding(ids, own.entries) @ shared.entries.view(shared.size[2], shared.size[3]).t()
    count = ids.shape[0]  # len() would be a constant of an exported graph
    below, row = math.prod([table.size[1] for table in tables]), None
    for at, (entries, (r, o, i, s)) in enumerate(tables):
        below //= o
        digit = ids // below if below > 1 else ids
        digit = digit % o if at else digit
        piece = F.embedding(digit, entries).view(count, r, i * s)
        row = piece if row is None else row @ piece
        row = row.reshape(count, -1, s)  # (tokens, inputs done, s)
    return row.reshape(count, -1)


@lru_cache(maxsize=4096)
def row_plans_of(form, shape, tokens):
    """Every plan to look up `tokens` rows of a resolved form's weight."""
    factors = {name: torch.empty(size, device="meta") for name, size in form.factor_shapes(shape).items()}
    cores = form.paired(factors)
    return tuple(_priced(name, groups, cores, factors.values(), tokens) for name, groups in form.row_groups(shape))


def _priced(name, groups, cores, factors, tokens):
    build, run, held, done = [], [], 0, 1
    for first, end in groups:
        shapes = tuple(tuple(core.shape) for core in cores[first:end])
        build += merge_steps(shapes)
        r, o, i, s = merged_shape(shapes)
        if end - first > 1 or not is_view(cores[first].transpose(0, 1).reshape(o, -1), factors):
            held += r * o * i * s
            build += [Copy(r * o * i * s)] * (end - first == 1)
        run.append(Copy(tokens * r * i * s))
        if done > 1:
            run.append(Product(done, r, i * s, tokens, shared=False))
        done *= i
    return Plan(name, tuple(groups), True, False, False, tuple(build), tuple(run), held)
