"""Which plan a layer takes for so many tokens: the model of machine.py prunes, and what is left is timed once.

The winner is remembered for the form, shape, power of two of tokens, dtype, device and whether gradients are needed, on disk:
an interrupted run that goes on computes the same bits as one that was not. Nothing is timed while a graph is captured or compiled,
or when torch is told to use deterministic algorithms; then the model decides alone.
"""

import math
import time
from dataclasses import dataclass

import torch

from tnlib.contract import plans_of
from tnlib.lookup import row_plans_of
from tnlib.machine import TYPICAL, machine, recall, remember

SURVIVORS = 8  # plans that are timed, at most: the fastest was predicted sixth for an MPO of bond 4 and 4,096 tokens
CLOSE = 2.5  # times the best prediction within which a plan survives
BEHIND = 1.4  # times the fastest time after two rounds from which on a plan is not timed any more
WORTH_TIMING = 1e-5  # seconds a call must be predicted to take before plans are timed: at 15 a prediction cost 1.4 times, at 768 x 768
TRACED_TOKENS = 512  # what a compiled graph, whose token count is symbolic, is planned for
ROUNDS = 4  # at least; and more, up to MOST, until ENOUGH seconds have passed: a busy moment must not decide for good
MOST, ENOUGH = 20, 0.1


@dataclass(frozen=True)
class Case:
    """What a choice depends on."""

    form: object
    shape: tuple
    tokens: int  # rounded up to a power of two
    device: str
    dtype: torch.dtype
    grad: bool
    room: float | None  # numbers that may be kept from one call to the next, beside views; None: not even those
    rows: bool = False  # rows are looked up, nothing is multiplied

    @property
    def key(self):
        room = "" if self.room is None else f", {self.room} kept"
        grad = ", with gradients" if self.grad else ""
        tokens = f"{self.tokens} {'rows' if self.rows else 'tokens'}"
        return f"{self.device} {self.dtype} {self.form} {self.shape}, {tokens}{grad}{room}"

    def keeps(self, plan):
        """Whether what the plan builds is kept from one call to the next."""
        return self.room is not None and plan.held <= self.room

    def plans(self):
        """(predicted seconds, plan) of every plan, fastest first. Of what is kept, building is free."""
        rates = machine(self.device, self.dtype)
        times = 3 if self.grad else 1  # a backward pass is two products for each one
        every = (row_plans_of if self.rows else plans_of)(self.form, self.shape, self.tokens)
        priced = [(times * rates.seconds(plan, built=not self.keeps(plan)), plan) for plan in every]
        return sorted(priced, key=lambda pair: pair[0])


_chosen = {}


def choose(case, attempt=None):
    """The plan for a Case.

    attempt: called with a plan, gives a function that runs it once, to be timed; None: the model decides alone
    Exact: never a plan predicted to take more than CLOSE times the fastest prediction.
    """
    plan = _chosen.get((case, attempt is None))
    if plan is None:
        plan = _chosen[case, attempt is None] = _decide(case, attempt)
    return plan


def _decide(case, attempt):
    priced = case.plans()
    best = priced[0][0]
    left = [plan for seconds, plan in priced[:SURVIVORS] if seconds <= CLOSE * best]
    if len(left) == 1 or best < WORTH_TIMING or attempt is None or _must_not_time(case.device):
        return left[0]
    known = recall(case.device, case.key)
    if known is None:
        times = time_in_turns([attempt(plan) for plan in left], case.device, BEHIND)
        fastest = left[times.index(min(times))]
        known = remember(case.device, case.key, fastest.name)
    return next((plan for _, plan in priced if plan.name == known), left[0])


def _must_not_time(device):
    captured = device.startswith("cuda") and torch.cuda.is_current_stream_capturing()
    return captured or torch.are_deterministic_algorithms_enabled()


def time_in_turns(functions, device, behind=math.inf):
    """Seconds of the fastest of a few runs of each function, taken in turns: a slow moment falls on all of them.

    behind: functions that take more than so many times the fastest one's time sit out all rounds after the second
    """
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for function in functions:
        function()
    times, inner, turns = [math.inf] * len(functions), [1] * len(functions), list(range(len(functions)))
    number, began = 0, time.perf_counter()
    while number < ROUNDS or (number < MOST and time.perf_counter() - began < ENOUGH):
        for turn in range(len(turns)):
            at = turns[(turn + number) % len(turns)]  # each round begins with the next one: none always finds its weights warm
            wait()
            start = time.perf_counter()
            for _ in range(inner[at]):
                functions[at]()
            wait()
            took = (time.perf_counter() - start) / inner[at]
            times[at] = min(times[at], took)
            if number == 0:
                inner[at] = max(1, min(20, int(1e-3 / max(took, 1e-7))))
        number += 1
        if number > 1:
            turns = [at for at in turns if times[at] <= behind * min(times)]
    return times


def bucket(tokens):
    """Token count rounded up to a power of two: plans change slowly, and the store stays small."""
    return 1 << max(0, tokens - 1).bit_length()


def traced_plan(form, shape, device):
    """Name of the plan that a compiled graph takes, by the typical machine: one plan for all token counts."""
    rates = TYPICAL.get(device, TYPICAL["cpu"])
    return min(plans_of(form, shape, TRACED_TOKENS), key=rates.seconds).name


traced_plan._dynamo_marked_constant = True  # all that torch.compiler.assume_constant_result does, but that imports the compiler: seconds
