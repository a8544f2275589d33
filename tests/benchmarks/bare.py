"""What is left of a plan when everything around its matrix products is taken away: a floor for whoever calls torch's products.

Operands lie as the library likes them and are at hand, results go where memory is ready, blocks that share a matrix are one
product: no copies, no layers, no graph. A backward pass has two products for each one. Plans that keep a rebuilt weight lie
below it; nothing else that runs the same arithmetic through torch does.
"""

import time

import torch

from tnlib.contract import Product

MOST = 1 << 27  # numbers of one product above which a plan is not looked at: half a GB, and no such plan is quick
TRIES = 3  # runs of which the fastest tells which way of a product, and which plan, is entered


def bare(plans, training):
    """A call that runs the products of the plan whose products take least, and nothing else."""
    timed, found = {}, []  # seconds and way of each product: plans share many
    for plan in plans:
        wanted = [size for step in (*plan.build, *plan.run) if isinstance(step, Product) for size in _sizes(step, training)]
        if max(map(_numbers, wanted), default=0) > MOST:
            continue
        for size in wanted:
            if size not in timed:
                timed[size] = min((_seconds(call), way) for way, call in enumerate(_ways(*size)))
        found.append((sum(timed[size][0] for size in wanted), wanted))
    calls = [_ways(*size)[timed[size][1]] for size in min(found)[1]]

    def run():
        for call in calls:
            call()

    return run


def _numbers(size):
    """Of both operands and the result."""
    batch, m, k, n = size
    return batch * (m * k + k * n + m * n)


def _sizes(step, training):
    """(batch, m, k, n) of the products of a step, and of those of its backward pass."""
    batch, m, k, n = step.batch, step.m, step.k, step.n
    if step.shared:
        batch, n = 1, n * batch
    found = [(batch, m, k, n)]
    return found + [(batch, m, n, k), (batch, k, m, n)] * training


def _ways(batch, m, k, n):
    """Calls for (m, k) @ (k, n): each operand in rows or in columns, the result in rows."""
    if batch > 1:
        a, b, y = torch.ones(batch, m, k), torch.ones(batch, k, n), torch.empty(batch, m, n)
        return [lambda: torch.bmm(a, b, out=y)]
    a, b, y = torch.ones(m, k), torch.ones(k, n), torch.empty(m, n)
    columns, z = b.t().contiguous(), torch.empty(n, m)
    return [
        lambda: torch.mm(a, b, out=y),
        lambda: torch.mm(a, columns.t(), out=y),
        lambda: torch.mm(columns, a.t(), out=z),
        lambda: torch.mm(b.t(), a.t(), out=z),
    ]


def _seconds(call):
    call()
    best = float("inf")
    for _ in range(TRIES):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
