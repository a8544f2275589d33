"""Compress and heal, at once or in a recipe's stages: factorize some modules, heal, factorize more, heal again."""

import copy
import os
from dataclasses import replace
from pathlib import Path

from tnlib.heal import heal
from tnlib.history import History
from tnlib.layers import FactorizedEmbedding, FactorizedLinear, SplitLinear
from tnlib.model_card import CARD, model_card
from tnlib.native import record_recipe
from tnlib.plan import plan
from tnlib.recipe import RecipeError, claims, model_type
from tnlib.records import write_atomic
from tnlib.surgery import densify_, factorize_


def compress_and_heal(model, recipe, data, budget, *, teacher=None, out=None, seed=0, progress=None):
    """Factorize a copy of `model` by a recipe and heal it; with stages, a stage at a time (TQCompressor).

    model: the dense model, not changed; teacher: for the losses that need one; None: `model` itself
    budget: with stages, its steps are divided among them evenly, the last gets the rest; each starts the schedule anew,
        and reads on in the same order of the data where the one before it ended
    out: folder; with stages, one folder a stage in it. The same call resumes, see heal. The student is a checkpoint there,
        for from_pretrained, with its model card; with stages, in the last stage's folder
    Returns: the student, and its History, in which steps, tokens and seconds run on from stage to stage
    Raises: RecipeError when the recipe has no Heal, or its stages do not end in its rules; what factorize_ and heal raise
    Source: stages as in TQCompressor (arXiv 2401.16367): each compresses a part and distills, the embedding twice.
    Exact: the student's parameters number plan(model, recipe).total.
    """
    if recipe.heal is None:
        raise RecipeError(
            f"recipe {recipe.name!r}: it has no heal; needed one. Use dataclasses.replace(recipe, heal=Heal(…))."
        )
    stages = recipe.stages or (recipe.rules,)
    total = plan(model, recipe).total
    _check_stages(model, recipe, stages)
    if budget.steps < len(stages):
        raise ValueError(
            f"compress_and_heal: got steps={budget.steps} for {len(stages)} stages; needed at least one each."
        )
    student, histories, read = copy.deepcopy(model), [], 0
    teacher = model if teacher is None else teacher
    for number, rules in enumerate(stages):
        _densify_claimed(student, rules)
        factorize_(student, replace(recipe, rules=rules, stages=()), seed=seed + number, progress=progress)
        if number == len(stages) - 1:
            record_recipe(student, recipe)
        folder = None if out is None else Path(out) / f"stage-{number}" if recipe.stages else Path(out)
        steps = _share(budget.steps, len(stages), number)
        part = replace(budget, steps=steps)
        histories.append(heal(student, teacher, data, recipe.heal, part, folder, seed, progress, read))
        read += steps * budget.batch * budget.accumulate
    assert sum(p.numel() for p in student.parameters()) == total
    if out is not None and os.environ.get("RANK", "0") == "0":
        write_atomic(folder / CARD, model_card(student))
    return student, joined(histories, bool(recipe.stages))


def joined(histories, staged=True):
    """One History of several, steps, tokens and seconds running on; with a column `stage` where there are stages."""
    rows, before = [], {"step": 0, "tokens": 0, "seconds": 0.0}
    for number, history in enumerate(histories):
        extra = {"stage": number} if staged else {}
        rows += [row | {key: row[key] + before[key] for key in before} | extra for row in history.rows]
        if rows:
            before = {key: rows[-1][key] for key in before}
    return History(rows)


def _share(steps, stages, number):
    each = steps // stages
    return each if number < stages - 1 else steps - each * (stages - 1)


def _check_stages(model, recipe, stages):
    """Each module that the recipe claims must end, by its last stage, in the recipe's own form, and none else."""
    last = {}
    for rules in stages:
        for row in plan(model, replace(recipe, rules=rules, stages=())).rows:
            last[row.name] = (row.asked, row.split)
    wanted = {row.name: (row.asked, row.split) for row in plan(model, recipe).rows}
    if odd := sorted(name for name in {**wanted, **last} if wanted.get(name) != last.get(name)):
        raise RecipeError(
            f"recipe {recipe.name!r}: the stages do not end in its rules, for modules {', '.join(odd[:4])}; needed each rule in "
            "the last stage that touches its modules. Correct stages, or set stages=()."
        )


def _densify_claimed(student, rules):
    """Take modules that an earlier stage factorized dense again where these rules claim them, twins included."""
    layers = {
        n: m for n, m in student.named_modules() if isinstance(m, (FactorizedLinear, FactorizedEmbedding, SplitLinear))
    }
    prefix, kind = getattr(student, "base_model_prefix", ""), model_type(student)
    found = {name for rule in rules for name in layers if claims(rule, rule.places(kind), name, prefix)}
    held = {id(parameter) for name in found for parameter in layers[name].parameters()}
    twins = {n for n, m in layers.items() if any(id(p) in held for p in m.parameters())}
    if found:
        densify_(student, names=found | twins)
