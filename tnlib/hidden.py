"""A permutation that costs nothing: the hidden axis of an MLP may be reordered freely, in both of its layers at once.

The rows of up (and gate) and the columns of down meet in the same neurons, between them is an elementwise activation: any one
order of the neurons gives the same function. Choosing it well before factorize_ makes Kronecker fits better at no cost at
inference: no order is stored, nothing is selected by index.
"""

import re
from dataclasses import dataclass, replace

import torch

from tnlib.arrange import SMALL, Arrangement, reassign, regroup, sorted_orders
from tnlib.families import FAMILIES, patterns
from tnlib.kronecker import Kronecker
from tnlib.plan import tied_names
from tnlib.recipe import RecipeError, dense_modules, match, model_type
from tnlib.shapes import ShapeError, weight_of


@dataclass(frozen=True)
class HiddenOrder:
    """One order of an MLP's neurons, and what it does to the Kronecker fits of the matrices that a recipe claims."""

    order: torch.Tensor  # (hidden,) int64: the neuron at each place
    before: dict[str, float]  # rho of each claimed matrix, natural order
    after: dict[str, float]  # rho of each in the new order


def hidden_orders(model, recipe, sweeps=10):
    """Orders of the neurons, one for each MLP of which `recipe` claims a matrix with a Kronecker form; touches nothing.

    The order is searched for jointly: the sum over the claimed matrices of ||product||^2 is what rises, so that one of
    them may lose a little where the others gain more. From the natural order and from sorted ones (`arrange.py`).
    sweeps: most passes over the neurons
    Returns: dictionary from block name ("model.layers.3") to HiddenOrder
    Raises: RecipeError for a family that families.py does not know, and when no MLP is claimed; ShapeError when the claimed
        matrices of one MLP split the hidden axis differently
    Exact: the sum over a block of ||weight||^2 rho^2 is not below that of the natural order.
    """
    found = {}
    for block, members in _blocks(model, recipe).items():
        claimed = {name: (role, module, form) for name, (role, module, form) in members.items() if form is not None}
        if claimed:
            found[block] = _search({name: _view(name, *member) for name, member in claimed.items()}, sweeps)
    if not found:
        raise RecipeError(
            f"recipe {recipe.name!r}: hidden_orders found no MLP matrix with a Kronecker form among its claims; needed at "
            "least one of the roles gate, up, down. Call it before factorize_, with a rule such as where='mlp'."
        )
    return found


def permute_hidden_(model, orders):
    """Put the neurons of each block into the order of `orders` (hidden_orders, or block name -> (hidden,) tensor), in place.

    Rows of up and gate with their biases, columns of down, claimed by the recipe or not. Call it before factorize_.
    Raises: RecipeError for a block that the model does not have or whose matrices are tied to others
    Exact: the model computes the same function, up to rounding.
    """
    blocks, moves = _blocks(model), []
    for block, order in orders.items():
        order = getattr(order, "order", order)
        if block not in blocks:
            raise RecipeError(f"permute_hidden_: got block {block!r}; needed one of {', '.join(blocks)}.")
        for name, (role, module, _) in blocks[block].items():
            if len(tied_names(model, name)) > 1:
                raise RecipeError(
                    f"permute_hidden_: {name} is tied to another module; needed one of its own. Untie them first."
                )
            weight = weight_of(module).detach()  # (out, in), a view
            moves.append((weight, weight[:, order] if role == "down" else weight[order]))
            if role != "down" and getattr(module, "bias", None) is not None:
                moves.append((module.bias.detach(), module.bias.detach()[order]))
    for old, new in moves:  # everything is computed by now: no error can stop half way
        old.copy_(new)


def _blocks(model, recipe=None):
    """{block: {module name: (role, module, resolved Kronecker form or None)}} for every MLP of the model."""
    family = model_type(model)
    if family not in FAMILIES:
        raise RecipeError(f"hidden orders: model type {family!r} is not known; needed one of {', '.join(FAMILIES)}.")
    forms = {m.name: m.rule for m in match(model, recipe)} if recipe is not None else {}
    blocks, offered, prefix = {}, dense_modules(model), getattr(model, "base_model_prefix", "")
    for role in ("gate", "up", "down"):
        for place in {p for full in patterns(family, role) for p in (full, full.removeprefix(f"{prefix}."))}:
            for name in offered:
                if re.fullmatch(re.escape(place).replace(r"\*", r"\d+"), name):
                    block = re.match(r"(.*?\.)?\d+(?=\.)", name).group()
                    form = _kronecker(forms.get(name), offered[name])
                    blocks.setdefault(block, {})[name] = (role, offered[name], form)
    return blocks


def _kronecker(rule, module):
    if rule is None or not isinstance(rule.form, Kronecker) or rule.split > 1:
        return None
    return rule.form.resolve(tuple(weight_of(module).shape))


def _view(name, role, module, form):
    """An arrangement whose rows are the neurons."""
    weight = weight_of(module).detach().cpu()
    weight = weight if weight.dtype == torch.float64 else weight.float()
    natural = (torch.arange(size) for size in weight.shape)
    view = Arrangement(weight, form.left, form.right, form.terms, *natural)
    return replace(view.T, weight=weight.T.contiguous()) if role == "down" else view


def _search(views, sweeps):
    splits = {name: (view.left[0], view.right[0]) for name, view in views.items()}
    if len(set(splits.values())) > 1:
        raise ShapeError(
            f"hidden_orders: the matrices split the hidden axis as {splits} (left, right); needed one split for all of an "
            "MLP. Give up, gate and down right factors that agree on it, such as (4, 2), (4, 2) and (2, 4)."
        )
    names, given = list(views), list(views.values())
    for view in given:
        view.fit()
    before = _rhos(names, given)
    beside, split = torch.cat([view.weight for view in given], 1), (given[0].left[0], given[0].right[0])
    orders = [rows for rows, _ in sorted_orders(beside, (split[0], 1), (split[1], 1))] if min(split) > 1 else []
    start = max((_placed(given, rows) for rows in orders), key=_kept, default=given)
    ahead = max((_climb(some, 1) for some in ([replace(v) for v in given], start)), key=_kept)
    best = _climb(ahead, sweeps - 1)
    return HiddenOrder(best[0].rows, before, _rhos(names, best))


def _placed(views, rows):
    moved = [replace(view, rows=rows, basis=None) for view in views]
    for view in moved:
        view.fit()
    return moved


def _climb(views, sweeps):
    moves = (reassign, regroup) if max(v.right[0] * v.right[1] for v in views) <= SMALL else (reassign,)
    kept = _kept(views)
    for _ in range(sweeps):
        for move in moves:
            rows = move(views)
            for view in views:
                view.rows = rows
                view.fit()
        before, kept = kept, _kept(views)
        if kept - before <= 2e-5 * before:
            break
    return views


def _kept(views):
    """Sum of ||product||^2 over the matrices."""
    return sum(view.energy * view.rho**2 for view in views)


def _rhos(names, views):
    return {name: view.rho for name, view in zip(names, views)}
