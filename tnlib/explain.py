"""What a layer could do with so many tokens, and what it does: every plan with its predicted and its measured time."""

from dataclasses import dataclass

import torch

from tnlib.choose import Case, bucket, time_in_turns
from tnlib.shapes import ShapeError

HOPELESS = 20  # times the fastest prediction beyond which a plan is not run


@dataclass(frozen=True)
class Explained:
    """One plan of a layer."""

    name: str
    flops: int  # for all tokens, building included unless kept
    kept: int | None  # numbers kept from call to call; None: what the plan needs is built at every call
    predicted_ms: float
    measured_ms: float | None  # None: not run, hopeless
    chosen: bool


class Explanation(list):
    """Explained plans, fastest first; prints as a table."""

    def __init__(self, plans, title):
        super().__init__(plans)
        self.title = title

    def __repr__(self):
        lines = [self.title, f"  {'plan':<36} {'MFLOP':>9} {'kept':>10} {'predicted':>10} {'measured':>10}"]
        for plan in self:
            kept = "-" if plan.kept is None else f"{plan.kept:,}"
            measured = "not run" if plan.measured_ms is None else f"{plan.measured_ms:.3f} ms"
            times = f"{plan.predicted_ms:>7.3f} ms {measured:>10}"
            lines.append(f"{'*' if plan.chosen else ' '} {plan.name:<36} {plan.flops / 1e6:>9.3g} {kept:>10} {times}")
        return "\n".join([*lines, "* taken for so many tokens"])

    __str__ = __repr__


def explain(layer, tokens=512):
    """Every plan of a factorized linear layer for `tokens` tokens, timed in turns, with gradients if the layer is in training.

    Returns: Explanation. Times are the best of a few, of random tokens on the layer's device; FLOPs are of the forward pass
    Raises: ShapeError for less than one token
    Exact: one plan is marked as taken; it is the one that `forward` takes.
    """
    if tokens < 1:
        raise ShapeError(f"explain: got tokens={tokens}; needed at least 1.")
    with torch.set_grad_enabled(layer.training):
        return _explained(layer, tokens)


def _explained(layer, tokens):
    form, shape, operands = layer.form, layer.shape, {name: o.detach() for name, o in layer.operands.items()}
    first = next(iter(layer.factors.values()))
    x = torch.randn(tokens, shape[1], dtype=first.dtype, device=first.device)
    room, bias = layer.room(), None if layer.bias is None else layer.bias.detach()
    case = Case(form, shape, bucket(tokens), str(x.device), x.dtype, layer.training, room)
    priced = case.plans()
    run = [plan for seconds, plan in priced if seconds <= HOPELESS * priced[0][0]]
    calls = [form.attempt(plan, x, operands, shape, bias, case.grad, case.keeps(plan)) for plan in run]
    measured = dict(zip((plan.name for plan in run), time_in_turns(calls, str(x.device))))
    taken = layer.plan or form.choose(x, operands, shape, bias, None, room, case.grad).name
    plans = [_row(seconds, plan, case.keeps(plan), measured.get(plan.name), taken) for seconds, plan in priced]
    plans.sort(key=lambda plan: (plan.measured_ms is None, plan.measured_ms or plan.predicted_ms))
    mode = "forward and backward" if layer.training else "forward"
    return Explanation(plans, f"{form}, {tokens} token{'s' * (tokens > 1)}, {mode}, {x.device}")


def _row(seconds, plan, kept, measured, taken):
    return Explained(
        name=plan.name,
        flops=sum(step.flops for step in (*(() if kept else plan.build), *plan.run)),
        kept=plan.held if kept else None,
        predicted_ms=1e3 * seconds,
        measured_ms=None if measured is None else 1e3 * measured,
        chosen=plan.name == taken,
    )
