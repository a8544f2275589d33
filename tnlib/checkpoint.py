"""Native transformers checkpoints: what config.json says of a compressed model, and how transformers reads and writes it.

    import tnlib as tn                                     # first, or transformers does not know such checkpoints
    model.save_pretrained("small")                         # after factorize_, quantize_, heal, …
    model = AutoModelForCausalLM.from_pretrained("small")

The name of each weight that was replaced stays in the file, with one number: a process that has not imported tnlib fails there
instead of drawing random weights. The hooks are those of transformers' own quantizers.
"""

import copy
import json
import re
from functools import partial

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tnlib.layer_data import layer_from_dict, layer_to_dict, refuse_foreign, replaced, share, shared
from tnlib.native import METHOD, own_config, tell_transformers
from tnlib.on_load import FactorizeOnLoad
from tnlib.recipe import Recipe
from tnlib.resume import own_tensors, weights
from tnlib.shapes import ShapeError
from tnlib.surgery import densify_, swap
from tnlib.ties import tell_ties

FORMAT = 1  # of `modules` and `tied`, and of the names of tensors
UPGRADES = {}  # {older format: function of its dictionary -> that of the next format}
GUARD = "weight"


@register_quantization_config(METHOD)
class TNConfig(QuantizationConfigMixin):
    """The quantization_config of a compressed model; with a recipe alone, what from_pretrained is to make of a dense one.

    recipe: a Recipe, or its dictionary; seed: as in factorize_, for a dense checkpoint
    modules: {name: layer as plain data}, tied: {name: name of the same tensor}, see layer_data.py; run: what factorize_folder
        was called with. Whoever loads a compressed checkpoint gives none of these: they are in its config.json
    Healing and quantizing are not done on load: call heal and quantize_ afterwards
    Raises: ValueError for a format that this tnlib cannot read, saying what to do; RecipeError for a recipe that is none
    Exact: TNConfig(**config.to_dict()).to_dict() equals config.to_dict().
    """

    def __init__(self, recipe=None, seed=0, modules=None, tied=None, run=None, format_version=FORMAT, quant_method=METHOD):
        self.quant_method, self.format_version = quant_method, format_version
        self.recipe = recipe.to_dict() if isinstance(recipe, Recipe) else recipe
        if self.recipe is not None:
            Recipe.from_dict(self.recipe)
        self.seed, self.modules, self.tied, self.run = seed, modules or {}, tied or {}, run

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """A TNConfig from config.json, older formats brought up to date."""
        return super().from_dict(upgraded(config_dict), return_unused_kwargs, **kwargs)

    def to_dict(self):
        """Plain data, as JSON has it."""
        kept = {name: value for name, value in self.__dict__.items() if value or name == "format_version"}
        return json.loads(json.dumps(kept))

    def note(self, recipe=None, quantize=None):
        """Add what was done to the record: the rules of several recipes add up, the last Quantize stands."""
        if recipe is not None:
            before = Recipe.from_dict(self.recipe).rules if self.recipe else ()
            data = recipe.to_dict()
            rules = [rule for rule in before if rule not in recipe.rules]
            self.recipe = data | {"rules": Recipe(name=recipe.name, rules=(*rules, *recipe.rules)).to_dict()["rules"]}
        if quantize is not None and self.recipe:
            self.recipe = self.recipe | {"quantize": copy.copy(quantize.__dict__)}


def upgraded(data):
    """The dictionary of a quantization_config in today's format. Raises: ValueError, with what to do, where there is no way."""
    data = dict(data)
    version = data.get("format_version")
    if not isinstance(version, int) or version > FORMAT or (version < FORMAT and version not in UPGRADES):
        way = (
            "Update tnlib."
            if isinstance(version, int) and version > FORMAT
            else "Load it with the tnlib that wrote it, call model.dequantize() and save; or factorize the dense model again."
        )
        raise ValueError(f"tnlib checkpoint: got format_version={version!r}; this tnlib reads {[*UPGRADES, FORMAT]}. {way}")
    while (version := data["format_version"]) < FORMAT:
        data = UPGRADES[version](data) | {"format_version": version + 1}
    return data


