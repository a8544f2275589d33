"""What a model's replaced layers are, as plain data, and empty layers from such data again: the middle part of config.json.

    {"layer": "FactorizedLinear", "form": {"kind": "LowRank", "rank": 8}, "shape": [48, 24], "source": "Conv1D", "bias": true,
     "error": 0.31, "grids": {"left": {"kind": "packed", "bits": 4, "scales": "tensor", "symmetric": true}, …}}

Tensors are not in it. What several layers share is said by name: {"lm_head.left": "model.embed_tokens.left"}.
"""

from dataclasses import asdict

import torch
from torch import nn
from torch.nn.utils import parametrize

from tnlib.between import Between
from tnlib.factorized import Factorized
from tnlib.layers import FactorizedEmbedding, FactorizedLinear, SplitLinear
from tnlib.packing import Packed, QuantizedEmbedding, put_packed
from tnlib.quant import FakeQuantize, Quantize, QuantizeError
from tnlib.recipe import form_from_dict, form_to_dict
from tnlib.shapes import ShapeError, is_conv1d, weight_of

GRIDS = (Packed, FakeQuantize)


def replaced(model):
    """{name: module} of all layers that tnlib has put into a model or put a grid on; a SplitLinear counts as one."""
    return {
        name: module
        for name, module in model.named_modules()
        if ".parts." not in name and (isinstance(module, (Factorized, SplitLinear, QuantizedEmbedding)) or _grids(module))
    }


def _grids(module):
    """{attribute: Packed or FakeQuantize} of a module's own tensors."""
    found = {name: held[0] for name, held in getattr(module, "parametrizations", {}).items()}
    return {name: grid for name, grid in found.items() if isinstance(grid, GRIDS)}


def grids_of(layer):
    """The Packed and FakeQuantize modules of a replaced layer."""
    return [*_grids(layer).values(), *([layer.packed] if isinstance(layer, QuantizedEmbedding) else [])]


def layer_to_dict(layer):
    """A replaced layer as plain data; layer_from_dict gives an empty one like it."""
    grids = {name: _grid_to_dict(grid) for name, grid in _grids(layer).items()}
    if isinstance(layer, SplitLinear):
        parts = [layer_to_dict(part) for part in layer.parts]
        data = {"layer": "SplitLinear", "shape": list(layer.shape), "source": layer.source, "parts": parts}
    elif isinstance(layer, QuantizedEmbedding):
        grids = {"packed": _grid_to_dict(layer.packed)} | grids
        sizes = {"shape": [layer.num_embeddings, layer.embedding_dim], "padding_idx": layer.padding_idx}
        right = None if layer.right is None else list(layer.right.shape)
        return {"layer": "QuantizedEmbedding", **sizes, "right": right, "grids": grids}
    elif isinstance(layer, Factorized):
        kind = "FactorizedLinear" if isinstance(layer, FactorizedLinear) else "FactorizedEmbedding"
        data = {"layer": kind, "form": form_to_dict(layer.form), "shape": list(layer.shape)}
        if kind == "FactorizedLinear":
            data |= {"source": layer.source, "bias": layer.bias is not None}
        else:
            data |= {"padding_idx": layer.padding_idx}
    else:
        source = "Embedding" if isinstance(layer, nn.Embedding) else "Conv1D" if is_conv1d(layer) else "Linear"
        return {"layer": source, "shape": list(weight_of(layer).shape), "grids": grids}
    data |= {"error": layer.error, "output_error": layer.output_error}
    if getattr(layer, "between", None) is not None:
        data["between"] = {"quantize": asdict(layer.between.quantize), "places": list(layer.between.grids)}
    return data | ({"grids": grids} if grids else {})


def _grid_to_dict(grid):
    if isinstance(grid, Packed):
        return {"kind": "packed", "bits": grid.bits, "scales": grid.scales, "symmetric": grid.symmetric}
    return {"kind": "trained", "bits": grid.bits, "quantize": asdict(grid.quantize)}


