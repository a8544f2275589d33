"""The one place where the benchmarks use tnlib's layers: when their interface changes, this file does.

Settings of a layer, `materialize`: "never", as layers start, builds what it needs at every call; "auto" keeps in evaluation
what is smaller in all than the dense weight; "always" may keep the rebuilt weight. `plan` forces one way of contraction.
"""

import torch
from torch import nn

import tnlib as tn
from tnlib.choose import Case, bucket

LIKELY = 3.0  # times the fastest prediction up to which a plan is measured
SETTINGS = ("never", "auto", "always")


def linear(form, shape, factors, setting=SETTINGS[0]):
    """A FactorizedLinear that holds these factors."""
    layer = tn.FactorizedLinear(form, shape, bias=False)
    layer.load_factors(factors)
    tn.materialize_(layer, setting)
    return layer


def planned(form, shape, factors, plan):
    """A FactorizedLinear that always contracts by `plan` and keeps nothing."""
    layer = linear(form, shape, factors)
    layer.plan = plan
    return layer


def likely(form, shape, tokens, grad):
    """A resolved form's plans, but for those that are predicted to take LIKELY times the fastest one's time."""
    priced = Case(form, tuple(shape), bucket(tokens), "cpu", torch.float32, grad, 0).plans()
    return [plan for seconds, plan in priced if seconds <= LIKELY * priced[0][0]]


def plans(form, shape, tokens, grad):
    """Their names."""
    return [plan.name for plan in likely(form, shape, tokens, grad)]


def least_flops(form, shape, tokens):
    """FLOPs of the plan with the fewest."""
    return min(plan.flops for plan in form.plans(shape, tokens))


def embedding(form, shape, factors, setting=SETTINGS[0]):
    """A FactorizedEmbedding that holds these factors."""
    layer = tn.FactorizedEmbedding(form, shape)
    layer.load_factors(factors)
    tn.materialize_(layer, setting)
    return layer


def row_plans(form, shape, tokens):
    """Names of the ways to look up rows."""
    return [plan.name for plan in form.row_plans(shape, tokens)]


class ForcedRows(nn.Module):
    """An embedding that always looks up by `plan`."""

    def __init__(self, form, shape, factors, plan):
        super().__init__()
        self.layer, self.plan = embedding(form, shape, factors), plan

    def forward(self, ids):
        return self.layer.form.rows(ids, self.layer.operands, self.layer.shape, self.plan)