@register_quantizer(METHOD)
class TNQuantizer(HfQuantizer):
    """What transformers calls while it loads, saves, trains and dequantizes a model of tnlib's.

    Exact: a model that was saved and loaded in its own type has every bit that it had, and its ties.
    """

    is_trainable = is_qat_trainable = True  # Trainer wants both

    def is_serializable(self):
        """Always: what cannot be saved is refused by get_state_dict_and_metadata, by name."""
        return True

    # ------------------------------------------------------------------------------------------------ save

    def get_state_dict_and_metadata(self, model):
        """The tensors to write, each once, guards among them; the model's config gets its quantization_config now.

        Raises: ValueError for a model that from_pretrained could not build again, before anything is written
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter's
        layers = replaced(model)
        if model.config.quantization_config is not self.quantization_config:
            own_config(model).quantization_config = self.quantization_config
        describe(model, self.quantization_config)
        check_loadable(model)
        tensors = weights(model)
        dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
        return tensors | {f"{name}.{GUARD}": torch.zeros(1, dtype=dtype) for name in layers}, {}

    # ------------------------------------------------------------------------------------------------ load

    def param_needs_quantization(self, model, param_name, **kwargs):
        """Whether a tensor of a dense checkpoint is to be factorized."""
        return not self.pre_quantized and self.on_load.waits_for(param_name)

    def get_quantize_ops(self):
        """The operation that factorizes it."""
        return self.on_load

    def _process_model_before_weight_loading(self, model, **kwargs):
        _tie(model)
        if not self.pre_quantized:
            if self.quantization_config.recipe is None:
                raise ValueError("TNConfig: got no recipe for a dense checkpoint; needed one. Use TNConfig(recipe=…).")
            recipe = Recipe.from_dict(self.quantization_config.recipe)
            self.on_load = FactorizeOnLoad(model, recipe, self.quantization_config.seed)
            return
        ties = dict(model.all_tied_weights_keys)
        names, twins = rebuild(model, self.quantization_config)
        untied = ties.keys() - model.all_tied_weights_keys.keys()
        for name in names:
            model.get_submodule(name).apply(_no_init)
        ignored = (rf"(^|\.){re.escape(name)}\.{GUARD}$" for name in (*names, *self.quantization_config.modules))
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
        # The loader's own list of ties is for parameters only, and reads weights of layers that are half tied.
        self.hidden = model.register_state_dict_post_hook(partial(_hide, twins))
        model.tie_weights = partial(_tie_all, model, twins, untied)  # called when all is read, before layers are spread over devices

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            self.hidden.remove()
            del self.hidden, model.tie_weights
        else:
            del self.on_load
            self.pre_quantized = True
        tell_transformers(model)
        return model

    # ------------------------------------------------------------------------------------------------ back to dense

    def dequantize(self, model, dtype=None):
        """Dense layers again, Conv1D where it was; model.dequantize() calls this. dtype: to cast to; None: as it is."""
        densify_(model)
        return model if dtype is None else model.to(dtype)


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


def _no_init(module):
    module._is_hf_initialized = True


def _tie(model):
    """Tie by name, as tie_weights would, which is switched off while a model is made to be loaded."""
    fill_ties(model, model.all_tied_weights_keys)


def fill_ties(model, twins):
    """Let each name in a model be the tensor or grid of another, in place. twins: as from rebuild"""
    for name, other in twins.items():
        share(model, name, other)


def _tie_all(model, twins, untied, missing_keys=(), **options):
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


def _hide(twins, model, state, prefix, metadata):
    """A hook of state_dict: what is stored under another name is not there."""
    for key in list(state):
        name = key.removeprefix(prefix)
        if any(name == twin or name.startswith(f"{twin}.") for twin in twins):
            del state[key]
