"""From a profile and a budget to a recipe: each unit takes one of its forms or stays dense, so that the least is damaged.

The damage of a choice is the score of its row, and damages of different units are added up. That is an assumption: they were
measured one at a time, and errors in one layer meet errors of another. A notebook measures by how much it fails.
"""

import heapq
import math
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import stdev

from tnlib.profile import Row
from tnlib.recipe import Recipe, RecipeError, Rule

BYTES = 2  # a number: bfloat16, float16
ENDS = 16  # best ways to do the last step that are tried to their end


@dataclass(frozen=True)
class Allocation:
    """A choice for every unit, and what it is predicted to cost and to damage."""

    recipe: Recipe | None  # None where everything stays dense
    rows: tuple[Row, ...]  # the choices, in the model's order; a unit without one stays dense
    score: str
    damage: float  # predicted: the sum of the rows' scores, see `allocate`
    stderr: float  # of the sum over windows, one window's scores added first; NaN where the score has no windows
    bound: float  # no choice within the budget does less damage than this
    cost: float  # in the unit of the budget: numbers, bytes or FLOPs a token
    budget: float
    params: int  # numbers in the whole model
    flops: float  # a token, linear layers and head of the whole model
    kept: float  # share of the profiled matrices' numbers
    choices: dict = field(repr=False, compare=False, default_factory=dict)  # form by unit, None: dense

    @property
    def gap(self):
        """Damage above the bound; 0: the choice is the best there is."""
        return self.damage - self.bound

    def __str__(self):
        forms = {}
        for form in self.choices.values():
            forms[str(form or "dense")] = forms.get(str(form or "dense"), 0) + 1
        counts = ", ".join(f"{count} x {form}" for form, count in sorted(forms.items()))
        predicted = f"predicted {self.score} {self.damage:.4g} (at best {self.bound:.4g})"
        return f"{self.params:,} parameters, {self.kept:.3f} of the profiled numbers; {predicted}; {counts}"


@dataclass(frozen=True)
class _Choice:
    """One way for a unit: what it costs and damages, and the row behind it (None: dense)."""

    cost: float
    damage: float
    row: Row | None


def allocate(profile, *, kept=None, bytes=None, flops=None, score="kl", bytes_each=BYTES, name="allocated"):
    """The recipe that damages least within a budget, by water-filling: the cheapest damage per number saved goes first.

    profile: from sensitivity or proxy_profile
    kept: share of the profiled matrices' numbers; bytes: of the whole model, `bytes_each` a number, tied ones once; flops: a
        token, linear layers and head of the whole model. Give one
    score: of Row.scores, taken as damage and added up over units. A rise of the loss may be measured below zero; it counts as
        zero, and a choice that costs more and damages more than another one is never taken
    Returns: Allocation. Steps along each unit's lower convex hull of (cost, damage) are taken in order of slope; the step that
        oversteps the budget is replaced by the best single choice that does the rest, and what then is left over is spent
    Raises: RecipeError for a budget that no choice meets, with the smallest that can be reached; ValueError for an unknown score
    Source: multiple-choice knapsack, Sinha & Zoltners 1979; bound: its linear relaxation, which is also its Lagrangian dual.
    Exact: cost <= budget; bound <= damage of every choice within the budget; plan(model, recipe).total equals params.
    """
    given = {"kept": kept, "bytes": bytes, "flops": flops}
    target, rest, unit_cost = _budget(profile, given, bytes_each)
    choices = {unit.name: _choices(profile, unit, unit_cost, score) for unit in profile.units}
    least = sum(min(choice.cost for choice in some) for some in choices.values())
    if least > target:
        raise RecipeError(_unreachable(profile, given, least + rest, bytes_each))
    chosen, bound = _fill(choices, target)
    rows = tuple(chosen[unit.name].row for unit in profile.units if chosen[unit.name].row is not None)
    params = profile.model_params - sum(_dense(profile, row).params - row.params for row in rows)
    scale = bytes_each if bytes is not None else 1
    damage = math.fsum(choice.damage for choice in chosen.values())
    return Allocation(
        recipe=_recipe(name, rows, given, score),
        rows=rows,
        score=score,
        damage=damage,
        stderr=_stderr(rows, score),
        bound=min(bound, damage),  # they differ by rounding where every step fits
        cost=scale * (rest + sum(choice.cost for choice in chosen.values())),
        budget=scale * (rest + target),
        params=params,
        flops=profile.model_flops - sum(_dense(profile, row).flops - row.flops for row in rows),
        kept=1 - (profile.model_params - params) / profile.params,
        choices={unit: choice.row and choice.row.form for unit, choice in chosen.items()},
    )


def _stderr(rows, score):
    """Standard error over windows of the summed scores."""
    windows = [math.fsum(values) for values in zip(*(row.scores[score] for row in rows))]
    return stdev(windows) / math.sqrt(len(windows)) if len(windows) > 1 else math.nan


