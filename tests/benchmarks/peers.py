"""Layers of the peers that are on PyPI, made to hold given factors; those that are not installed are named, with the remedy.

Each builder takes (form, factors, shape) of a resolved tnlib form and returns a module whose answer can be checked against
the same weight. Workarounds, all found by running: tednet prints in its constructor; tensorly-torch contracts by einsum,
which is fast only where opt_einsum is installed (it declares no such dependency), so it is measured with and without;
torchTT's layer wants the input as a tensor, and always has a bias; peft's LoKr always adds its base layer.
"""

import contextlib
import importlib.metadata
import importlib.util
import io

import torch
import torch.nn.functional as F
from harness import Unavailable
from torch import nn

PACKAGES = {  # import name: what to install
    "tltorch": "tensorly-torch",
    "tensorly": "tensorly",
    "torch_mpo": "torch-mpo",
    "tednet": "tednet",
    "torchtt": "torchTT",
    "tntorch": "tntorch",
    "lycoris": "lycoris-lora",
    "peft": "peft",
    "opt_einsum": "opt_einsum",
}


def need(name):
    """Raises: Unavailable, with the command, where package `name` is not installed."""
    if importlib.util.find_spec(name) is None:
        how = "--no-deps --ignore-requires-python torch-mpo" if name == "torch_mpo" else '-e ".[bench]"'
        raise Unavailable(f"{PACKAGES[name]} is not installed: .venv/bin/python -m pip install {how}")


def versions():
    """Version of each peer, None where it is not installed."""
    found = {}
    for package in PACKAGES.values():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


class LyCORIS(nn.Module):
    """lycoris' functions for kron(w1, w2), without the layer that they adapt."""

    def __init__(self, form, factors, shape, rebuild=False):
        super().__init__()
        need("lycoris")
        from lycoris.functional.lokr import kron_bypass, kron_weight

        self.bypass, self.weight, self.rebuild = kron_bypass, kron_weight, rebuild
        self.left, self.right = (nn.Parameter(factors[name][0].clone()) for name in ("left", "right"))

    def forward(self, x):
        if self.rebuild:
            return F.linear(x, self.weight(self.left, None, None, self.right, None, None))
        return self.bypass(x, self.left, None, None, self.right, None, None)


def peft_lokr(form, factors, shape):
    """peft's LoKr on a layer of zeros. Raises: Unavailable where its one factor cannot make these factor shapes."""
    need("peft")
    from peft import LoKrConfig
    from peft.tuners.lokr.layer import Linear, factorization

    (l0, l1), (r0, r1) = form.left, form.right
    makes = [f for f in (-1, l0, l1) if [factorization(n, f) for n in shape] == [(l0, r0), (l1, r1)]]
    if not makes:
        raise Unavailable("no decompose_factor gives these factor shapes")
    base = nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)
    nn.init.zeros_(base.weight)
    layer = Linear(base, "default", LoKrConfig(decompose_factor=makes[0]), r=max(shape), alpha=max(shape))
    with torch.no_grad():
        layer.lokr_w1["default"].copy_(factors["left"][0])
        layer.lokr_w2["default"].copy_(factors["right"][0])
    return layer


def _cores(factors):
    return [factors[f"core{k}"] for k in range(len(factors))]


class Tltorch(nn.Module):
    """tensorly-torch's FactorizedLinear, 'reconstructed' or 'factorized', with opt_einsum or without."""

    def __init__(self, form, factors, shape, implementation="reconstructed", opt_einsum=False):
        super().__init__()
        need("tltorch")
        if opt_einsum:
            need("opt_einsum")
        from tltorch import FactorizedLinear

        options = {"factorization": "blocktt", "rank": form.ranks, "implementation": implementation, "bias": False}
        self.layer, self.opt_einsum = FactorizedLinear(form.in_modes, form.out_modes, **options), opt_einsum
        for own, core in zip(self.layer.weight.factors, _cores(factors)):
            own.data.copy_(core)

    def forward(self, x):
        before, torch.backends.opt_einsum.enabled = torch.backends.opt_einsum.enabled, self.opt_einsum
        try:
            return self.layer(x)
        finally:
            torch.backends.opt_einsum.enabled = before


def torch_mpo(form, factors, shape):
    """torch-mpo's TTLinear: cores are matrices (r * out, r' * in)."""
    need("torch_mpo")
    from torch_mpo.layers.tt_linear import TTLinear

    layer = TTLinear(shape[1], shape[0], list(form.in_modes), list(form.out_modes), list(form.ranks), bias=False)
    for own, core in zip(layer.cores, _cores(factors)):
        own.data.copy_(core.transpose(2, 3).flatten(2).flatten(0, 1))  # (r*o, r'*i)
    return layer


def tednet(form, factors, shape):
    """tednet's TTLinear: nodes (in, out, r, r'), without the outer bonds."""
    need("tednet")
    from tednet.tnn.tensor_train import TTLinear

    with contextlib.redirect_stdout(io.StringIO()):
        layer = TTLinear(list(form.in_modes), list(form.out_modes), list(form.ranks[1:-1]), bias=False)
    for k, core in enumerate(_cores(factors)):
        own = getattr(layer, f"node{k}")
        own.data.copy_(core.permute(2, 1, 0, 3).reshape(own.shape))  # (i, o, r, r'), less the outer bonds
    return layer


class TorchTT(nn.Module):
    """torchTT's LinearLayerTT, its input and output reshaped."""

    def __init__(self, form, factors, shape):
        super().__init__()
        need("torchtt")
        with contextlib.redirect_stdout(io.StringIO()):
            from torchtt.nn import LinearLayerTT
        self.layer = LinearLayerTT(list(form.in_modes), list(form.out_modes), list(form.ranks))
        self.in_modes = form.in_modes
        for own, core in zip(self.layer.cores, _cores(factors)):
            own.data.copy_(core)

    def forward(self, x):
        return self.layer(x.reshape(len(x), *self.in_modes)).flatten(1)  # (tokens, out)


class TltorchEmbedding(nn.Module):
    """tensorly-torch's FactorizedEmbedding."""

    def __init__(self, form, factors, shape):
        super().__init__()
        need("tltorch")
        from tltorch import FactorizedEmbedding

        modes = {"tensorized_num_embeddings": form.out_modes, "tensorized_embedding_dim": form.in_modes}
        self.layer = FactorizedEmbedding(*shape, auto_tensorize=False, rank=form.ranks, **modes)
        for own, core in zip(self.layer.weight.factors, _cores(factors)):
            own.data.copy_(core)

    def forward(self, ids):
        return self.layer(ids)


def _with(kind, **options):
    return lambda form, factors, shape: kind(form, factors, shape, **options)


KRONECKER = {  # of one term
    "LyCORIS, bypass": LyCORIS,
    "LyCORIS, rebuild": _with(LyCORIS, rebuild=True),
    "peft LoKr": peft_lokr,
}
MPO = {
    "tltorch, reconstructed": Tltorch,
    "tltorch, factorized": _with(Tltorch, implementation="factorized"),
    "tltorch, factorized, opt_einsum": _with(Tltorch, implementation="factorized", opt_einsum=True),
    "tednet": tednet,
    "torchTT": TorchTT,
    "torch-mpo": torch_mpo,
}
EMBEDDING = {"tltorch": TltorchEmbedding}
