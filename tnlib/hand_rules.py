"""Budgets split by hand, to compare an allocation with: the same share, the same rank, CompactifAI's advice, Hybrid TT's split.

Each rule has one number left open. It is set by bisection so that as much of the budget is spent as its steps allow.
"""

import math
from dataclasses import fields, replace
from functools import lru_cache

from tnlib.form import largest
from tnlib.low_rank import LowRank
from tnlib.plan import plan
from tnlib.profile import blank_profile
from tnlib.recipe import Recipe, RecipeError, Rule, match
from tnlib.shapes import ShapeError

GRID = 10**6  # shares are multiples of one over this
SIZES = ("rank", "max_rank", "ranks", "terms", "kept")  # fields that say how large a form is
HYBRID_RATIO = (
    86.1 / 3.46
)  # of kept shares, attention over FFN, at the ranks that Hybrid TT documents; it prints 20 / 3


def uniform_ratio(model, form, where="linear", kept=0.5):
    """Every matrix keeps the same share of its numbers.

    form: LowRank(kept=1), MPO(order=3), TensorTrain(order=2), Kronecker(right=(2, 2)): its kind and modes; its size is set here
    where: as in Rule.where; kept: share of the numbers of all matrices that `where` claims
    Returns: Recipe that spends as much of the budget as one share for all allows (shares go in steps of 1e-6)
    Raises: RecipeError for a budget outside (0, 1), or below the smallest forms, with what these take
    Exact: the numbers kept are at most kept * dense.
    """
    shapes = _shapes(model, where)
    return _by_share("uniform ratio", form, shapes, kept, lambda share: dict.fromkeys(shapes, share))


def uniform_rank(model, form, where="linear", kept=0.5):
    """Every matrix gets the same rank (terms, for Kronecker); one that would not become smaller stays dense.

    Arguments, Returns and Raises: as uniform_ratio. Exact: one rank more is over the budget.
    """
    shapes = _shapes(model, where)

    most = max(map(math.prod, shapes.values()))  # no rank means more than that
    return _tuned("uniform rank", shapes, kept, lambda rank: dict.fromkeys(shapes, with_rank(form, rank)), most)


def compactifai_rules(model, form, where="linear", kept=0.5, early=0.25, early_kept=0.5):
    """CompactifAI's advice: early blocks keep at least half, down-projections stay dense, the rest meets the budget.

    early: share of the blocks that count as early, which the paper does not say; early_kept: what they keep at least
    Other arguments, Returns and Raises: as uniform_ratio. Source: arXiv 2401.14109 v2, section 2.
    """
    shapes = _shapes(model, where)
    units = blank_profile(model, [LowRank(rank=1)], where).units
    first = math.ceil(early * model.config.num_hidden_layers)
    gentle = {unit.name for unit in units if unit.block < first}
    down = _claimed(model, "down")

    def shares(share):
        return {n: max(share, early_kept) if n in gentle else share for n in shapes if n not in down}

    return _by_share("CompactifAI's rules", form, shapes, kept, shares)


def attention_split(model, form, where="linear", kept=0.5, ratio=HYBRID_RATIO, reverse=False):
    """Hybrid TT's split: attention keeps `ratio` times the share that the MLP keeps, and at most all of it.

    reverse: the MLP is the one that is spared
    Other arguments, Returns and Raises: as uniform_ratio. Source: github.com/tkenaz/tt-transformer; attention ranks
        [24, 48] keep 1/3.46 of its numbers, FFN ranks [8, 16] keep 1/86.1.
    """
    shapes = _shapes(model, where)
    spared = _claimed(model, "mlp" if reverse else "attention")
    name = "MLP spared" if reverse else "attention spared"

    def shares(share):
        return {n: round(share * ratio, 6) if n in spared else share for n in shapes}

    return _by_share(name, form, shapes, kept, shares)


def with_share(form, kept):
    """The form with its size set to a share of the numbers."""
    return _sized(form, kept=kept)


def with_rank(form, rank):
    """The form with its rank, bond dimension or number of terms set."""
    names = {field.name for field in fields(form)}
    return _sized(form, **{next(name for name in ("rank", "max_rank", "terms") if name in names): rank})


def _sized(form, **size):
    names = {field.name for field in fields(form)}
    return replace(form, **dict.fromkeys(names.intersection(SIZES)) | size)


def _shapes(model, where):
    """(out, in) by name of what `where` claims."""
    probe = Recipe(name="hand rules", rules=(Rule(where=where, form=LowRank(rank=1)),))
    return {row.name: row.shape for row in plan(model, probe).rows}


def _claimed(model, role):
    return {name for name, _, _ in match(model, Recipe(name=role, rules=(Rule(where=role, form=LowRank(rank=1)),)))}


def _by_share(name, form, shapes, kept, shares):
    """The recipe for the largest share; shares(share) gives each matrix's own, 1 or more and a missing one being dense."""

    def forms(step):
        own = shares(step / GRID)
        return {n: with_share(form, share) for n, share in own.items() if share < 1}

    return _tuned(name, shapes, kept, forms, GRID - 1)


def _tuned(name, shapes, kept, forms, most):
    """The recipe of forms(k) for the k in 1..most that spends most of the budget; a k too small for some matrix is no choice.

    A matrix that would not become smaller, or that forms(k) leaves out, stays dense.
    """
    if not 0 < kept < 1:
        raise RecipeError(f"{name}: got kept={kept!r}; needed a share between 0 and 1, such as kept=0.7.")
    dense, saved = sum(map(math.prod, shapes.values())), lru_cache(_saved)

    def smaller(k):
        return {n: form for n, form in forms(k).items() if saved(form, shapes[n]) > 0}

    def total(k):
        return dense - sum(saved(form, shapes[n]) for n, form in smaller(k).items())

    def too_small(k):
        try:
            return total(k) is None
        except ShapeError:
            return True

    total(most)  # a form that fits at no size says why
    least = largest(too_small, most, name) + 1 if too_small(1) else 1
    if total(least) > kept * dense:
        raise RecipeError(
            f"{name}: got kept={kept}; needed at least {total(least) / dense:.4f}, which the smallest forms take. Raise kept, or "
            "choose another form."
        )
    best = largest(lambda k: k <= least or total(k) <= kept * dense, most, name)
    spent = total(best)
    if total(least) < spent:  # of all k that come to the same, the smallest: a share is then near what it keeps
        least = largest(lambda k: k <= least or total(k) < spent, most, name) + 1
    return _recipe(name, smaller(least), kept)


def _saved(form, shape):
    """Numbers saved by a form; below 0 where it is larger than the matrix."""
    return math.prod(shape) - form.num_params(shape)


def _recipe(name, forms, kept):
    """One rule a form."""
    places = {}
    for module, form in forms.items():
        places.setdefault(form, []).append(module)
    rules = tuple(Rule(where=tuple(names), form=form) for form, names in places.items())
    return Recipe(name=name, rules=rules, source="hand_rules", notes=f"kept={kept:g}")
