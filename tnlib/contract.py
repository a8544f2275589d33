"""Plans: every way to apply a weight held as factors to tokens, and what each costs.

All forms are one thing here, a train of cores (r, o, i, s): core k takes mode i of the input to mode o of the output, between
its bonds r and s. A low-rank weight has two cores, (1, 1, in, rank) and (rank, out, 1, 1); so has a sum of k Kronecker products,
(1, l0, l1, k) and (k, r0, r1, 1). A plan merges neighbors beforehand and then sweeps over what is left, from either end.
With all of them merged it has the dense weight: "rebuild". Chosen by choose.py, turned into matrices by
assemble.py, carried out by chain.py. Two forms are no trains, and price their plans themselves: block_low_rank.py and tensor_ring.py.
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from tnlib.links import Link, Terms, Turn, side_by_side


@dataclass(frozen=True)
class Product:
    """`batch` matrix products (m, k) @ (k, n)."""

    m: int
    k: int
    n: int
    batch: int = 1
    shared: bool = True  # all have the same (m, k)

    @property
    def flops(self):
        return 2 * self.m * self.k * self.n * self.batch


@dataclass(frozen=True)
class Copy:
    """Numbers read and written again in another order."""

    numbers: int
    run: int = 1  # that stay beside one another
    flops = 0


@dataclass(frozen=True)
class Plan:
    """One way to compute a layer's output, with its costs for the number of tokens that it was planned for."""

    name: str
    groups: tuple  # (first core, one after the last) of each run of cores merged into one
    forward: bool  # sweep from the first core to the last; the other way if False
    turned: bool  # two small cores meet by a copy of the state with its axes exchanged
    by_terms: bool  # what the last core does for each value of its bond is added up
    build: tuple  # Products and Copies that the factors need, whatever the tokens
    run: tuple  # those that the tokens need
    held: int  # numbers to keep if `build` is to be done only once

    @property
    def flops(self):
        """Multiply-adds times two, of building and running."""
        return sum(step.flops for step in (*self.build, *self.run))


class Arrangement(NamedTuple):
    """A plan without costs."""

    name: str
    groups: tuple
    forward: bool = True
    turned: bool = False
    by_terms: bool = False


@lru_cache(maxsize=16384)
def plans_of(form, shape, tokens):
    """Every plan of a resolved form for a weight `shape` (out, in) and `tokens` tokens, the one that rebuilds it last."""
    return form.priced(shape, tokens)


def train_plans(form, shape, tokens):
    """`plans_of` a form that is a train of cores."""
    factors = {name: torch.empty(size, device="meta") for name, size in form.factor_shapes(shape).items()}
    cores = form.paired(factors)
    reordered = [shape[axis == "columns"] for axis in form.reordered]  # sizes of the axes to reorder, for every token
    found = [_priced(arrangement, cores, factors.values(), tokens, reordered) for arrangement in form.arrangements(shape)]
    return (*found, _rebuilding(cores, shape, tokens, len(reordered)))


def _rebuilding(cores, shape, tokens, orders):
    """The plan that merges all cores, puts the weight in order if it has one, and multiplies once."""
    (out, width), groups = shape, ((0, len(cores)),)
    build = [*merge_steps(tuple(tuple(core.shape) for core in cores)), *[Copy(out * width)] * orders]
    return Plan("rebuild", groups, True, False, False, tuple(build), (Product(tokens, width, out),), out * width)


def _priced(arrangement, cores, factors, tokens, reordered):
    name, groups, *course = arrangement
    build, merged = [], []
    for first, end in groups:
        shapes = tuple(tuple(core.shape) for core in cores[first:end])
        build += merge_steps(shapes)
        merged.append(merged_shape(shapes))
    run = [Copy(tokens * size) for size in reordered]
    columns = tokens * math.prod(core[2] for core in merged)  # numbers in the state
    held = 0
    for move in moves(merged, *course):
        if isinstance(move, Turn):
            run.append(Copy(columns))
            continue
        first, end = groups[move.core]
        shape = move.shape(merged[move.core])
        if end - first > 1 or not is_view(cores[first].permute(move.axes).reshape(shape), factors):
            held += math.prod(shape)
            build += [Copy(math.prod(shape))] * (end - first == 1)
        found, columns = move.steps(shape, columns)
        run += found
    return Plan(name, groups, *course, tuple(build), tuple(run), held)


