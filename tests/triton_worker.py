"""Run by test_triton.py with TRITON_INTERPRET=1: the kernels over a table of cases, what they found as JSON on the last line."""

import json
import sys

import torch
from torch import nn

from tnlib import triton_programs
from tnlib.kronecker import Kronecker
from tnlib.layers import FactorizedLinear
from tnlib.low_rank import LowRank
from tnlib.triton_kernels import TritonLinear, kronecker_linear, low_rank_linear, use_triton_

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOW_RANK = [(40, 70, 21), (300, 24, 5)]  # in, out, rank: no multiples of a tile; `in` above one step of DECODE
KRONECKER = [  # left, right, terms
    ((20, 24), (2, 1), 1),
    ((20, 24), (4, 2), 4),
    ((20, 24), (2, 2), 3),
    ((20, 24), (1, 2), 1),
    ((9, 70), (3, 5), 2),
    ((70, 5), (5, 3), 2),
    ((5, 9), (16, 16), 1),
]


def drawn(*size, seed=0, integers=False):
    generator = torch.Generator().manual_seed(seed + sum(size))
    if integers:
        return torch.randint(-3, 4, size, generator=generator).double()
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def cases(tokens):
    """Name, function, operands in float64 (x, left, right, bias), and the result by einsum in float64."""
    for width, out, rank in LOW_RANK:
        x, bias = (tokens, width), out if rank % 3 == 0 else None
        yield f"low rank {width} {out} {rank}", low_rank_linear, x, (out, rank), (rank, width), bias, "oz,zi,ti->to"
    for (l0, l1), (r0, r1), terms in KRONECKER:
        x, bias = (tokens, l1, r1), l0 * r0 if terms > 1 else None
        name = f"kronecker {l0}x{l1} {r0}x{r1} {terms}"
        yield name, kronecker_linear, x, (terms, l0, l1), (terms, r0, r1), bias, "kip,kjq,tpq->tij"


def compared(function, x, left, right, bias, spec, dtype, integers=False):
    """Relative error of the kernel against float64 with the operands as `dtype` has them, and whether the result is exact."""
    x, left, right = (drawn(*size, seed=n, integers=integers).to(dtype) for n, size in enumerate((x, left, right)))
    bias = None if bias is None else drawn(bias, integers=integers).to(dtype)
    y = function(x.reshape(len(x), -1), left, right, bias)
    want = torch.einsum(spec, left.double(), right.double(), x.double()).reshape(len(x), -1)  # (tokens, out)
    want = want if bias is None else want + bias.double()
    return [str(y.dtype), float((y.double() - want).norm() / want.norm()), torch.equal(y.double(), want)]


def table(tokens, names):
    found = {}
    for name, *case in cases(tokens):
        for dtype in names:
            found[f"{name}, {tokens} tokens, {dtype}"] = compared(*case, TYPES[dtype])
    return found


def repeated():
    """Bits at a second call, and the counters that it leaves."""
    x, left, right = drawn(33, 40).float(), drawn(70, 21).float(), drawn(21, 40).float()
    first, second = low_rank_linear(x, left, right), low_rank_linear(x, left, right)
    return [torch.equal(first, second), int(sum(kept.abs().sum() for kept in triton_programs._kept.values()))]


FORMS = [
    LowRank(rank=5),
    Kronecker(right=(2, 1)),
    Kronecker(right=(2, 3), terms=2, scaled=True),
    Kronecker(right=(1, 4), permute="both"),
    Kronecker(left=(2, 3)),
]


def switched():
    """A model of layers: which were switched, how far they are off, where they go back to plain products, and the way back."""
    model = nn.Sequential(*[FactorizedLinear(form, (36, 36)) for form in FORMS]).eval()
    with torch.no_grad():
        for layer in model:
            layer.bias.normal_()
            for order in layer.orders.values():
                order.copy_(torch.randperm(36))
            if "scale" in layer.operands:
                layer.scale.mul_(1.5)
    x, keys = torch.randn(2, 3, 36), list(model.state_dict())
    with torch.no_grad():
        before = [layer(x) for layer in model]
        use_triton_(model)
        found = {"switched": [type(layer) is TritonLinear for layer in model], "keys": list(model.state_dict()) == keys}
        found["error"] = max(float((a - b).abs().max()) for a, b in zip(before, [layer(x) for layer in model]))
        found["train"] = torch.equal(model.train()[0](x), before[0])
    model.eval()(x).sum().backward()
    found["gradients"] = all(parameter.grad is not None for parameter in model.parameters())
    use_triton_(model, on=False)
    with torch.no_grad():
        found["back"] = all(
            torch.equal(layer(x), y) and type(layer) is FactorizedLinear for layer, y in zip(model, before)
        )
    return found


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        found = {"table": {}, "repeated": repeated()}
        for tokens, names in {1: TYPES, 3: TYPES, 16: TYPES, 33: TYPES, 300: ["bfloat16"]}.items():
            found["table"] |= table(tokens, names)
        found["integers"] = {n: compared(*case, torch.float32, integers=True) for n, *case in cases(5)}
    print(json.dumps(found | {"switched": switched()}), file=sys.stdout)


if __name__ == "__main__":
    main()
