"""Compression while from_pretrained reads a dense checkpoint: each matrix is factorized as it comes, and let go.

transformers asks for every tensor whether it needs quantization, and gives it to an operation instead of the model if so.
"""

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from tnlib.build import build, keep_bias, take_bias
from tnlib.plan import plan, tied_names
from tnlib.recipe import match
from tnlib.shapes import check_weight, weight_of
from tnlib.surgery import partners, share_layer, swap


class FactorizeOnLoad(ConversionOps):
    """The operation. model: without weights, on the meta device; recipe, seed: as in factorize_.

    Raises: RecipeError and ShapeError as factorize_, before anything is read
    Exact: the model ends as factorize_(model, recipe, seed=seed) would leave the dense one, bit for bit.
    """

    def __init__(self, model, recipe, seed):
        plan(model, recipe)
        self.recipe, self.seed = recipe, seed
        self.claims = {claim.name: (number, claim) for number, claim in enumerate(match(model, recipe))}
        self.uses = {name: [name, *partners(model, recipe, *claim)] for name, (_, claim) in self.claims.items()}
        self.waiting = {f"{use}.weight": name for name, uses in self.uses.items() for use in uses}
        self.waiting |= {f"{name}.bias": name for name, (_, claim) in self.claims.items() if claim.rule.split > 1}
        self.layers, self.biases = {}, {}
        for name in (use for uses in self.uses.values() for use in uses):
            model.get_submodule(name)._is_hf_initialized = True  # nothing is drawn for what is replaced

    def waits_for(self, key):
        """Whether the tensor of this name is to come here."""
        return key in self.waiting

    @torch.no_grad()
    def convert(self, input_dict, *args, model=None, missing_keys=None, **kwargs):
        """{name: [tensor]} of one tensor that was waited for -> what the model is still to be given: nothing."""
        ((key, value),) = input_dict.items()
        tensor, name = value[0] if isinstance(value, list) else value, self.waiting[key]
        missing_keys.discard(key)
        if key.endswith(".bias"):
            self.biases[name] = tensor
        elif name not in self.layers:
            self.layers[name] = self._built(name, tensor)
            self._place(model, name, tensor, missing_keys)
        if name in self.layers and name in self.biases:
            take_bias(self.layers[name], self.biases.pop(name))
        return {}

    def _built(self, name, tensor):
        number, claim = self.claims[name]
        dense = claim.module
        weight, bias = dense.weight, getattr(dense, "bias", None)
        dense.weight = nn.Parameter(tensor, requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(tensor.new_zeros(bias.shape), requires_grad=False)  # its own comes later, or came already
        try:
            check_weight(weight_of(dense), f"recipe {self.recipe.name!r}, module {name}")
            return build(name, dense, claim.rule, self.seed, number).layer
        finally:
            dense.weight = weight
            if bias is not None:
                dense.bias = bias

    def _place(self, model, name, tensor, missing_keys):
        """Put the layer, and those that share its factors, into the model; a head that stays dense gets the tensor."""
        layer, dense = self.layers[name], self.claims[name][1].module
        stays = set(tied_names(model, name)) - set(self.uses[name])
        swap(model, name, keep_bias(dense, layer))
        for other in self.uses[name][1:]:
            swap(model, other, share_layer(model.get_submodule(other), layer))
        if stays:
            weight = nn.Parameter(tensor)
            weight._is_hf_initialized = True
            for other in stays:
                model.get_submodule(other).weight = weight
        gone = {f"{use}.weight" for use in self.uses[name]}
        missing_keys.difference_update(gone, (f"{other}.weight" for other in stays))
        ties = model.all_tied_weights_keys
        model.all_tied_weights_keys = {to: of for to, of in ties.items() if to not in gone and of not in gone}
