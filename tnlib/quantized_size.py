"""The size of a quantized model's checkpoint, named before any weight moves."""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from tnlib.packing import Packed, packed_bytes
from tnlib.quant import FakeQuantize
from tnlib.quantize import refuse_there, targets

ENTRY = 66  # bytes beside the name of a tensor at the head of a safetensors file: type, shape, places


@dataclass(frozen=True, kw_only=True)
class QuantizedSize:
    """Bytes that a checkpoint of a quantized model holds, by part; tied tensors once."""

    codes: int  # packed integers
    scales: int  # and smallest integers of grids that are not symmetric
    floats: int  # tensors that no Quantize means: biases, norms, …
    parameters: int  # numbers that all of these stand for, scales not counted
    header: int = field(default=0, compare=False)  # names and shapes at the head of the file, to a few per cent

    @property
    def bytes(self):
        """Of all tensors."""
        return self.codes + self.scales + self.floats

    @property
    def file_bytes(self):
        """Of the safetensors file. Small models notice: BERT's names alone take 50 kB."""
        return self.bytes + self.header

    @property
    def bits_each(self):
        """Bits stored for each parameter, scales included."""
        return 8 * self.bytes / self.parameters

    def __str__(self):
        parts = f"integers {self.codes / 1e6:.3f}, scales {self.scales / 1e6:.3f}, floats {self.floats / 1e6:.3f}"
        parts += f", header {self.header / 1e6:.3f}"
        return f"{self.file_bytes / 1e6:.3f} MB ({parts}); {self.parameters / 1e6:.2f}M parameters, {self.bits_each:.2f} bits each"


def quantized_size(model, *quantizes):
    """What a model will take when it has been quantized by each of `quantizes`, before any weight moves.

    model: float, fake-quantized or quantized in part, on any device, the meta device too; without any Quantize, what it
        takes as it is
    Returns: QuantizedSize. Scales that remain in float, 8 bytes for each activation, are not counted
    Raises: QuantizeError where there is nothing to quantize, or it is quantized already
    Exact: `bytes` equals those of the tensors that save_weights writes after quantize_; `file_bytes` its file's within 2 %.
    """
    chosen, names = {}, {}  # tensors to be packed, with their Quantize; the names under which they will be stored
    for quantize in quantizes:
        found = targets(model, quantize)
        refuse_there("quantized_size", found, Packed)
        chosen = {id(target.original): (target.original, quantize) for target in found} | chosen
        for target in found:
            parts = ("codes", "scale") if quantize.symmetric else ("codes", "scale", "low")
            place = f"{target.name}.parametrizations.{target.attribute}.0"
            names.setdefault(id(target.original), [f"{place}.{part}" for part in parts])
    codes = sum(packed_bytes(tensor.shape, quantize.bits) for tensor, quantize in chosen.values())
    scales = sum(_scale_bytes(tensor, quantize) for tensor, quantize in chosen.values())
    grids = [module for module in model.modules() if isinstance(module, (FakeQuantize, Packed))]
    packed = [module for module in grids if isinstance(module, Packed)]
    codes += sum(grid.codes.nbytes for grid in packed)
    scales += sum(grid.scale.nbytes + (0 if grid.low is None else grid.low.nbytes) for grid in packed)
    counted = {id(tensor) for grid in grids for tensor in (*grid.parameters(), *grid.buffers())} | chosen.keys()
    kept = {id(t): t for t in (*model.parameters(), *_persistent(model)) if id(t) not in counted}
    stay = [name for name, tensor in _named_tensors(model) if id(tensor) not in chosen]
    numbers = [tensor.numel() for tensor, _ in chosen.values()] + [grid.quantized_elements for grid in packed]
    return QuantizedSize(
        codes=codes,
        scales=scales,
        floats=sum(tensor.nbytes for tensor in kept.values()),
        parameters=sum(numbers) + sum(p.numel() for p in model.parameters() if id(p) in kept),
        header=sum(len(name) + ENTRY for name in (*stay, *(name for parts in names.values() for name in parts))),
    )


def _scale_bytes(tensor, quantize):
    """Bytes of a tensor's scales, and of its smallest integers where the grid is not symmetric."""
    scale = 8 if tensor.dtype == torch.float64 else 4
    return (scale if quantize.symmetric else scale + 2) * _blocks(tensor.shape, quantize.scales)


def _blocks(shape, scales):
    """Scales of a tensor of this shape."""
    if isinstance(scales, int):
        return math.ceil(math.prod(shape) / scales)
    return 1 if scales == "tensor" else shape[0 if len(shape) < 3 else 1]


def _persistent(model):
    return (tensor for name, tensor in _named_tensors(model) if not isinstance(tensor, nn.Parameter))


def _named_tensors(model):
    """What save_weights writes: parameters and persistent buffers, each once."""
    names = model.state_dict().keys()
    return [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in names)]
