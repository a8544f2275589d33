"""Quantization of whole models: fake_quantize_ trains on a grid, quantize_ stores it. Layers know nothing of either.

A factor or a weight gets a parametrization (torch.nn.utils.parametrize): reading layer.core0 then gives what the grid leaves of it.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from tnlib.between import Between
from tnlib.block_low_rank import BlockLowRank
from tnlib.experts import fused_experts
from tnlib.layers import FactorizedEmbedding, FactorizedLinear
from tnlib.low_rank import LowRank
from tnlib.modes import eval_mode
from tnlib.native import tell_transformers
from tnlib.packing import Packed, QuantizedEmbedding, packed_bytes, put_packed
from tnlib.quant import FakeQuantize, QuantizeError
from tnlib.recipe import dense_modules

EXAMPLES = 16  # rows of `data` that activation scales start from


class Target(NamedTuple):
    """A tensor to quantize: attribute `attribute` of the module called `name`."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def parametrization(self):
        """What stands on it: FakeQuantize, Packed, or None."""
        found = getattr(self.module, "parametrizations", {})
        return found[self.attribute][0] if self.attribute in found else None

    @property
    def original(self):
        """The float tensor itself, under the FakeQuantize that may stand on it."""
        if self.parametrization is None:
            return getattr(self.module, self.attribute)
        return self.module.parametrizations[self.attribute].original


def targets(model, quantize):
    """The tensors that a Quantize means, tied ones under each of their names.

    Raises: QuantizeError when there are none, and for a mixture of experts, most of which would stay float unsaid
    """
    found = []
    if quantize.what == "dense" and (fused := fused_experts(model)):
        name, shape = next(iter(fused.items()))
        raise QuantizeError(
            f"Quantize(what='dense'): {name} {shape} holds fused experts, {len(fused)} such parameters in all; needed matrices. "
            "Only what='factors' works for a mixture of experts."
        )
    for name, module in model.named_modules():
        if quantize.what == "factors" and isinstance(module, (FactorizedLinear, FactorizedEmbedding)):
            sizes = module.form.factor_shapes(module.shape)
            found += [Target(name, module, factor) for factor, size in sizes.items() if len(size) > 1]
    if quantize.what == "dense":
        found = [Target(name, module, "weight") for name, module in dense_modules(model).items()]
    if not found:
        raise QuantizeError(
            f"Quantize(what={quantize.what!r}): this {type(model).__name__} has no such tensors that are still float; needed some. "
            "Factorize it first, or choose the other of 'factors' and 'dense'."
        )
    return found


def fake_quantize_(model, quantize, data=None):
    """See every tensor that `quantize` means through its integer grid from now on, in place; training goes through it.

    model: factorized, or dense where quantize.what is "dense"; it stays float, and its parameters stay what they were
    data: windows (n, context) or a dictionary of input tensors, needed where quantize.activation_bits is set: the scales
        of activations start from its first EXAMPLES rows
    Raises: QuantizeError for a model without such tensors or with a grid on them already, for NaN, or for missing data
    Exact: afterwards every such tensor is a fixed point of its grid; quantize_ then changes no bit of it.
    """
    found = targets(model, quantize)
    refuse_there("fake_quantize_", found, (FakeQuantize, Packed))
    if quantize.activation_bits and data is None:
        raise QuantizeError(
            f"fake_quantize_: got activation_bits={quantize.activation_bits} and no data; needed examples to start the scales from. "
            "Give data=, the training data."
        )
    fakes = {}  # a shared tensor once; all of them, and the activations', before any is put in place
    for target in found:
        if id(target.original) not in fakes:
            with _named("fake_quantize_", target):
                fakes[id(target.original)] = FakeQuantize(target.original, quantize)
    if quantize.activation_bits:
        _quantize_activations(model, quantize, data)
    for target in found:
        fake = fakes[id(target.original)].train(target.module.training)
        parametrize.register_parametrization(target.module, target.attribute, fake)
    tell_transformers(model, quantize=quantize)


