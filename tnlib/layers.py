"""Layers that hold factors instead of a weight: FactorizedLinear, FactorizedEmbedding, SplitLinear.

A layer knows its form (shapes and ranks), its (out, in) shape and the dense class it replaced. It does not know papers,
budgets or quantization.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tnlib.explain import explain
from tnlib.form import Form, measured_error
from tnlib.kept import POLICIES, Kept
from tnlib.shapes import ShapeError, check_weight, is_conv1d, weight_of


class _Factorized(nn.Module):
    """What both layers share: factors as parameters named by the form, and the weight that they stand for."""

    def __init__(self, form, shape, device=None, dtype=None, draw=True):
        super().__init__()
        if not isinstance(form, Form):
            raise ShapeError(f"{type(self).__name__}: got form {form!r}; needed a Form such as LowRank(kept=0.5).")
        self.shape = (int(shape[0]), int(shape[1]))  # (out, in); for an embedding (rows, dim)
        self.form = form.resolve(self.shape)
        self.error = None  # relative Frobenius error of the decomposition this layer came from; None if drawn at random
        self.between = None  # module applied to the input and to intermediate results, see Form.forward
        self.plan = None  # name of the plan of contraction to take; None: the fastest for so many tokens
        self.kept = Kept()
        self.materialize = "auto"
        sizes = self.form.factor_shapes(self.shape)
        self._names = (tuple(sizes), tuple(self.form.index_shapes(self.shape)))  # of factors, of orders
        self._spare = max(0, math.prod(self.shape) - self.form.num_params(self.shape))
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=dtype, device=device)))
        for name, order in self.form.natural_orders(self.shape, device).items():
            self.register_buffer(name, order)
        if draw:
            self.load_factors(self.form.random(self.shape, device=device))

    @property
    def materialize(self):
        """What to keep in evaluation, see materialize_."""
        return self._materialize

    @materialize.setter
    def materialize(self, policy):
        if policy not in POLICIES:
            raise ValueError(f"materialize: got policy {policy!r}; needed one of {', '.join(POLICIES)}.")
        self._materialize = policy
        self.kept.clear()

    @property
    def factors(self):
        """The trainable tensors by name."""
        stored = self._parameters  # of the layer itself, which is quicker than to ask for an attribute
        return {name: stored[name] if name in stored else getattr(self, name) for name in self._names[0]}

    @property
    def orders(self):
        """Row and column orders by name, integer buffers; empty for a form that does not permute."""
        return {name: getattr(self, name) for name in self._names[1]}

    @property
    def operands(self):
        """Factors and orders by name, as the form's functions take them."""
        return self.factors | self.orders if self._names[1] else self.factors

    @property
    def weight(self):
        """The (out, in) weight that the factors stand for, rebuilt at every access; gradients flow to the factors."""
        return self.form.to_dense(self.operands, self.shape)

    def train(self, mode=True):
        """As in torch; what was kept for evaluation is given back."""
        if mode:
            self.kept.clear()
        return super().train(mode)

    def room(self, operands=None):
        """Numbers that may be kept from one call to the next: none in training, nor of factors computed at every access."""
        operands = self.operands if operands is None else operands
        if self.training or self.materialize == "never" or "parametrizations" in self._modules:
            return 0
        if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands.values()):
            return 0
        if any(operand.is_inference() for operand in operands.values()):
            return 0  # torch does not count their changes
        return math.inf if self.materialize == "always" else self._spare

    def num_params(self):
        """Numbers stored: factors and bias. Exact: equals the elements of the layer's own parameters."""
        bias = getattr(self, "bias", None)
        return self.form.num_params(self.shape) + (0 if bias is None else bias.numel())

    def load_factors(self, factors, error=None):
        """Put factors (from form.decompose or form.random) into parameters and buffers, keeping their dtype and device."""
        with torch.no_grad():
            for name, factor in factors.items():
                getattr(self, name).copy_(factor)
        self.error = None if error is None else float(error)

    def share_factors(self, other):
        """Use another layer's parameters and orders, as a tied output head uses its embedding's."""
        for name in self.operands:
            setattr(self, name, getattr(other, name))

    def _fit(self, weight, init, generator):
        """Factors of `weight` by the form's initialization `init`; or random ones, of the weight's own variance or of none's."""
        check_weight(weight, type(self).__name__)
        if weight.device.type == "meta":
            return
        weight = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
        if init in ("random", "scratch"):
            std = float(weight.std(correction=0)) if init == "random" else sum(self.shape) ** -0.5
            self.load_factors(self.form.random(self.shape, std, generator))
            self.error = float(measured_error(weight.cpu(), self.weight.detach().cpu()))
        else:
            factors, error = self.form.decompose(weight, init, generator)
            self.load_factors(factors, error)

    def extra_repr(self):
        out, width = self.shape
        error = "" if self.error is None else f", error={self.error:.4f}"
        return f"out={out}, in={width}, {self.form}, kept={self.form.share(self.shape):.3f}{error}"


class FactorizedLinear(_Factorized):
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

    def _may_repeat(self, x):
        """Whether this call can do what an earlier one in evaluation did, without another look."""
        if self.training or not self.kept.ready or torch.is_grad_enabled():
            return False
        return self.plan is None and self.between is None and not torch.is_autocast_enabled(x.device.type)

    def explain(self, tokens=512):
        """Every plan for so many tokens with its predicted and measured time; see explain.py."""
        return explain(self, tokens)

    def forward(self, x):
        """x: (…, in). Returns: (…, out), by the plan of contraction that form.forward chooses for that many tokens."""
        if x.shape[-1] != self.shape[1]:
            raise ShapeError(
                f"FactorizedLinear: got input {tuple(x.shape)}; needed (…, {self.shape[1]}), weight {self.shape} (out, in)."
            )
        operands = self.operands
        if x.numel() == 0 or not operands:
            return F.linear(x, self.weight, self.bias)
        if not torch.compiler.is_compiling() and self._may_repeat(x):
            y = self.form.again(x, operands, self.shape, self.bias, self.kept)
            if y is not None:
                return y
        room = 0 if torch.compiler.is_compiling() else self.room(operands)
        return self.form.forward(x, operands, self.shape, self.bias, self.between, self.plan, self.kept, room)


class FactorizedEmbedding(_Factorized):
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
        dense = nn.Embedding(*self.shape, self.padding_idx, _weight=self.weight.detach().clone())
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
        rows = self.form.rows(flat, operands, self.shape, self.plan, self.kept, self.room(operands))  # (tokens, dim)
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


def materialize_(model, policy):
    """What the factorized layers of a model keep in evaluation, in place; returns None.

    policy: "auto": matrices in the layout that a plan of contraction reads, cores merged, as long as a layer's factors and
        these together are fewer numbers than its dense weight; "always": also the dense weight, where that is the fastest
        plan; "never": nothing. Training keeps nothing, and so does no layer whose factors are quantized
    Raises: ValueError for another policy
    Exact: outputs are the same to rounding; num_params and the checkpoint do not change.
    """
    for module in model.modules():
        if isinstance(module, _Factorized):
            module.materialize = policy


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