def _dense(profile, row):
    return next(unit for unit in profile.units if unit.name == row.unit)


def _budget(profile, given, bytes_each):
    """Budget of the profiled units, cost of the rest that is counted with them, and the field that says a unit's cost."""
    if sum(value is not None for value in given.values()) != 1 or not all(v is None or v > 0 for v in given.values()):
        raise RecipeError(
            f"allocate: got {', '.join(f'{k}={v}' for k, v in given.items())}; needed exactly one, above 0, such as kept=0.7."
        )
    if given["kept"] is not None:
        return math.floor(given["kept"] * profile.params), 0, "params"
    if given["bytes"] is not None:
        rest = profile.model_params - profile.params
        return given["bytes"] // bytes_each - rest, rest, "params"
    rest = profile.model_flops - sum(unit.flops for unit in profile.units)
    return given["flops"] - rest, rest, "flops"


def _unreachable(profile, given, least, bytes_each):
    name, wanted = next((name, value) for name, value in given.items() if value is not None)
    smallest = {"kept": least / profile.params, "bytes": least * bytes_each, "flops": least}[name]
    return (
        f"allocate: got {name}={wanted:,}; needed at least {smallest:,.6g}, which the smallest form of every unit takes. Raise "
        f"{name}, or profile smaller forms, or more matrices."
    )


def _choices(profile, unit, unit_cost, score):
    """A unit's ways: dense, and its rows."""
    rows = [_Choice(getattr(row, unit_cost), max(0.0, row.mean(score)), row) for row in profile.of(unit.name)]
    return [_Choice(getattr(unit, unit_cost), 0.0, None), *rows]


def _hull(choices):
    """The lower convex hull from the least damage (the cheapest of equals) to the least cost, as a list of choices."""
    hull = []
    for choice in sorted(choices, key=lambda c: (c.damage, c.cost)):
        if hull and choice.cost >= hull[-1].cost:
            continue  # costs more and damages no less
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) > _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(here, there):
    """Damage per number saved."""
    return (there.damage - here.damage) / (here.cost - there.cost)


def _fill(choices, target):
    """The choice for each unit, and the bound: greedy along the hulls, then the step that does not fit whole."""
    hulls = {unit: _hull(some) for unit, some in choices.items()}
    chosen = {unit: hull[0] for unit, hull in hulls.items()}
    steps = [(_slope(a, b), unit, k, b) for unit, hull in hulls.items() for k, (a, b) in enumerate(pairwise(hull))]
    over = math.fsum(choice.cost for choice in chosen.values()) - target
    for slope, unit, _, choice in sorted(steps, key=lambda step: step[:3]):
        if over <= 0:
            break
        saved = chosen[unit].cost - choice.cost
        if saved > over:
            bound = math.fsum(c.damage for c in chosen.values()) + slope * over
            return _finish(choices, chosen, over), bound
        chosen[unit], over = choice, over - saved
    return chosen, math.fsum(choice.damage for choice in chosen.values())


def _finish(choices, chosen, over):
    """The best single change that saves `over`: the least damaging ones are tried, each with what it leaves over spent."""
    changes = [
        (choice.damage - chosen[unit].damage, k, unit, choice)
        for unit, some in choices.items()
        for k, choice in enumerate(some)
        if chosen[unit].cost - choice.cost >= over
    ]
    ends = [
        _spend(choices, chosen | {unit: choice}, chosen[unit].cost - choice.cost - over)
        for _, _, unit, choice in heapq.nsmallest(ENDS, changes, key=lambda change: change[:3])
    ]
    return min(ends, key=lambda end: math.fsum(choice.damage for choice in end.values()))


def _spend(choices, chosen, spare):
    """Give units back what they can have for `spare`, the largest damage undone first."""
    while True:
        better = [
            (chosen[unit].damage - choice.damage, chosen[unit].cost - choice.cost, unit, choice)
            for unit, some in choices.items()
            for choice in some
            if choice.damage < chosen[unit].damage and choice.cost - chosen[unit].cost <= spare
        ]
        if not better:
            return chosen
        _, freed, unit, choice = max(better, key=lambda found: found[:2])
        chosen, spare = chosen | {unit: choice}, spare + freed


def _recipe(name, rows, given, score):
    """One rule a form, in the order in which the model meets them; None where nothing is replaced."""
    places = {}
    for row in rows:
        places.setdefault(row.form, []).extend(row.names)
    if not places:
        return None
    target = next(f"{key}={value:g}" for key, value in given.items() if value is not None)
    rules = tuple(Rule(where=tuple(names), form=form) for form, names in places.items())
    return Recipe(name=name, rules=rules, source="allocate", notes=f"{target}, least {score}")