def refuse_there(verb, found, kinds):
    """Refuse tensors on which one of `kinds` stands."""
    for target in found:
        if isinstance(target.parametrization, kinds):
            raise QuantizeError(
                f"{verb}: {target.name}.{target.attribute} has a {type(target.parametrization).__name__} already; needed a "
                "float tensor. Quantize a copy of the model that has none."
            )


@contextmanager
def _named(verb, target):
    """Say which tensor of the model it was that could not be quantized."""
    try:
        yield
    except QuantizeError as error:
        raise QuantizeError(f"{verb}, {target.name}.{target.attribute}: {error}") from None


def _quantize_activations(model, quantize, data):
    """Give every factorized linear layer a Between, and start its scales from the data's first rows."""
    layers = [module for module in model.modules() if isinstance(module, FactorizedLinear)]
    for layer in layers:
        layer.between = Between(quantize)
    rows = data if isinstance(data, dict) else {"input_ids": data}
    device = next(model.parameters()).device
    inputs = {name: tensor[:EXAMPLES].to(device) for name, tensor in rows.items() if name != "labels"}
    if inputs["input_ids"].dtype == torch.int32:
        inputs["input_ids"] = inputs["input_ids"].long()
    try:
        with eval_mode(model), torch.no_grad():
            model(**inputs)
    except BaseException:
        for layer in layers:
            layer.between = None
        raise
    for layer in layers:
        layer.between.train(layer.training).observing = False
        if not layer.between.grids:
            layer.between = None  # the data never came here: a head that this task does not use


def quantize_(model, quantize):
    """Store every tensor that `quantize` means as packed integers and scales, in place; returns None.

    model: fake-quantized by the same Quantize (its learned scales are taken), or float (scales start from the tensors)
    Afterwards the tensors are buffers that are unpacked when they are read, on any device; an embedding table unpacks the
    rows looked up only. Grids of activations stay as fake_quantize_ left them, in float.
    Raises: QuantizeError for bits that are not stored (2, 4, 8), for another Quantize than the model was trained with, for
        embedding rows that a group of numbers does not divide; the model is then as it was
    Exact: the model computes what it did fake-quantized, bit for bit; its bytes are those that quantized_size names.
    """
    packed_bytes((0,), quantize.bits)
    found = targets(model, quantize)
    refuse_there("quantize_", found, Packed)
    stored, tables = {}, {}  # a shared tensor once; all of them, before any is put in place
    for target in found:
        there, tensor = target.parametrization, target.original.detach()
        if there is not None and there.quantize != quantize:
            raise QuantizeError(
                f"quantize_: {target.name}.{target.attribute} was trained on the grid {there.quantize}; needed the same, got {quantize}."
            )
        with _named("quantize_", target):
            if id(target.original) not in stored:
                stored[id(target.original)] = Packed(tensor, there or FakeQuantize(tensor, quantize))
            if _is_table(target):
                tables[target.name] = _table(target.module, stored[id(target.original)])
    for target in found:
        _put(model, target, stored[id(target.original)], tables.get(target.name))
    tell_transformers(model, quantize=quantize)


def _is_table(target):
    """Whether rows are looked up in this very tensor."""
    low_rank = isinstance(target.module, FactorizedEmbedding) and isinstance(target.module.form, (LowRank, BlockLowRank))
    return isinstance(target.module, nn.Embedding) or (low_rank and target.attribute == "left")


def _table(old, packed):
    right = old.right if isinstance(old, FactorizedEmbedding) else None
    return QuantizedEmbedding(packed, right, old.padding_idx).train(old.training)


def _put(model, target, packed, table):
    """Replace a tensor by what is stored of it, or the whole module by its `table`."""
    if _is_table(target):
        model.set_submodule(target.name, table)
        return
    module = table or target.module  # a low-rank table has its second factor to put
    put_packed(module, target.attribute, packed)
