"""Layers: time of tnlib's linear layers, of the peers' and of the floor, over that of a dense nn.Linear.

    python tests/benchmarks/layers.py [--quick] [--threads 2] [--rounds 7] [--seconds 3] [--only "fc MPO"] [--out figures]

GPT-2's shapes, 1 to 4,096 tokens, float32, the wall's clock; "forward" in evaluation without gradients, "forward + backward"
in training, gradients of the input and of all factors. All contestants of a cell hold the same factors. A forward must give
the dense product; gradients, that of the input, and for every factor the sum of factor times gradient, which is the same for
all of them since the output is linear in each.

floor: the FLOPs of the best contraction at the rate of a GEMM of 768, or input, output and factors at the rate of a copy,
both of the same round, whichever is longer (thrice for forward + backward). A kept weight may lie below it.
floor and calls: that, and about what it takes to call torch once a factor, by as many nn.Linear of 2 x 2 numbers one after the
other. No bound: bare products cost a little less than modules, and a layer that keeps merged factors calls fewer times.
products alone: those of one of tnlib's plans, whose products take least, operands at hand, see bare.py.
"""

import math
import sys
import time
from functools import partial

import ours
import peers
import reexpressed
import report
import torch
from bare import bare
from harness import Contestant, race
from suite import Record, options, settle
from torch import nn

import tnlib as tn

SLOW = 8.0  # times dense at the largest token count up to MANY; slower ones are not run above it
MANY = 512
GEMM, COPY = 768, 1 << 18  # of the probes: a product's side, a copy's numbers (1 MB, in cache)
SHAPES = {"fc": (3072, 768), "proj": (768, 3072), "attn": (768, 768)}  # (out, in), GPT-2 small
KRONECKER = {  # right factor of fc and of attn, terms; proj has fc's transposed
    "half": ((2, 1), (2, 1), 1),
    "small right": ((48, 3), (12, 3), 10),
    "4 x 2": ((4, 2), (4, 2), 4),
    "balanced": ((64, 32), (32, 32), 1),
    "2 x 2 left": ((1536, 384), (384, 384), 1),
}
TRAINS = {
    "TT 3+3, rank 64": tn.TensorTrain(order=3, max_rank=64),
    "MPO 3 cores, bond 4": tn.MPO(order=3, max_rank=4),
    "MPO 3 cores, bond 16": tn.MPO(order=3, max_rank=16),
    "MPO 3 cores, bond 64": tn.MPO(order=3, max_rank=64),
    "MPO 4 cores, bond 32": tn.MPO(order=4, max_rank=32),
}
MODES = ("forward", "forward + backward")


def forms(layer):
    """The ten forms of one layer, by label."""
    found = {}
    for fc, attn, terms in KRONECKER.values():
        right = attn if layer == "attn" else fc if layer == "fc" else fc[::-1]
        form = tn.Kronecker(right=right, terms=terms).resolve(SHAPES[layer])
        (l0, l1), (r0, r1) = form.left, form.right
        found[f"Kronecker ({l0},{l1})⊗({r0},{r1}), {terms} term{'s' * (terms > 1)}"] = form
    return found | {name: form.resolve(SHAPES[layer]) for name, form in TRAINS.items()}


