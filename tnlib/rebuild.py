"""From a model to its TNConfig and back: describe writes the record, rebuild makes empty layers of it, ties are filled in last."""

import copy

import torch

from tnlib.layer_data import layer_from_dict, layer_to_dict, refuse_foreign, replaced, share, shared
from tnlib.resume import own_tensors
from tnlib.shapes import ShapeError
from tnlib.surgery import swap
from tnlib.ties import tell_ties


def describe(model, config):
    """Write into a TNConfig what a model's replaced layers are, and what they share. Raises: QuantizeError for foreign grids"""
    layers = replaced(model)
    refuse_foreign(layers)
    config.modules = {name: layer_to_dict(layer) for name, layer in layers.items()}
    config.tied, config.run = shared(model, layers), None


def rebuild(model, config):
    """Put the empty layers of a TNConfig into a dense model on the meta device, in place; nothing is tied yet.

    Names are taken with or without the base model's prefix; what this class of model does not have, as AutoModel has no
    head, is left out.
    Returns: the layers' names there; {name: name of the same tensor or grid} of what is to be shared when it is filled
    Raises: ShapeError, naming the module, where the model has other sizes
    """
    found = {name: _name_in(model, name) for name in config.modules}
    found = {name: own for name, own in found.items() if own is not None}
    for name, own in found.items():
        try:
            layer = layer_from_dict(config.modules[name], model.get_submodule(own))
        except ShapeError as error:
            raise ShapeError(f"module {own}: {error}") from None
        if layer is not model.get_submodule(own):
            swap(model, own, layer)
    tell_ties(model)
    pairs = ((_tensor_in(model, name), _tensor_in(model, other)) for name, other in config.tied.items())
    known = getattr(model, "all_tied_weights_keys", {})
    return list(found.values()), {name: other for name, other in pairs if name and other and name not in known}


def _tensor_in(model, name):
    place, _, own = name.rpartition(".")
    found = _name_in(model, place)
    return None if found is None else f"{found}.{own}".removeprefix(".")


def _name_in(model, name):
    """The name of a module in this class of model, with or without the base model's prefix; None where it has none."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
            return candidate
        except AttributeError:
            continue
    return None


def check_loadable(model):
    """Raises: ValueError, naming tensors, when the class and config of a model do not make a model with these tensors."""
    twin = dense_twin(model)
    fill_ties(twin, rebuild(twin, model.config.quantization_config)[1])
    here, there = ({n: tuple(t.shape) for n, t in own_tensors(m).items()} for m in (model, twin))
    if odd := sorted(name for name in {**here, **there} if here.get(name) != there.get(name)):
        raise ValueError(
            f"save_pretrained: {type(twin).__name__} as its config says has other tensors than this model: {', '.join(odd[:4])} "
            f"({len(odd)} in all); needed the same, or from_pretrained could not read them. Save before layers are exchanged by "
            "other means (use_torchao_ is one), or set the config's sizes."
        )


def no_init(module):
    """Let transformers draw nothing for a module."""
    module._is_hf_initialized = True


def tie_by_name(model):
    """Tie by name, as tie_weights would, which is switched off while a model is made to be loaded."""
    fill_ties(model, model.all_tied_weights_keys)


def fill_ties(model, twins):
    """Let each name in a model be the tensor or grid of another, in place. twins: as from rebuild"""
    for name, other in twins.items():
        share(model, name, other)


def tie_all(model, twins, untied, missing_keys=(), **options):
    """What a model's tie_weights is while it is loaded: the model's own ties, and those of tnlib's layers.

    Raises: ValueError for a head whose embedding was replaced, and which the checkpoint lacks
    """
    if lost := sorted(untied & set(missing_keys)):
        raise ValueError(
            f"from_pretrained: the checkpoint has no {lost[0]}, and the table that it was tied to is replaced; needed a checkpoint "
            f"with this head. It was saved from a model without one: load it as such, or save it from a {type(model).__name__}."
        )
    type(model).tie_weights(model, missing_keys=missing_keys, **options)
    fill_ties(model, twins)


def dense_twin(model):
    """The dense model of a model's class and config, on the meta device."""
    kind = next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
    with torch.device("meta"):
        return kind(copy.deepcopy(model.config))


def hide(twins, model, state, prefix, metadata):
    """A hook of state_dict: what is stored under another name is not there."""
    for key in list(state):
        name = key.removeprefix(prefix)
        if any(name == twin or name.startswith(f"{twin}.") for twin in twins):
            del state[key]
