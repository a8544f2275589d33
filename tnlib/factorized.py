"""What all layers that hold factors share: parameters named by the form, the weight they stand for, what evaluation keeps."""

import math

import torch
from torch import nn

from tnlib.form import Form, measured_error
from tnlib.kept import POLICIES, Kept
from tnlib.shapes import ShapeError, check_weight


class Factorized(nn.Module):
    """What both layers share: factors as parameters named by the form, and the weight that they stand for."""

    def __init__(self, form, shape, device=None, dtype=None, draw=True):
        super().__init__()
        if not isinstance(form, Form):
            raise ShapeError(f"{type(self).__name__}: got form {form!r}; needed a Form such as LowRank(kept=0.5).")
        self.shape = (int(shape[0]), int(shape[1]))  # (out, in); for an embedding (rows, dim)
        self.form = form.resolve(self.shape)
        self.error = None  # relative Frobenius error of the decomposition this layer came from; None if drawn at random
        self.output_error = None  # the same of the outputs on a calibration text, for a layer that was fitted to one
        self.between = None  # module applied to the input and to intermediate results, see Form.forward
        self.plan = None  # name of the plan of contraction to take; None: the fastest for so many tokens
        self.kept = Kept()
        self.materialize = "never"
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
        """Numbers that may be kept from one call to the next; None, in training or if factors are computed: nothing at all."""
        operands = self.operands if operands is None else operands
        if self.training or "parametrizations" in self._modules:
            return None
        if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands.values()):
            return None
        if any(operand.is_inference() for operand in operands.values()):
            return None  # torch does not count their changes
        return {"never": 0, "auto": self._spare, "always": math.inf}[self.materialize]

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


def materialize_(model, policy):
    """What the factorized layers of a model keep in evaluation, in place; returns None.

    policy: "never", as layers start: nothing but views of the factors; "auto": cores merged and in the layout that a plan
        reads, as long as they and the factors together are fewer numbers than the dense weight; "always": also the dense
        weight, where that is the fastest plan. Training keeps nothing, nor does a layer whose factors are quantized. What is
        kept follows every change of a factor that torch counts; it counts none that is made in place through `.data`: after
        one, call this again
    Raises: ValueError for another policy
    Exact: outputs are the same to rounding; num_params and the checkpoint do not change.
    """
    for module in model.modules():
        if isinstance(module, Factorized):
            module.materialize = policy
