"""Which way to contract: a cost for each plan of a layer, and the cheapest one by token count.

A plan's time is modeled as the larger of arithmetic and memory traffic, plus a fixed price for each kernel call. The
three constants only rank plans of one layer against each other, so their ratios matter and their units do not.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Plan:
    """One way to compute a layer's output; counts are for the number of tokens that it was planned for."""

    name: str
    flops: float  # multiply and add counted as two
    elements: float  # tensor elements read plus written, activations and weights
    calls: int  # kernels launched


@dataclass(frozen=True)
class Machine:
    """Rates that a plan is priced with: see `seconds`."""

    flops: float  # per second, in matrix products
    elements: float  # per second, streamed through memory
    call: float  # seconds a kernel launch costs


# Measured: 2-core x86 server (float32), as in peers-detail of the field's libraries; an H100-class GPU (bfloat16).
MACHINES = {
    "cpu": Machine(flops=1.5e11, elements=1.5e9, call=5e-6),
    "cuda": Machine(flops=3e14, elements=1e12, call=5e-6),
}


def seconds(plan, device="cpu"):
    """Predicted time of `plan`, in seconds, on a typical machine of this device type."""
    machine = MACHINES.get(device, MACHINES["cpu"])
    return max(plan.flops / machine.flops, plan.elements / machine.elements) + plan.calls * machine.call


def cheapest(plans, device="cpu"):
    """The plan with the smallest predicted time.

    Exact: never a plan that is slower by the model than any other in the list.
    """
    return min(plans, key=lambda plan: seconds(plan, device))


def choose(form, shape, tokens, device, rows=False):
    """Name of the cheapest plan of `form` for a (out, in) `shape` at `tokens` tokens; `rows` for an embedding look-up.

    Cached, so that a forward pays a look-up. Under torch.compile the token count is symbolic: the plan for TRACED_TOKENS
    is compiled once and serves all of them.
    """
    if torch.compiler.is_compiling():
        return _traced(form, shape, device, rows)
    return _cached(form, shape, bucket(tokens), device, rows)


TRACED_TOKENS = 512


@lru_cache(maxsize=65536)
def _cached(form, shape, tokens, device, rows):
    return cheapest(form.row_plans(shape, tokens) if rows else form.plans(shape, tokens), device).name


def _traced(form, shape, device, rows):
    return _cached(form, shape, TRACED_TOKENS, device, rows)


_traced._dynamo_marked_constant = True  # all that torch.compiler.assume_constant_result does, but that imports the compiler: seconds


def bucket(tokens):
    """Token count rounded up to a power of two: plans change slowly, and the cache stays small."""
    return 1 << max(0, tokens - 1).bit_length()