def layer_from_dict(data, dense):
    """The empty layer, on the meta device, that stands in the place of the dense module `dense`; its type is that one's.

    Raises: ShapeError when `dense` has another (out, in) shape than the data
    Exact: layer_to_dict(layer_from_dict(data, dense)) equals data.
    """
    if list(weight_of(dense).shape) != list(data["shape"]):
        raise ShapeError(
            f"got a dense {type(dense).__name__} {tuple(weight_of(dense).shape)} (out, in); needed {tuple(data['shape'])}, as the "
            "compressed layer is. Sizes in config.json and quantization_config are of two models."
        )
    layer = _empty(data, dense, {"device": "meta", "dtype": dense.weight.dtype})
    if data.get("between") is not None:
        layer.between = _between(data["between"])
    for attribute, grid in data.get("grids", {}).items():
        if attribute != "packed":
            _put_grid(layer, attribute, grid)
    if "error" in data:
        layer.error, layer.output_error = data["error"], data["output_error"]
    return layer


def _empty(data, dense, where):
    """The layer without grids."""
    kind, shape = data["layer"], tuple(data["shape"])
    if kind == "SplitLinear":
        weight = weight_of(dense)
        bands = [nn.Linear(weight.shape[1], part["shape"][0], **where) for part in data["parts"]]
        return SplitLinear([layer_from_dict(part, band) for part, band in zip(data["parts"], bands)], data["source"])
    if kind == "FactorizedLinear":
        form = form_from_dict(data["form"])
        return FactorizedLinear(form, shape, data["bias"], data["source"], draw=False, **where)
    if kind == "FactorizedEmbedding":
        return FactorizedEmbedding(form_from_dict(data["form"]), shape, data["padding_idx"], draw=False, **where)
    if kind == "QuantizedEmbedding":
        right = None if data["right"] is None else torch.empty(data["right"], **where)
        width = shape[1] if right is None else right.numel() // right.shape[-1]
        table = torch.empty(shape[0], width, **where)
        return QuantizedEmbedding(_packed(table, data["grids"]["packed"]), right, data["padding_idx"])
    if kind in ("Linear", "Conv1D", "Embedding"):
        return dense
    raise ValueError(f"quantization_config: unknown layer {kind!r}; needed one that this tnlib knows. Update tnlib.")


def _put_grid(layer, attribute, grid):
    tensor = getattr(layer, attribute)
    if grid["kind"] == "packed":
        put_packed(layer, attribute, _packed(tensor, grid))
    else:
        fake = FakeQuantize(tensor, Quantize(**grid["quantize"]), grid["bits"])
        parametrize.register_parametrization(layer, attribute, fake)


def _packed(tensor, grid):
    kind = Quantize(bits=grid["bits"], scales=grid["scales"], symmetric=grid["symmetric"])
    return Packed(tensor, FakeQuantize(tensor, kind))


def _between(data):
    between = Between(Quantize(**data["quantize"]))
    for place in data["places"]:
        empty = torch.empty(1, device="meta", dtype=torch.float32)
        between.grids[place] = FakeQuantize(empty, between.quantize, between.quantize.activation_bits)
    between.observing = False
    return between


def shared(model, names):
    """{later name: first name} of the tensors and grids that the modules `names` share, with each other or with the rest."""
    found, first = {}, {}
    grids = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, GRIDS)]
    tensors = model.state_dict(keep_vars=True).items()
    for name, thing in (*grids, *tensors):
        other = first.setdefault(id(thing), name)
        inside = any(_is_in(n, names) for n in (name, other))
        if other != name and inside and not any(name.startswith(f"{done}.") for done in found):
            found[name] = other
    return found


def _is_in(name, modules):
    """Whether one of `modules` holds what is called `name`."""
    parts = name.split(".")
    return any(".".join(parts[:k]) in modules for k in range(len(parts)))


def share(model, name, other):
    """Let `name` of a model be the very tensor or module that is called `other`."""
    where, _, own = other.rpartition(".")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, getattr(model.get_submodule(where), own))


def refuse_foreign(layers):
    """Raises: QuantizeError for a factor that another library's parametrization stands on, naming it."""
    for name, layer in layers.items():
        odd = set(getattr(layer, "parametrizations", {})) - set(_grids(layer))
        if odd and isinstance(layer, Factorized):
            raise QuantizeError(
                f"save: {name}.{min(odd)} has a parametrization that is none of tnlib's; needed plain factors, or fake_quantize_ or "
                "quantize_ on them. Take it off with torch.nn.utils.parametrize.remove_parametrizations."
            )