class Cell:
    """Factors, input, output gradient and right answers of one cell."""

    def __init__(self, form, shape, tokens, mode):
        self.form, self.shape, self.tokens, self.training = form, shape, tokens, mode != MODES[0]
        generator = torch.Generator().manual_seed(1)
        self.factors = form.random(shape, shape[1] ** -0.5, generator)  # outputs of order 1
        self.weight = form.to_dense({name: f.double() for name, f in self.factors.items()}, shape).float()
        self.x = torch.randn(tokens, shape[1], generator=generator)
        self.y = self.x @ self.weight.T  # (tokens, out)
        self.out_grad = self.y / self.y.norm() + torch.randn(self.y.shape, generator=generator) / self.y.numel() ** 0.5
        self.x_grad = self.out_grad @ self.weight  # (tokens, in)
        self.product = float((self.out_grad.double() * self.y.double()).sum())

    def build(self, make):
        """The call to be timed, of the module that `make` gives, and its check."""
        module = make().train(self.training)
        if not self.training:
            return torch.no_grad()(lambda: module(self.x)), self.wrong_output
        x = self.x.clone().requires_grad_()
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        wanted = [x, *named.values()]
        return (
            lambda: torch.autograd.grad(module(x), wanted, self.out_grad, allow_unused=True),
            partial(self.wrong_gradients, named),
        )

    def wrong_output(self, y):
        return off("output", y, self.y)

    def wrong_gradients(self, named, grads):
        """Euler: the output is linear in every factor, so factor times gradient sums to output times its gradient."""
        for (name, parameter), grad in zip(named.items(), grads[1:]):
            if grad is None:
                return f"no gradient of {name}"
            got = float((parameter.detach().double() * grad.double()).sum())
            if not name.endswith("bias") and abs(got - self.product) > 1e-3 * abs(self.product):
                return f"gradient of {name}: {got:.4g} of factor times gradient, not {self.product:.4g}"
        return off("gradient of the input", grads[0], self.x_grad)

    def flops(self):
        """Those of the plan with the fewest, over those of the dense product."""
        return ours.least_flops(self.form, self.shape, self.tokens) / (2 * self.tokens * math.prod(self.shape))

    def calls(self):
        """A call that passes one linear layer of 2 x 2 numbers for each factor, and no check."""
        tiny = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in self.factors]).train(self.training)
        x = torch.ones(1, 2, requires_grad=self.training)
        if not self.training:
            return unchecked(torch.no_grad()(lambda: tiny(x)))
        wanted, out_grad = [x, *tiny.parameters()], torch.ones(1, 2)
        return unchecked(lambda: torch.autograd.grad(tiny(x), wanted, out_grad))

    def products(self):
        """A call that runs products alone, and no check."""
        likely = ours.likely(self.form, self.shape, self.tokens, self.training)
        return unchecked(torch.no_grad()(bare(likely, self.training)))

    def called_floor(self, seconds):
        """`floor`, and the calls."""
        return self.floor(seconds) + seconds["calls"]

    def floor(self, seconds):
        """Seconds by the rates of the same round."""
        flops = self.flops() * 2 * self.tokens * math.prod(self.shape)
        numbers = self.tokens * sum(self.shape) + self.form.num_params(self.shape)
        passes = 3 if self.training else 1
        return passes * max(flops * seconds["GEMM"] / (2 * GEMM**3), numbers * seconds["copy"] / (2 * COPY))


def off(what, got, right, bound=1e-4):
    """None, or by how much `got` is not `right`."""
    if got.shape != right.shape:
        return f"{what}: shape {tuple(got.shape)}, not {tuple(right.shape)}"
    error = float((got.detach().double() - right.double()).norm() / right.double().norm())
    return None if error < bound else f"{what}: relative error {error:.1e}"


def dense(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def modules(cell):
    """{name: function that makes the module}, dense first."""
    form, shape, factors = cell.form, cell.shape, cell.factors
    found = {"dense": partial(dense, cell.weight), "dense again": partial(dense, cell.weight)}
    found["tnlib"] = partial(ours.linear, form, shape, factors)
    if not cell.training:  # in training nothing is kept
        for setting in ours.SETTINGS[1:]:
            found[f"tnlib, {setting}"] = partial(ours.linear, form, shape, factors, setting)
    for plan in ours.plans(form, shape, cell.tokens, cell.training):
        found[f"plan: {plan}"] = partial(ours.planned, form, shape, factors, plan)
    others = reexpressed.TRAIN
    if isinstance(form, tn.MPO):
        others = peers.MPO | reexpressed.MPO
    elif isinstance(form, tn.Kronecker):
        others = (peers.KRONECKER if form.terms == 1 else {}) | reexpressed.KRONECKER
    return found | {name: partial(make, form, factors, shape) for name, make in others.items()}


def contestants(cell, slow):
    """All of a cell and the probes, without those in `slow`."""
    found = {name: partial(cell.build, make) for name, make in modules(cell).items()}
    found["low rank"] = partial(low_rank, cell)
    found = [Contestant(name, build) for name, build in found.items() if name not in slow]
    a, b, source, target = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM), torch.randn(COPY), torch.empty(COPY)
    probes = {"GEMM": lambda: a @ b, "copy": lambda: target.copy_(source)}
    probes = {name: partial(unchecked, call) for name, call in probes.items()}
    probes |= {"calls": cell.calls, "products": cell.products}
    return found + [Contestant(name, build, probe=True) for name, build in probes.items()]


