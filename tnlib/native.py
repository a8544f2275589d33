"""What a transformers model is told after each exchange of layers: its ties, and that tnlib saves it."""

import copy
import sys

from tnlib.layer_data import replaced
from tnlib.ties import tell_ties

METHOD = "tnlib"  # quant_method in config.json


def tell_transformers(model, recipe=None, quantize=None):
    """Give a model the quantizer by which save_pretrained writes a checkpoint that from_pretrained reads; returns None.

    model: any module; only a transformers model has more than its ties told. Called after every exchange of layers
    recipe, quantize: what was just done, for the record in config.json; rules add up over several recipes
    The model's config becomes its own: other models may have been made from the same object (from_config shares it), and they
    would be taken for compressed ones. A model without replaced layers is an ordinary one again.
    Exact: no parameter or buffer changes.
    """
    tell_ties(model)
    if (transformers := sys.modules.get("transformers")) is None or not isinstance(model, transformers.PreTrainedModel):
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if not replaced(model):
        if is_ours(quantizer):
            quantizer.remove_quantization_config(model)
        return
    if quantizer is None:
        quantizer = _new_quantizer(model)
    if is_ours(quantizer):
        quantizer.quantization_config.note(recipe, quantize)
        model.is_quantized = False  # transformers would refuse model.half() and model.float(), which tnlib's layers bear


def record_recipe(model, recipe):
    """Let config.json name this recipe for what was done to a model, whatever was recorded before."""
    if is_ours(quantizer := getattr(model, "hf_quantizer", None)):
        quantizer.quantization_config.recipe = recipe.to_dict()


def is_ours(quantizer):
    """Whether a model's hf_quantizer is tnlib's."""
    return quantizer is not None and quantizer.quantization_config.quant_method == METHOD


def _new_quantizer(model):
    """A quantizer out of transformers' registry, where checkpoint.py has put it."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD]())
    own_config(model).quantization_config = quantizer.quantization_config
    model.hf_quantizer, model.quantization_method = quantizer, METHOD
    return quantizer


def own_config(model):
    """A copy of the model's config, and of configs in it, put into all modules that had the old ones; returns it."""
    copies = {}  # deepcopy's own record: id of each old object -> the new one
    new = copy.deepcopy(model.config, copies)
    for module in model.modules():
        if id(old := module.__dict__.get("config")) in copies and old is not None:
            module.config = copies[id(old)]
    return new