def is_view(matrix, factors):
    """Whether a matrix is one of the factors in another shape, so that it need not be kept."""
    return any(matrix is factor or matrix._base is factor for factor in factors)


class Move(NamedTuple):
    """A core as a matrix, and what it meets; see links.Link."""

    core: int
    axes: tuple  # order of (r, o, i, s): the first two are the matrix's rows, the last two its columns
    width: int
    turned_in: bool = False
    turned_out: bool = False

    def shape(self, size):
        """(m, k) for a core of this size (r, o, i, s)."""
        a, b, c, d = (size[axis] for axis in self.axes)
        return a * b, c * d

    def steps(self, shape, numbers):
        """The Product for a state of so many numbers, the copies around it, and how many numbers it gives."""
        (m, k), columns = shape, numbers // shape[1]
        count = columns // self.width
        if self.width == 1 or (self.turned_in and self.turned_out):
            return [Product(columns, k, m)], columns * m  # the tokens' axis is the outer one
        if not side_by_side(m, k, self.width, count):
            return [Product(m, k, self.width, count)], columns * m
        copied = [(k, self.turned_in), (m, self.turned_out)] if count > 1 else []
        copies = [Copy(size * columns, self.width) for size, turned in copied if not turned]
        return [Product(m, k, columns), *copies], columns * m

    def link(self, matrix):
        return Link(matrix, self.width, self.turned_in, self.turned_out)


class Sum(NamedTuple):
    """The last core as one matrix for each value of its bond; see links.Terms."""

    core: int
    axes: tuple  # order of (r, o, i, s): bond, rows, columns, and the end of the train, whose size is 1
    width: int
    last: bool

    def shape(self, size):
        """(k, m, n) for a core of this size (r, o, i, s)."""
        return tuple(size[axis] for axis in self.axes[:3])

    def steps(self, shape, numbers):
        """Products and copies for a state of so many numbers, and how many they give."""
        (k, m, n), columns = shape, numbers // (shape[0] * shape[2])
        return [Copy(numbers), Product(m, n, columns, k, shared=False), Copy(k * m * columns)], columns * m

    def link(self, matrix):
        return Terms(matrix, self.width, self.last)


def moves(sizes, forward, turned=False, by_terms=False):
    """The sweep over cores of these `sizes` (r, o, i, s): Moves, Turns of the state, and a Sum at the end of two `by_terms`.

    The state of a token is an array whose axes are, from the first core on: outputs done, bond, inputs ahead (forward), or inputs
    ahead, bond, outputs done. No step leaves the order that the next one reads: nothing is copied between cores, but for a Turn.
    """
    if by_terms:
        return _by_terms(*sizes, forward)
    return _rightward(sizes, turned) if forward else _leftward(sizes, turned)


def _by_terms(left, right, forward):
    """For two cores: the state has the bond where the second one, as it is stored, can meet it."""
    if forward:
        return [Move(0, (3, 1, 0, 2), right[2]), Sum(1, (0, 1, 2, 3), left[1], True)]
    return [Move(1, (0, 1, 2, 3), 1), Sum(0, (3, 1, 2, 0), right[1], False)]


def _rightward(sizes, turned):
    found, ahead, last = [], math.prod([size[2] for size in sizes]), len(sizes) - 1
    for k, (r, _, i, _) in enumerate(sizes):
        ahead //= i
        if turned and k == last - 1:
            found += [Turn(r * i, ahead), Move(k, (3, 1, 0, 2), ahead, True, True)]
        elif turned and k == last:
            found.append(Move(k, (1, 3, 2, 0), sizes[k - 1][1], False, True))
        else:
            found.append(Move(k, (1, 3, 0, 2), ahead))
    return found


