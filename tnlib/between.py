"""Grids of a layer's input and intermediate results."""

from dataclasses import replace

from torch import nn

from tnlib.quant import FakeQuantize


class Between(nn.Module):
    """Grids of a layer's input and intermediate results, one scale each, by place; see Form.forward.

    Places get their grids while `observing` is true, from the first tensor that passes.
    """

    def __init__(self, quantize):
        super().__init__()
        self.quantize, self.observing = replace(quantize, scales="tensor"), True
        self.grids = nn.ModuleDict()

    def forward(self, x, place):
        """x through the grid of its place."""
        if self.observing and place not in self.grids:
            self.grids[place] = FakeQuantize(x, self.quantize, self.quantize.activation_bits)
        return self.grids[place](x)
