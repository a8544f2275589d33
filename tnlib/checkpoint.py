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
import sys
from functools import partial

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tnlib.layer_data import replaced
from tnlib.native import METHOD, own_config, tell_transformers
from tnlib.on_load import FactorizeOnLoad
from tnlib.rebuild import check_loadable, describe, hide, no_init, rebuild, tie_all, tie_by_name
from tnlib.recipe import Recipe
from tnlib.resume import own_tensors, weights
from tnlib.surgery import densify_

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

        A state_dict given to save_pretrained is what is written. Under FSDP the Trainer gathers one and then comes here in
        the first process alone, where gathering again would wait for ever.
        Raises: ValueError for a model that from_pretrained could not build again, and for a state_dict that lacks some of its
            tensors, before anything is written
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter's
        layers = replaced(model)
        if getattr(model.config, "quantization_config", None) is not self.quantization_config:
            own_config(model).quantization_config = self.quantization_config
        describe(model, self.quantization_config)
        check_loadable(model)
        given = _given_state(sys._getframe(1))
        tensors = weights(model) if given is None else {name: given[name].contiguous() for name in _needed(model, given)}
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
        tie_by_name(model)
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
            model.get_submodule(name).apply(no_init)
        ignored = (rf"(^|\.){re.escape(name)}\.{GUARD}$" for name in (*names, *self.quantization_config.modules))
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
        # The loader's own list of ties is for parameters only, and reads weights of layers that are half tied.
        self.hidden = model.register_state_dict_post_hook(partial(hide, twins))
        model.tie_weights = partial(tie_all, model, twins, untied)  # called when all is read, before layers are spread over devices

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


def _given_state(caller):
    """The state_dict that save_pretrained was called with, out of its frame: transformers does not pass it on."""
    return caller.f_locals.get("state_dict") if caller.f_code.co_name == "save_pretrained" else None


def _needed(model, given):
    """Names of the tensors that a checkpoint of the model must have; refuses a state without them."""
    names = list(own_tensors(model))
    if lost := [name for name in names if name not in given]:
        raise ValueError(
            f"save_pretrained: state_dict has {len(given)} tensors and lacks {', '.join(lost[:3])}; needed all {len(names)} of the "
            "model. Give model.state_dict(), gathered from all processes, or none."
        )
    return names