def _leftward(sizes, turned):
    found, done, last = [], 1, len(sizes) - 1
    for k, (r, o, _, _) in reversed(list(enumerate(sizes))):
        if turned and k == last:
            found.append(Move(k, (1, 0, 2, 3), sizes[k - 1][2], True, False))
        elif turned and k == last - 1:
            found += [Move(k, (0, 1, 3, 2), done, True, True), Turn(done, r * o)]
        else:
            found.append(Move(k, (0, 1, 2, 3), done))
        done *= o
    return found


def merge(cores):
    """Neighboring cores as one: (…, r, o, i, s), … -> (…, r, o_1*o_2*…, i_1*i_2*…, s), by the cheapest order of products.

    Exact: merging all cores of a weight gives (…, 1, out, in, 1).
    """
    batch = cores[0].shape[:-4]
    core, size = merge_sized(cores, tuple([tuple(core.shape[-4:]) for core in cores]), batch)
    return core.reshape(*batch, *size)


def merge_sized(cores, sizes, batch=()):
    """`merge` of cores held in any shape whose numbers are those of `sizes` in order: such a tensor, and its (r, o, i, s)."""
    if len(cores) == 1:
        return cores[0], sizes[0]
    at = last_bond(sizes)
    left, (r, o, i, bond) = merge_sized(cores[:at], sizes[:at], batch)
    right, (_, p, j, s) = merge_sized(cores[at:], sizes[at:], batch)
    product = left.reshape(*batch, r * o * i, bond) @ right.reshape(*batch, bond, p * j * s)
    if i > 1 and p > 1:
        product = product.reshape(*batch, r * o, i, p, j * s).transpose(-3, -2).reshape(*batch, r * o * p, i * j * s)
    return product, (r, o * p, i * j, s)


@lru_cache(maxsize=16384)
def _best_split(sizes):
    """Fewest FLOPs that merge cores of these sizes, and the bond that is closed last."""
    if len(sizes) == 1:
        return 0, 0
    modes = math.prod(o * i for _, o, i, _ in sizes)

    def cost(at):
        last = 2 * sizes[0][0] * modes * sizes[at][0] * sizes[-1][3]
        return _best_split(sizes[:at])[0] + _best_split(sizes[at:])[0] + last

    return min((cost(at), at) for at in range(1, len(sizes)))


def last_bond(sizes):
    """The bond of neighbors of these sizes (r, o, i, s) that `merge` closes last."""
    return _best_split(sizes)[1]


last_bond._dynamo_marked_constant = True  # see choose.traced_plan


def merge_steps(sizes):
    """Products and the copy of `merge`."""
    if len(sizes) == 1:
        return []
    numbers = sizes[0][0] * math.prod(o * i for _, o, i, _ in sizes) * sizes[-1][3]
    return [*_products(sizes), Copy(numbers)]


def _products(sizes):
    if len(sizes) == 1:
        return []
    at = _best_split(sizes)[1]
    left, right = (math.prod(o * i for _, o, i, _ in part) for part in (sizes[:at], sizes[at:]))
    last = Product(sizes[0][0] * left, sizes[at][0], right * sizes[-1][3])
    return [*_products(sizes[:at]), *_products(sizes[at:]), last]


def merged_shape(shapes):
    """(r, o, i, s) of neighbors of these shapes merged."""
    _, outs, ins, _ = zip(*shapes)
    return (shapes[0][0], math.prod(outs), math.prod(ins), shapes[-1][3])


def partitions(count):
    """Every way to cut `count` cores into runs of neighbors, but the one run of all: tuples of (first, one after the last)."""
    found = []
    for cuts in range(1, 1 << (count - 1)):
        ends = [0, *[k + 1 for k in range(count - 1) if cuts >> k & 1], count]
        found.append(tuple(itertools.pairwise(ends)))
    return sorted(found, key=len, reverse=True)
