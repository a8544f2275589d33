"""The one place where the benchmarks use tnlib's layers: when their interface changes, this file does.

Settings of a layer, `materialize`: "never" contracts the factors each time, "always" keeps the rebuilt weight in evaluation
without gradients, "auto" chooses. `plan` forces one way of contraction. A tnlib without them is measured as it is.
"""

import torch.nn.functional as F
from harness import Unavailable
from torch import nn

import tnlib as tn

SETTINGS = ("auto", "never", "always")


def linear(form, shape, factors, setting="auto"):
    """A FactorizedLinear that holds these factors. Raises: Unavailable for a setting that this tnlib does not have."""
    layer = tn.FactorizedLinear(form, shape, bias=False)
    layer.load_factors(factors)
    set_materialize(layer, setting)
    return layer


def set_materialize(model, setting):
    """Give every factorized layer of a model the setting; "auto" is what a tnlib without settings does."""
    for layer in model.modules():
        if isinstance(layer, tn.FactorizedLinear):
            if hasattr(layer, "materialize"):
                layer.materialize = setting
            elif setting != "auto":
                raise Unavailable("this tnlib has no layer.materialize")


def planned(form, shape, factors, plan):
    """A FactorizedLinear that always contracts by `plan`."""
    layer = linear(form, shape, factors)
    if not hasattr(layer, "plan"):
        return _Forced(layer, plan)
    layer.plan = plan
    if hasattr(layer, "materialize"):
        layer.materialize = "never"
    return layer


class _Forced(nn.Module):
    """A layer without `plan`, made to follow one."""

    def __init__(self, layer, plan):
        super().__init__()
        self.layer, self.plan = layer, plan

    def forward(self, x):
        form, operands, shape = self.layer.form, self.layer.operands, self.layer.shape
        if self.plan == "rebuild":
            return F.linear(x, form.to_dense(operands, shape))
        return form.contract(x, operands, shape, self.plan)


def plans(form, shape, tokens):
    """Names of a resolved form's plans."""
    return [plan.name for plan in form.plans(shape, tokens)]


def least_flops(form, shape, tokens):
    """FLOPs of the plan with the fewest."""
    return min(plan.flops for plan in form.plans(shape, tokens))


def embedding(form, shape, factors):
    """A FactorizedEmbedding that holds these factors."""
    layer = tn.FactorizedEmbedding(form, shape)
    layer.load_factors(factors)
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
