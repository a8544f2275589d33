"""Allocation: never over the budget, between the bound and the best by exhaustion, sizes as planned; hand rules keep theirs."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from tnlib.allocate import allocate
from tnlib.block_low_rank import BlockLowRank
from tnlib.hand_rules import attention_split, compactifai_rules, uniform_rank, uniform_ratio, with_rank
from tnlib.kronecker import Kronecker
from tnlib.low_rank import LowRank
from tnlib.moments import second_moments
from tnlib.plan import plan
from tnlib.profile import Profile, Row, Unit, blank_profile
from tnlib.proxies import proxy_profile
from tnlib.recipe import Recipe, RecipeError
from tnlib.shapes import ShapeError
from tnlib.tensor_train import TensorTrain
from tnlib.tt_matrix import MPO

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = torch.randint(2, 90, (8, 16), generator=torch.Generator().manual_seed(0))
FORMS = [LowRank(rank=2), LowRank(rank=6), MPO(order=2, max_rank=5)]


def made(units):
    """A profile from [(dense numbers, [(numbers, damage), …]), …]."""
    rows = [
        Row(f"u{k}", LowRank(rank=1 + j), (f"u{k}",), params, 2.0 * params, {"kl": (damage,)})
        for k, (_, options) in enumerate(units)
        for j, (params, damage) in enumerate(options)
    ]
    shaped = tuple(Unit(f"u{k}", k, (f"u{k}",), ((dense, 1),)) for k, (dense, _) in enumerate(units))
    total = sum(dense for dense, _ in units)
    return Profile(shaped, tuple(rows), total + 100, 2.0 * total + 40.0)


def exhausted(units, budget):
    """The least damage of any choice within the budget."""
    ways = [[(dense, 0.0), *((params, max(0.0, damage)) for params, damage in options)] for dense, options in units]
    sums = (tuple(map(sum, zip(*choice))) for choice in itertools.product(*ways))
    return min((damage for cost, damage in sums if cost <= budget), default=math.inf)


UNIT = st.integers(4, 60).flatmap(
    lambda dense: st.tuples(
        st.just(dense),
        st.lists(st.tuples(st.integers(1, dense - 1), st.integers(-2, 30).map(float)), max_size=4),
    )
)


@settings(deadline=None, max_examples=150)
@given(units=st.lists(UNIT, min_size=1, max_size=5), kept=st.floats(0.05, 1.0))
def test_between_the_bound_and_the_best_there_is(units, kept):
    profile = made(units)
    budget = math.floor(kept * profile.params)
    best = exhausted(units, budget)
    if best == math.inf:
        with pytest.raises(RecipeError, match="needed at least"):
            allocate(profile, kept=kept)
        return
    found = allocate(profile, kept=kept)
    assert found.cost <= budget
    assert found.cost == profile.params - (profile.model_params - found.params)
    assert found.damage == pytest.approx(sum(max(0.0, row.mean("kl")) for row in found.rows))
    assert found.bound <= best + 1e-9
    assert best <= found.damage + 1e-9
    if found.gap < 1e-9:
        assert found.damage == pytest.approx(best, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(units=st.lists(UNIT, min_size=2, max_size=5), kept=st.floats(0.2, 0.9))
def test_all_three_budgets_say_the_same(units, kept):
    profile = made(units)
    try:
        found = allocate(profile, kept=kept)
    except RecipeError:
        return
    size, speed = 2 * (100 + math.floor(kept * profile.params)), 40.0 + 2 * math.floor(kept * profile.params)
    for other in (
        allocate(profile, bytes=size),
        allocate(profile, flops=speed),
        allocate(profile, bytes=2 * size, bytes_each=4),
    ):
        assert other.rows == found.rows
        assert other.cost <= other.budget
    assert allocate(profile, bytes=size).cost == 2 * found.params
    assert (
        allocate(profile, flops=speed).cost
        == found.flops
        == profile.model_flops - 2 * (profile.model_params - found.params)
    )


def test_damage_is_spread_by_its_price():
    units = [(100, [(50, 1.0), (20, 10.0)]), (100, [(50, 2.0), (20, 3.0)])]
    found = allocate(made(units), kept=0.6)  # 120 of 200: u0 at 50 for 1, then 30 of the 80 that u1 saves for 3
    assert (found.damage, found.bound) == (3.0, pytest.approx(1.0 + 3.0 * 30 / 80))
    assert found.damage == exhausted(units, 120)
    assert [row.params for row in allocate(made(units), kept=0.35).rows] == [50, 20]
    assert "predicted kl 3 (at best" in str(found)


def test_measured_gains_count_as_nothing_and_are_taken():
    found = allocate(made([(100, [(50, -0.3)]), (100, [(50, 0.2)])]), kept=0.99)
    assert (found.damage, found.gap, [row.unit for row in found.rows]) == (0.0, 0.0, ["u0"])


def test_nothing_to_do_is_no_recipe():
    found = allocate(made([(100, [(50, 1.0)])]), kept=1.0)
    assert (found.recipe, found.rows, found.damage, found.kept, found.choices) == (None, (), 0.0, 1.0, {"u0": None})


@pytest.mark.parametrize("unit", ["matrix", "block"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_planned_is_what_was_counted(family, unit):
    model = tiny(family)
    names = [name for one in blank_profile(model, FORMS).units for name in one.names]
    profile = proxy_profile(model, second_moments(model, WINDOWS, names), FORMS, unit=unit)
    profile = Profile.from_dict(json.loads(json.dumps(profile.to_dict())))  # no model needed
    for budget in (
        {"kept": 0.7},
        {"kept": 0.5},
        {"bytes": 1.7 * profile.model_params},
        {"flops": 0.9 * profile.model_flops},
    ):
        found = allocate(profile, **budget, score="output")
        planned = plan(model, found.recipe)
        assert planned.total == found.params
        assert planned.flops == pytest.approx(found.flops, rel=1e-12)
        assert len(planned.rows) == sum(len(row.names) for row in found.rows)
        assert found.cost <= found.budget
        assert len(found.recipe.rules) <= len(FORMS)
        assert Recipe.from_dict(json.loads(json.dumps(found.recipe.to_dict()))) == found.recipe
        assert allocate(profile, **budget, score="output") == found
    assert found.bound <= found.damage <= found.bound + max(row.mean("output") for row in profile.rows)


def test_standard_errors_add_windows_first():
    rows = tuple(
        Row(f"u{k}", LowRank(rank=1), (f"u{k}",), 4, 8.0, {"kl": s}) for k, s in enumerate([(1.0, 3.0), (3.0, 1.0)])
    )
    units = tuple(Unit(f"u{k}", 0, (f"u{k}",), ((10, 1),)) for k in range(2))
    found = allocate(Profile(units, rows, 20, 40.0), kept=0.4)
    assert (found.damage, found.stderr) == (4.0, 0.0)
    assert math.isnan(allocate(made([(10, [(5, 1.0)])]), kept=0.5).stderr)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, RecipeError, "needed exactly one, above 0"),
        ({"kept": 0.5, "flops": 10.0}, RecipeError, "needed exactly one"),
        ({"kept": -1}, RecipeError, "above 0"),
        ({"kept": 0.2}, RecipeError, r"got kept=0.2; needed at least 0.35"),
        ({"bytes": 50}, RecipeError, r"got bytes=50; needed at least 340"),
        ({"flops": 1}, RecipeError, r"got flops=1; needed at least 180"),
        ({"kept": 0.5, "score": "loss"}, ValueError, "has no score 'loss'; needed one of kl"),
    ],
)
def test_what_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        allocate(made([(100, [(50, 1.0), (20, 10.0)]), (100, [(50, 2.0)])]), **arguments)


# --- hand rules ----------------------------------------------------------------------------------------------------------

KINDS = [
    LowRank(kept=1),
    BlockLowRank(kept=1),
    MPO(order=2),
    TensorTrain(order=2),
    Kronecker(right=(2, 2)),
    MPO(order=2, max_rank=3),
]
HAND = [uniform_ratio, uniform_rank, compactifai_rules, attention_split]


def shares(model, recipe):
    """Share kept of each matrix by name, dense ones included, and of all together."""
    units = blank_profile(model, [LowRank(rank=1)]).units
    planned = {row.name: row.params for row in plan(model, recipe).rows}
    kept = {unit.name: planned.get(unit.name, unit.params) for unit in units}
    return {u.name: kept[u.name] / u.params for u in units}, sum(kept.values()) / sum(u.params for u in units)


@pytest.mark.parametrize(("form", "family"), [*((form, "llama") for form in KINDS), (KINDS[0], "gpt2")], ids=str)
@pytest.mark.parametrize("rule", HAND)
def test_a_hand_rule_spends_its_budget_and_no_more(rule, form, family):
    model = tiny(family)
    recipe = rule(model, form, kept=0.8)
    _, kept = shares(model, recipe)
    assert 0.5 < kept <= 0.8
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert shares(model, rule(model, form, kept=kept + 1e-9))[1] == kept  # monotone in the budget


def test_one_notch_more_is_over_the_budget():
    model = tiny("llama")
    recipe = uniform_ratio(model, LowRank(kept=1), kept=0.6)
    (rule,) = recipe.rules
    assert rule.form.kept < 1
    found, _ = shares(model, recipe)
    assert max(found.values()) <= rule.form.kept
    (rule,) = uniform_rank(model, MPO(order=2), kept=0.6).rules
    units = blank_profile(model, [LowRank(rank=1)]).units
    sizes = [
        sum(min(u.params, with_rank(rule.form, rank).num_params(u.shapes[0])) for u in units)
        for rank in (rule.form.max_rank, rule.form.max_rank + 1)
    ]
    assert sizes[0] <= 0.6 * sum(u.params for u in units) < sizes[1]


def test_each_rule_does_what_it_says():
    model = tiny("llama")
    found, _ = shares(model, compactifai_rules(model, LowRank(kept=1), kept=0.6, early=0.5))
    assert all(found[f"model.layers.{k}.mlp.down_proj"] == 1 for k in (0, 1))
    first, second = ([v for n, v in found.items() if f".{k}." in n and "down" not in n] for k in (0, 1))
    assert min(first) > max(second)  # at least half, to a whole rank
    for reverse, spared in ((False, "self_attn"), (True, "mlp")):
        recipe = attention_split(model, LowRank(kept=1), kept=0.6, ratio=2, reverse=reverse)
        gentle, hard = recipe.rules if spared in recipe.rules[0].where[0] else recipe.rules[::-1]
        assert all((spared in n) == (rule is gentle) for rule in recipe.rules for n in rule.where)
        assert gentle.form.kept == pytest.approx(2 * hard.form.kept, abs=1e-6)
    recipe = attention_split(model, LowRank(kept=1), kept=0.9)  # 24.9 times as much as the MLP is more than all: dense
    assert all("mlp" in name for rule in recipe.rules for name in rule.where)


@pytest.mark.parametrize(
    ("rule", "form", "kept", "error", "words"),
    [
        (uniform_ratio, LowRank(kept=1), 1.0, RecipeError, "needed a share between 0 and 1"),
        (uniform_ratio, Kronecker(right=(2, 2)), 0.2, RecipeError, "uniform ratio: got kept=0.2; needed at least 0.2"),
        (uniform_rank, LowRank(kept=1), 0.01, RecipeError, "uniform rank: got kept=0.01; needed at least"),
        (compactifai_rules, LowRank(kept=1), 0.2, RecipeError, "CompactifAI's rules: got kept=0.2"),
        (uniform_ratio, Kronecker(right=(5, 5)), 0.5, ShapeError, "does not divide"),
    ],
)
def test_budgets_and_forms_that_do_not_fit_are_refused(rule, form, kept, error, words):
    with pytest.raises(error, match=words):
        rule(tiny("llama"), form, kept=kept)
