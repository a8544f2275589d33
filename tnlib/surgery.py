"""In-place surgery: factorize_ puts a recipe's layers into a model, densify_ takes them out again."""

import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from tqdm.auto import tqdm

from tnlib.build import Fit, build, keep_bias, kept_layer
from tnlib.layers import FactorizedEmbedding, FactorizedLinear, SplitLinear, dense_layer
from tnlib.native import tell_transformers
from tnlib.packing import Packed, QuantizedEmbedding
from tnlib.plan import plan, tied_names
from tnlib.quant import FakeQuantize
from tnlib.recipe import RecipeError, match
from tnlib.shapes import ShapeError, check_weight, is_conv1d, weight_of


def factorize_(model, recipe, stats=None, *, fit=None, seed=0, progress=None, out=None):
    """Replace every module that the recipe claims by its factorized layer, in place; returns None.

    stats: from calibrate (or {module name: Moments}): each layer is then fitted to what enters it, so that outputs and not
        weights come near, a bias of its own along; None: the nearest weight. fit: settings of that, as in fit_layers_

    Everything is checked first (rules, shapes, finite weights), every new layer is built next, and only then are modules
    swapped: an error or an interruption leaves the model as it was. So dense and new layers are held at once; where there is no
    room for both, factorize_folder works from the disk.
    Tied weights stay tied: a head or a second embedding that shares a claimed table shares its factors afterwards (rule
    head="tied"), or keeps the old matrix (head="dense"); anything else that shares it is refused.
    seed: for random initializations; progress: a bar over modules (default: only on a terminal)
    out: folder in which every finished layer is kept, one file each: called again after an interruption, with the same model,
        recipe and seed, it goes on from there
    Raises: RecipeError, ShapeError, naming recipe and module; ValueError if `out` holds layers of another weight or recipe, and
        for stats that lack a module
    Exact: the parameters afterwards number plan(model, recipe).total.
    """
    plan(model, recipe)
    claims = match(model, recipe)
    for name, module, _ in claims:
        check_weight(weight_of(module), f"recipe {recipe.name!r}, module {name}")
    uses = {name: (name, *partners(model, recipe, name, module, rule)) for name, module, rule in claims}
    check_stats(stats, uses)
    hide = not (sys.stderr.isatty() if progress is None else progress)

    def make(numbered):
        number, (name, module, rule) = numbered
        given = name, module, rule, seed, number, Fit.of(uses[name], stats, fit)
        return build(*given) if out is None else kept_layer(out, *given)

    new, built = {}, []
    for claim, one in tqdm(all_built(claims, make), f"factorize {recipe.name}", len(claims), disable=hide):
        built.append(one)
        new[claim.name] = one.layer
        for other in uses[claim.name][1:]:
            new[other] = share_layer(model.get_submodule(other), one.layer)
    for one in built:
        one.write_bias()
    for name, layer in new.items():
        swap(model, name, layer)
    tell_transformers(model, recipe)


def check_stats(stats, uses):
    """Raises: ValueError where moments are missing. uses: {module: all names that it is used under}."""
    if stats is None:
        return
    lost = [name for names in uses.values() for name in names if name not in stats]
    lost += [names[0] for names in uses.values() if not any(name in stats and stats[name] is not None for name in names)]
    if lost:
        raise ValueError(
            f"factorize_: got stats of {len(stats)} modules, without {lost[0]} ({len(set(lost))} missing); needed all that are "
            "replaced. Calibrate with this recipe, on a text that reaches them all."
        )


def densify_(model, names=None):
    """Put dense layers back in place of factorized and quantized ones, with the weights that they stand for; returns None.

    names: of the layers to take; None: all. Layers that share factors must be named together
    Exact: the model computes the same function; a head that shared factors shares the dense table again.
    """
    tables = {}
    for name, layer in list(model.named_modules()):
        stored = _stored(layer)
        if stored is not None and ".parts." not in name and (names is None or name in names):
            dense = layer.to_dense() if hasattr(layer, "to_dense") else _off_grid(layer)
            dense.weight = tables.setdefault(id(stored), dense.weight)
            swap(model, name, keep_bias(layer, dense))
    tell_transformers(model)


def _stored(layer):
    """What layers that share a table have in common: the tensor or the Packed that holds the first part of it.

    None for a layer that is dense as it is
    """
    if isinstance(layer, SplitLinear):
        return _stored(layer.parts[0])
    if isinstance(layer, QuantizedEmbedding):
        return layer.packed
    factorized = isinstance(layer, (FactorizedLinear, FactorizedEmbedding))
    first = next(iter(layer.form.factor_shapes(layer.shape))) if factorized else "weight"
    grids = getattr(layer, "parametrizations", {})
    if first not in grids:
        return getattr(layer, first) if factorized else None
    grid = grids[first]
    if isinstance(grid[0], FakeQuantize):
        return grid.original
    return grid[0] if isinstance(grid[0], Packed) else None


def _off_grid(layer):
    """A dense layer again, with the weight that its grid leaves of it."""
    weight = weight_of(layer).detach().clone()
    if isinstance(layer, nn.Embedding):
        return nn.Embedding(*weight.shape, layer.padding_idx, _weight=weight).train(layer.training)
    return dense_layer(weight, layer.bias, "Conv1D" if is_conv1d(layer) else "Linear", layer.training)


def all_built(claims, make):
    """(claim, make(numbered claim)) in order, one matrix a thread: LAPACK's own threads gain little on one and stall on a busy machine."""
    threads = torch.get_num_threads()
    at_once = 1 if any(claim.module.weight.is_cuda for claim in claims) else min(threads, len(claims))
    pool = ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(threads // at_once,))
    try:
        yield from zip(claims, pool.map(make, enumerate(claims)))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a thread's setting is also what new threads start with


def partners(model, recipe, name, module, rule):
    """Modules that must share the new layer's factors; refuse what cannot."""
    others = [n for n in tied_names(model, name) if n != name]
    if isinstance(module, nn.Embedding) and rule.head == "dense":
        others = [n for n in others if isinstance(model.get_submodule(n), nn.Embedding)]
    for other in others:
        if rule.split > 1 or not isinstance(model.get_submodule(other), (nn.Linear, nn.Embedding)):
            raise RecipeError(
                f"recipe {recipe.name!r}, module {name}: its weight is tied to {other} "
                f"({type(model.get_submodule(other)).__name__}), which cannot share factors. Untie the two first, or leave {name} out."
            )
    return others


def share_layer(module, layer):
    """A layer for a tied module that uses `layer`'s parameters; its own bias stays."""
    meta = {"device": "meta", "draw": False}
    if isinstance(module, nn.Embedding):
        twin = FactorizedEmbedding(layer.form, layer.shape, module.padding_idx, **meta)
    else:
        twin = FactorizedLinear(layer.form, layer.shape, module.bias is not None, **meta)
        if module.bias is not None:
            twin.bias = module.bias
    twin.share_factors(layer)
    twin.error, twin.output_error = layer.error, layer.output_error
    return twin.train(module.training)


def swap(model, name, layer):
    parent, _, child = name.rpartition(".")
    if not name:
        raise ShapeError(
            "factorize_: the model itself is the claimed layer; wrap it, or use FactorizedLinear.from_dense."
        )
    setattr(model.get_submodule(parent), child, layer)
