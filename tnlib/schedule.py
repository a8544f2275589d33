"""Which parameters train, in which groups, and at what rate at each step."""

import math
import re

from tnlib.layers import FactorizedEmbedding, FactorizedLinear
from tnlib.quant import FakeQuantize
from tnlib.treatment import KINDS, RecipeError


def rate(heal, step, steps, layers=0):
    """Learning rate at optimizer step `step` (from 0) of `steps`, as a share of the peak.

    layers: of the model, for a depth curriculum, whose end lowers the rate
    Exact: 1 at the first step after warm-up; final_learning_rate / learning_rate would follow the last step.
    """
    last = (heal.final_learning_rate or 0.0) / heal.learning_rate
    if heal.schedule == "constant":
        after = heal.final_learning_rate is not None and curriculum_over(heal, step, layers)
        level = last if after and heal.curriculum_steps else 1.0
        warm = math.ceil(heal.warmup * steps)
        return level * min(1.0, (step + 1) / (warm + 1))
    warm = math.ceil(heal.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    gone = (step - warm) / max(1, steps - warm)  # 0 .. 1
    falling = (1 + math.cos(math.pi * min(1.0, gone))) / 2 if heal.schedule == "cosine" else 1 - min(1.0, gone)
    return last + (1 - last) * falling


def included_layers(heal, step, layers):
    """How many layers' hidden states are matched at a step: min(1 + step // curriculum_steps, layers).

    Source: Yang et al. 2023 and its repository.
    """
    return layers if not heal.curriculum_steps else min(1 + step // heal.curriculum_steps, layers)


def curriculum_over(heal, step, layers):
    """Whether every layer has had its curriculum_steps, so that the task's and the logits' losses have joined."""
    return step >= heal.curriculum_steps * layers


def kinds(model):
    """Each parameter's kind by its name, a shared one once: "factors", "scalars" or "rest"."""
    found = {}
    for module in model.modules():
        if isinstance(module, (FactorizedLinear, FactorizedEmbedding)):
            sizes = module.form.factor_shapes(module.shape)
            for name, parameter in module.named_parameters():
                if (factor := name.removeprefix("parametrizations.").split(".")[0]) in sizes:
                    found[id(parameter)] = "scalars" if factor == "scale" else "factors"
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            found |= {id(p): "scalars" for p in module.parameters()}
    return {name: found.get(id(parameter), "rest") for name, parameter in model.named_parameters()}


def select_trainable_(model, train):
    """Set requires_grad by a Heal's `train`: "all", "factors" (with their scalars), or patterns of names.

    Raises: RecipeError when a pattern, or "factors", claims no parameter; it lists what there is
    """
    if train == "all":
        return
    found = kinds(model)
    if train == "factors":
        chosen = {name for name, kind in found.items() if kind != "rest"}
        _refuse_empty("train='factors'", chosen, found)
    else:
        patterns = (train,) if isinstance(train, str) else train
        for pattern in patterns:
            _refuse_empty(f"train={pattern!r}", {name for name in found if covers(pattern, name)}, found)
        chosen = {name for name in found if any(covers(pattern, name) for pattern in patterns)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def parameter_groups(model, heal):
    """AdamW's groups for the trainable parameters: peak rates, decay where a tensor has two axes or more.

    Returns: a list of {"params", "lr", "weight_decay"}; each trainable parameter is in one group
    Raises: RecipeError when a group of the Heal claims no parameter, trainable or not
    """
    found, groups = kinds(model), {}
    for group in heal.groups:
        if group.where not in KINDS:
            _refuse_empty(f"group {group.where!r}", {n for n in found if covers(group.where, n)}, found)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = next((g for g in heal.groups if g.where == found[name] or covers(g.where, name)), None)
            lr, decay = (getattr(group, key, None) for key in ("learning_rate", "weight_decay"))
            lr = heal.learning_rate if lr is None else lr
            matrix = parameter.dim() > 1 and found[name] != "scalars"
            decay = (heal.weight_decay if decay is None else decay) if matrix else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    return [{"params": members, "lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()]


def covers(pattern, name):
    """Whether a pattern, in which `*` is a block number, names this parameter or a module that it is in."""
    return re.match(re.escape(pattern).replace(r"\*", r"\d+") + r"(\.|$)", name) is not None


def _refuse_empty(where, chosen, found):
    if not chosen:
        have = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in found})
        raise RecipeError(
            f"Heal: {where} claims no parameter of the student. It has:\n  " + "\n  ".join(have) + "\n"
            "Use one of these names, a module that holds them, or factorize the model first."
        )