def unchecked(call):
    return call, lambda answer: None


def low_rank(cell):
    """tnlib's LowRank of as many numbers as the form has; another weight, so a cell of its own."""
    rank = max(1, round(cell.form.num_params(cell.shape) / sum(cell.shape)))
    form = tn.LowRank(rank=rank).resolve(cell.shape)
    own = Cell(form, cell.shape, cell.tokens, MODES[cell.training])
    return own.build(partial(ours.linear, form, cell.shape, own.factors))


def known_slow(record, layer, label, mode, tokens):
    """{contestant: reason} of those that were too slow at the largest token count up to MANY."""
    if tokens <= MANY:
        return {}
    counts = [cell["facts"]["tokens"] for cell in record.cells.values()]
    for count in sorted({c for c in counts if c <= MANY}, reverse=True):
        if (cell := record.cells.get(name_of(layer, label, mode, count))) is not None:
            rows = {n: row for n, row in cell["rows"].items() if not n.startswith(("dense", "tnlib"))}
            slow = {n: row["ratio"] for n, row in rows.items() if row.get("ratio", 0) > SLOW and not row.get("probe")}
            slow = {n: f"{ratio:.0f} times dense at {count} tokens" for n, ratio in slow.items() if not n.startswith(("floor", "products"))}
            return slow | {n: row["reason"] for n, row in rows.items() if row["status"] == "slow"}
    return {}


def name_of(layer, label, mode, tokens):
    return f"{layer}, {label}, {mode}, {tokens} tokens"


def main(arguments=None):
    parser = options(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 512, 4096])
    asked = settle(parser, arguments)
    if asked.quick:
        asked.tokens = [1, 64]
    record = Record("bench_layers", asked)
    record.facts["peers"] = peers.versions()
    wanted = [(s, f, m, t) for s in SHAPES for f in forms(s) for m in MODES for t in sorted(asked.tokens)]
    if asked.quick:
        wanted = [w for w in wanted if w[0] == "attn" and ("1 term" in w[1] or "bond 4" in w[1] or "TT" in w[1])]
    for layer, label, mode, tokens in wanted:
        name = name_of(layer, label, mode, tokens)
        if record.wants(name):
            began, form = time.perf_counter(), forms(layer)[label]
            cell, slow = Cell(form, SHAPES[layer], tokens, mode), known_slow(record, layer, label, mode, tokens)
            floors = {"floor": cell.floor, "floor and calls": cell.called_floor, "products alone": lambda s: s["products"]}
            pace = {"rounds": asked.rounds, "seconds": asked.seconds, "share": asked.share}
            rows = race(contestants(cell, slow), "dense", computed=floors, **pace)
            rows |= {n: {"status": "slow", "reason": reason} for n, reason in slow.items()}
            facts = {"table": f"{layer}, {label}, {mode}", "column": f"{tokens:,}", "tokens": tokens, "form": label}
            facts |= {"layer": layer, "mode": mode, "kept": form.share(SHAPES[layer]), "flops": cell.flops()}
            record.put(name, facts, rows, began)
    report.layers(record)


if __name__ == "__main__":
    sys.exit(main())
