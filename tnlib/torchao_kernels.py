"""Integer kernels of torchao (extra "quant") under low-rank layers: a trial, with the numbers that it gave.

tnlib's own storage (quantize_) unpacks weights to float when they are read. Here torchao 0.18 keeps each of the two thin
matrices of a LowRank layer, or a dense weight, as int8 or int4, and its kernel multiplies. Milliseconds of a forward pass of
MiniLM, one thread of a Xeon with AMX, torch 2.13, not compiled, medians; LowRank(kept=0.5) but for "dense":

    tokens    dense float32    float32    quantize_, 8 bits    int8    int8, dynamic    dense int8    dense int8, dynamic
         1             12.4       12.1                25.7    15.4             53.8          21.9                    34.6
        64             42.5       34.6                55.8    42.4            104.1          52.8                    59.5
       512            190.6      148.1               170.4   157.0            279.7         208.8                   246.6

So on a CPU no kernel is faster than float32; int8 takes a quarter of the memory at 1.1 to 1.3 times the time, less than unpacking
does. int4 needs CUDA and the package mslk, and has not been tried here; nor has CUDA.
"""

from torch import nn

from tnlib.layers import FactorizedLinear
from tnlib.low_rank import LowRank
from tnlib.quant import QuantizeError

TRIAL = 32  # columns and rows of the layer on which a kernel is tried


def use_torchao_(model, bits=8, dynamic=False):
    """Put torchao's weights under the linear layers of a model, in place: for inference, no gradients pass.

    Each LowRank layer becomes two nn.Linear, right then left, biases kept; every other factorized layer is left alone, so
    densify_ what should be covered; grids of activations are dropped. Dense nn.Linear are covered too, but not an output head that is tied to an embedding
    bits: 8 (one scale a row), or 4 (groups of 32; torchao needs CUDA, bfloat16 and mslk for it); dynamic: with 8 bits, inputs are rounded to 8
        bits as well, a scale for each token, and the product is one of integers
    Raises: QuantizeError where torchao is missing, or has no kernel for this device and type; the model is then as it was
    Exact: none; int8 weights of Gaussian entries leave an error of 0.4 % of the output, dynamic int8 of 0.8 %.
    """
    quantize, config = _torchao(bits, dynamic)
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    new = {}
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear) and isinstance(layer.form, LowRank):
            new[name] = _two_layers(layer)
        elif type(layer) is nn.Linear and id(layer.weight) not in tied:
            new[name] = _linear(layer.weight, layer.bias)
    if not new:
        raise QuantizeError(
            "use_torchao_: the model has neither LowRank layers nor nn.Linear; needed some. Call densify_ on it first."
        )
    _try(quantize, config, next(parameter for layer in new.values() for parameter in layer.parameters()), bits)
    for layer in new.values():
        quantize(nn.Sequential(layer), config)
    for name, layer in new.items():
        model.set_submodule(name, layer.eval())


def _torchao(bits, dynamic):
    """torchao's quantize_ and a configuration of it."""
    if bits not in (4, 8) or (dynamic and bits != 8):
        raise QuantizeError(
            f"use_torchao_: got bits={bits}, dynamic={dynamic}; needed bits=8, or bits=4 with dynamic=False."
        )
    try:
        from torchao import quantization
    except ImportError as error:
        raise QuantizeError(
            f"use_torchao_: torchao cannot be imported ({error}). Install it: pip install 'tnlib[quant]'."
        ) from None
    if bits == 4:
        return quantization.quantize_, quantization.Int4WeightOnlyConfig(group_size=32)
    kind = quantization.Int8DynamicActivationInt8WeightConfig if dynamic else quantization.Int8WeightOnlyConfig
    return quantization.quantize_, kind(set_inductor_config=False)  # torch's global settings are not ours to change


def _try(quantize, config, weight, bits):
    """Refuse where a small layer of the same device and type does not run."""
    small = nn.Sequential(_linear(weight.new_ones(TRIAL, TRIAL), None))
    try:
        quantize(small, config)
        small(weight.new_ones(1, TRIAL))
    except Exception as error:  # each kernel has its own: missing packages, unknown operators, types
        raise QuantizeError(
            f"use_torchao_: torchao has no kernel for {bits} bits on {weight.device.type} in {weight.dtype} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Use bits=8, or quantize_, which stores and unpacks."
        ) from error


def _linear(weight, bias):
    """An nn.Linear around copies, frozen."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        setattr(layer, name, None if tensor is None else nn.Parameter(tensor.detach().clone(), requires_grad=False))
    return layer


def _two_layers(layer):
    """right, then left: the layer's function as two thin nn.Linear."""
    factors = layer.factors
    return nn.Sequential(_linear(factors["right"], None), _linear(factors["left"], layer.bias))
