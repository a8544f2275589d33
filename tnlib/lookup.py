"""Rows of a weight held as factors: gather from each (merged) core what a row needs, and multiply; the weight is never built."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tnlib.contract import Copy, Plan, Product, is_view, last_bond, merge_sized, merge_steps, merged_shape

BLOCK = 2 << 20  # bytes gathered for a block of tokens, by timing 0.5 to 4 MiB and all at once: 4,096 rows of rank 64 go 3 times as quick


class Table(NamedTuple):
    """A core (r, o, i, s) by output mode: row j is what an id whose digit is j needs."""

    entries: torch.Tensor  # (o, r*i*s)
    size: tuple  # (r, o, i, s)


def tables(cores, groups):
    """The Tables of cores (r, o, i, s), neighbors merged as `groups` says."""
    return [_table(cores[first:end]) for first, end in groups]


def _table(cores):
    """The Table of neighbors merged; what their last product gives is brought into order once."""
    if len(cores) == 1:
        return Table(cores[0].transpose(0, 1).flatten(1), tuple(cores[0].shape))
    sizes = tuple([tuple(core.shape) for core in cores])
    at = last_bond(sizes)
    left, (r, o, i, bond) = merge_sized(cores[:at], sizes[:at])
    right, (_, p, j, s) = merge_sized(cores[at:], sizes[at:])
    product = left.reshape(r * o * i, bond) @ right.reshape(bond, p * j * s)
    entries = product.view(r, o, i, p, j * s).permute(1, 3, 0, 2, 4).reshape(o * p, -1)  # (o*p, r*i*j*s)
    return Table(entries, (r, o * p, i * j, s))


def look_up(ids, tables):
    """Rows `ids` (tokens,) of the weight that the Tables stand for: (tokens, in). Without gradients, a block of tokens at a time.

    Exact: equals the weight's rows, to rounding.
    """
    if len(tables) == 2 and tables[0].size[1] == tables[1].size[2] == 1:  # low rank: all rows share the first core
        shared, own = tables
        return F.embedding(ids, own.entries) @ shared.entries.view(shared.size[2], shared.size[3]).t()
    if torch.compiler.is_compiling() or (blocks := _blocks(ids, tables)) <= 1:
        return _rows(ids, tables)
    found = tables[0].entries.new_empty(len(ids), math.prod(table.size[2] for table in tables))
    for some, place in zip(ids.chunk(blocks), found.chunk(blocks)):
        _rows(some, tables, place)
    return found


def _blocks(ids, tables):
    """In how many blocks to gather, so that each stays in the cache; one where results cannot be written where they belong."""
    if not ids.is_cpu or len(tables) == 1 or torch.is_autocast_enabled("cpu"):
        return 1
    if torch.is_grad_enabled() and any(table.entries.requires_grad for table in tables):
        return 1
    entries = tables[0].entries
    return -(-len(ids) * sum(table.entries.shape[1] for table in tables) * entries.element_size() // BLOCK)


def _rows(ids, tables, out=None):
    """`look_up` of all at once; out (tokens, in): where to write, for two Tables and more."""
    below, row = math.prod([table.size[1] for table in tables]), None
    count = ids.shape[0]  # len() would be a constant of an exported graph
    for at, (entries, (r, o, i, s)) in enumerate(tables):
        below //= o
        digit = ids // below if below > 1 else ids
        digit = digit % o if at else digit
        piece = F.embedding(digit, entries).view(count, r, i * s)
        if row is None:
            row = piece
        elif out is not None and at == len(tables) - 1:
            return torch.bmm(row, piece, out=out.view(count, -1, i * s))
        else:
            row = row @ piece
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
