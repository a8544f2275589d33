"""Layers that hold factors instead of a weight: FactorizedLinear, FactorizedEmbedding, SplitLinear.

A layer knows its form (shapes and ranks), its (out, in) shape and the dense class it replaced. It does not know papers,
budgets or quantization.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tnlib.explain import explain
from tnlib.factorized import Factorized
from tnlib.form import measured_error
from tnlib.shapes import ShapeError, is_conv1d, weight_of


class FactorizedLinear(Factorized):
    """Drop-in for nn.Linear or GPT-2's Conv1D whose weight is held as factors: x (…, in) -> (…, out).

    Exact: equals F.linear(x, layer.weight, layer.bias) for every plan of contraction, up to rounding.
    """

    def __init__(self, form, shape, bias=True, source="Linear", device=None, dtype=None, draw=True):
        super().__init__(form, shape, device, dtype, draw)
        self.source = source  # class name of the layer replaced, so that densify_ can put it back
        self.in_features, self.out_features = self.shape[1], self.shape[0]
        bias = nn.Parameter(torch.zeros(self.shape[0], device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", bias)

    @classmethod
    def from_dense(cls, dense, form, init="svd", generator=None):
        """Factorize nn.Linear, Conv1D or a bare (out, in) weight; bias, dtype, device and requires_grad are kept.

        init: 'svd', 'random' (Gaussian of the weight's variance), 'scratch' (Gaussian whose product has the standard
            deviation 1/sqrt(out + in), as Yang et al. draw their cores: nothing of the weight enters), or what else the
            form knows ('norm', 'prune')
        Raises: ShapeError on NaN or infinite weights and on forms that do not fit
        Exact: at full rank the new layer computes what the old one did.
        """
        weight = dense if isinstance(dense, torch.Tensor) else weight_of(dense)
        bias = getattr(dense, "bias", None)
        source = "Conv1D" if is_conv1d(dense) else "Linear"
        layer = cls(form, weight.shape, bias is not None, source, weight.device, weight.dtype, draw=False)
        if bias is not None:
            with torch.no_grad():
                layer.bias.copy_(bias)
        layer._fit(weight, init, generator)
        return layer.train(getattr(dense, "training", True))

    def to_dense(self):
        """The dense layer again, of the class that was replaced, with the weight that the factors stand for."""
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return dense_layer(self.weight.detach().clone(), bias, self.source, self.training)

    def flops(self, tokens=1):
        """Multiply-adds times two for `tokens` inputs by the plan with the fewest; bias not counted."""
        return self.form.flops(self.shape, tokens)

    def explain(self, tokens=512):
        """Every plan for so many tokens with its predicted and measured time; see explain.py."""
        return explain(self, tokens)

    def forward(self, x):
        """x: (…, in). Returns: (…, out), by the plan of contraction that form.forward chooses for that many tokens."""
        again = None if torch.compiler.is_compiling() else self.kept.again.get(x.shape)
        stored = self._parameters  # of the layer itself; what is not there is computed
        settled = again is not None and not self.training and self.plan is None and self.between is None and "bias" in stored
        if settled and again.fits(x, stored, self._buffers):
            return again.through(x, stored["bias"])
        if x.shape[-1] != self.shape[1]:
            raise ShapeError(
                f"FactorizedLinear: got input {tuple(x.shape)}; needed (…, {self.shape[1]}), weight {self.shape} (out, in)."
            )
        operands = self.operands
        if x.numel() == 0 or not operands:
            return F.linear(x, self.weight, self.bias)
        room = None if torch.compiler.is_compiling() else self.room(operands)
        return self.form.forward(x, operands, self.shape, self.bias, self.between, self.plan, self.kept, room)


class FactorizedEmbedding(Factorized):
    """Drop-in for nn.Embedding whose (rows, dim) table is held as factors; a look-up never builds the table.

    Exact: equals F.embedding(ids, layer.weight), up to rounding.
    """

    def __init__(self, form, shape, padding_idx=None, device=None, dtype=None, draw=True):
        super().__init__(form, shape, device, dtype, draw)
        self.num_embeddings, self.embedding_dim = self.shape
        self.padding_idx = padding_idx

    @classmethod
    def from_dense(cls, dense, form, init="svd", generator=None):
        """Factorize an nn.Embedding or a bare (rows, dim) table; dtype, device and padding index are kept.

        Raises: ShapeError on max_norm or scale_grad_by_freq, which act on rows that no longer exist
        """
        if getattr(dense, "max_norm", None) is not None or getattr(dense, "scale_grad_by_freq", False):
            raise ShapeError(
                "FactorizedEmbedding: got an embedding with max_norm or scale_grad_by_freq, which need stored rows. Unset them."
            )
        table = dense if isinstance(dense, torch.Tensor) else weight_of(dense)
        layer = cls(form, table.shape, getattr(dense, "padding_idx", None), table.device, table.dtype, draw=False)
        layer._fit(table, init, generator)
        return layer.train(getattr(dense, "training", True))

    def to_dense(self):
        """An nn.Embedding with the table that the factors stand for."""
        dense = nn.Embedding(*self.shape, self.padding_idx, _weight=self.weight.detach().clone(memory_format=torch.contiguous_format))
        return dense.train(self.training)

    def forward(self, ids):
        """ids: integers of any shape (…). Returns: (…, dim); only the rows asked for are built. Raises: IndexError (CPU)."""
        flat = ids.reshape(-1)  # (tokens,)
        if flat.numel() == 0:
            return F.embedding(ids, self.weight)
        if (
            not torch.compiler.is_compiling()
            and flat.device.type == "cpu"
            and not 0 <= (ends := [int(end) for end in flat.aminmax()])[0] <= ends[1] < self.shape[0]
        ):
            raise IndexError(
                f"FactorizedEmbedding: got ids {ends[0]}..{ends[1]}; needed 0..{self.shape[0] - 1}."
            )
        operands = self.operands
        room = None if torch.compiler.is_compiling() else self.room(operands)
        rows = self.form.rows(flat, operands, self.shape, self.plan, self.kept, room)  # (tokens, dim)
        return rows.reshape(*ids.shape, self.shape[1])


class SplitLinear(nn.Module):
    """Several layers side by side, outputs concatenated: GPT-2's fused q, k, v as three factorized matrices.

    Exact: equals the fused layer whose weight stacks the parts' weights along out.
    """

    def __init__(self, parts, source="Linear"):
        super().__init__()
        self.parts, self.source = nn.ModuleList(parts), source
        self.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        self.error = None  # relative Frobenius error of the stacked weight
        self.output_error = None  # as in Factorized

    @classmethod
    def from_dense(cls, dense, form, init="svd", generator=None, split=3):
        """Factorize each of `split` equal bands of a fused layer's outputs on its own.

        Raises: ShapeError if `split` does not divide the outputs
        """
        weight, bias = weight_of(dense), dense.bias
        if weight.shape[0] % split:
            raise ShapeError(f"SplitLinear: got {weight.shape[0]} outputs; needed a multiple of split={split}.")
        parts = []
        for k, band in enumerate(weight.chunk(split)):
            part = nn.Linear(band.shape[1], band.shape[0], bias is not None, device="meta")
            part.weight = nn.Parameter(band.detach(), requires_grad=False)
            if bias is not None:
                part.bias = nn.Parameter(bias.detach().chunk(split)[k], requires_grad=False)
            parts.append(FactorizedLinear.from_dense(part.train(dense.training), form, init, generator))
        layer = cls(parts, "Conv1D" if is_conv1d(dense) else "Linear")
        layer.error = (
            None if weight.device.type == "meta" else float(measured_error(weight.detach(), layer.weight.detach()))
        )
        return layer.train(dense.training)

    @property
    def weight(self):
        """The stacked (out, in) weight, rebuilt at every access."""
        return torch.cat([part.weight for part in self.parts])

    @property
    def bias(self):
        """The stacked bias (out,), or None."""
        return None if self.parts[0].bias is None else torch.cat([part.bias for part in self.parts])

    def num_params(self):
        """Numbers stored by all parts."""
        return sum(part.num_params() for part in self.parts)

    def flops(self, tokens=1):
        """Sum over the parts, see FactorizedLinear.flops."""
        return sum(part.flops(tokens) for part in self.parts)

    to_dense = FactorizedLinear.to_dense

    def forward(self, x):
        """x: (…, in). Returns: (…, out), the parts' outputs side by side."""
        return torch.cat([part(x) for part in self.parts], dim=-1)  # (…, out)


def dense_layer(weight, bias, source, training):
    """nn.Linear or Conv1D (`source`) with this (out, in) weight and this very bias."""
    out, width = weight.shape
    dense = _conv1d(out, width) if source == "Conv1D" else nn.Linear(width, out, bias is not None, device="meta")
    dense.weight = nn.Parameter((weight.T if source == "Conv1D" else weight).contiguous())
    dense.bias = bias
    return dense.train(training)


def _conv1d(out, width):
    from transformers.pytorch_utils import Conv1D  # only a model that had one gets here

    return Conv1D(out, width)
