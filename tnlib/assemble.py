"""The Chain that carries out a plan: every matrix that it multiplies by, seen in the factors where they lie, merged where it says so.

What does not depend on the factors' numbers is found once a form and shape. Each view costs a call, and another in the backward
pass, so there are as few as there can be.
"""

import math
from functools import lru_cache

import torch

from tnlib.chain import Chain
from tnlib.contract import is_view, merge_sized, merged_shape, moves
from tnlib.links import Turn


def chain_of(form, factors, shape, plan):
    """The Chain that carries out a plan: for factors without batch axes."""
    ways = tuple(plan.groups), plan.forward, plan.turned, plan.by_terms
    if not torch.compiler.is_compiling() and (found := _straight(form, shape, *ways)) is not None:
        taken, sizes, spare = found
        seen = [(move, name and _seen(factors[name], *how)) for move, name, *how in taken]
        return Chain([move if matrix is None else move.link(matrix) for move, matrix in seen], sizes, spare)
    stored, links = None if torch.compiler.is_compiling() else _stored(form, shape), []
    cores = [factors[name] for name, _ in stored] if stored else form.paired(factors)
    each = tuple([size for _, size in stored] if stored else [tuple(core.shape) for core in cores])
    course, sizes, spare = (_find_course if torch.compiler.is_compiling() else _course)(each, *ways)
    merged = [merge_sized(cores[first:end], each[first:end]) for first, end in plan.groups]
    for move, shape, laid in course:
        if isinstance(move, Turn):
            links.append(move)
        else:
            links.append(move.link(_laid(*merged[move.core], move.axes, shape, laid)))
    return Chain(links, sizes, spare)


def _laid(core, size, axes, shape, laid):
    """A core of this size (r, o, i, s), held in any shape, as the matrix of a move."""
    if laid == "as it is":
        return core.reshape(shape)
    if laid == "transposed":
        return core.reshape(shape[::-1]).t()
    return core.reshape(size).permute(axes).reshape(shape)


def _seen(factor, shape, turned):
    return factor.reshape(shape).t() if turned else factor.reshape(shape)


@lru_cache(maxsize=4096)
def _straight(form, shape, *ways):
    """Where each link of a plan finds its matrix among the factors: each view on the way costs a call, and another in the backward pass.

    Returns: a list of (move, name of the factor, shape to see it in, whether to transpose that), `sizes` and `spare` of the
        Chain; None if a matrix is not a factor in another shape
    """
    factors = form._meta(shape)
    cores, taken = form.paired(factors), []
    course, sizes, spare = _course(tuple([tuple(core.shape) for core in cores]), *ways)
    for move, size, _ in course:
        if isinstance(move, Turn):
            taken.append((move, None))
            continue
        first, end = ways[0][move.core]
        if end - first > 1:
            return None
        matrix = cores[first].permute(move.axes).reshape(size)
        name = next((name for name, factor in factors.items() if is_view(matrix, [factor])), None)
        turned = not matrix.is_contiguous()
        if name is None or (turned and not (matrix.dim() == 2 and matrix.t().is_contiguous())):
            return None
        taken.append((move, name, tuple(matrix.t().shape if turned else matrix.shape), turned))
    return taken, sizes, spare


@lru_cache(maxsize=4096)
def _stored(form, shape):
    """(name, size) of the factor that each core is, its numbers in the same order; None if some core is none."""
    factors, found = form._meta(shape), []
    for core in form.paired(factors):
        name = next((name for name, factor in factors.items() if is_view(core, [factor])), None)
        if name is None or not core.is_contiguous():
            return None
        found.append((name, tuple(core.shape)))
    return found


def _find_course(shapes, groups, *ways):
    """What a plan does to cores of these shapes, whatever their numbers.

    Returns: a list of (move, shape of its matrix, how the core is laid for that: "as it is", "transposed" or "permuted"); the
        numbers of a token's state before, between and after; the Chain's `spare`
    """
    merged = [merged_shape(shapes[first:end]) for first, end in groups]
    _, out, width, _ = merged_shape(merged)
    course, sizes = [], [width]
    for move in moves(merged, *ways):
        shape, laid, given = None, None, sizes[-1]
        if not isinstance(move, Turn):
            size = merged[move.core]
            axes = [axis for axis in move.axes if size[axis] > 1]
            shape = move.shape(size)
            laid = "transposed" if len(axes) == len(shape) == 2 and min(shape) > 1 else "permuted"
            laid = "as it is" if axes == sorted(axes) else laid
            given = move.steps(shape, given)[1]
        course.append((move, shape, laid))
        sizes.append(given)
    built = [math.prod(shape) for shape, (first, end) in zip(merged, groups) if end - first > 1]
    numbers = sum(built) + sum(math.prod(shape) for shape in shapes)
    return tuple(course), tuple(sizes), max(0, out * width - numbers)


_course = lru_cache(maxsize=4096)(_find_course)  # a compiled graph warns of a cache
