"""Linear layers on a GPU, dense, int4 and factorized, plain, compiled and by the kernels of triton_kernels.py, beside their floors.

    python tests/benchmarks/gpu_kernels.py [--dry] [--rounds 30] [--tokens 1 4 16 512 8192] [--shapes 768x3072] [--no-compile]

First the ceilings of the machine: bytes per second of a copy, FLOPs per second of a large bfloat16 GEMM. Then each cell (a
form of a layer at a number of tokens): contestants checked against float64, then timed by CUDA events in interleaved,
shuffled rounds, L2 overwritten before each. A floor is what the factored sum must read and write, or compute in its cheaper
order, whichever takes longer. Writes figures/bench_gpu.md and .json. --dry prints cells and floors at DRY's ceilings, without a GPU.
"""

import argparse
import copy
import json
import random
import statistics
from functools import partial
from pathlib import Path

import torch

import tnlib as tn
from tnlib.records import write_atomic
from tnlib.triton_programs import load

SHAPES = ["768x3072", "3072x768", "4096x11008", "11008x4096"]  # in x out
TOKENS = [1, 2, 4, 8, 16, 512, 2048, 8192]
FORMS = {
    "(out/2, in) x (2, 1)": tn.Kronecker(right=(2, 1)),
    "(out/4, in/2) x (4, 2), 4 terms": tn.Kronecker(right=(4, 2), terms=4),
    "low rank, 25 %": tn.LowRank(kept=0.25),
    "low rank, 50 %": tn.LowRank(kept=0.5),
}
DRY = {"bytes_per_s": 3.35e12, "flops_per_s": 9.9e14}  # H100 SXM, NVIDIA's data sheet, dense bfloat16; nothing measured
TYPE, SIZE = torch.bfloat16, 2
TOLERANCE = 2e-2  # relative, in bfloat16, with a rounded intermediate result


def definite(form, shape):
    """The form for this shape; ranks as multiples of 16, so that rows of factors start where wide loads can."""
    form = form.resolve(shape)
    return tn.LowRank(rank=form.rank // 16 * 16) if isinstance(form, tn.LowRank) else form


def floor(form, shape, tokens, ceilings):
    """Bytes and FLOPs that nobody can avoid without leaving the form (or None: dense), and the seconds that they take."""
    out, width = shape
    if form is None:
        numbers, each = out * width, out * width
    elif isinstance(form, tn.LowRank):
        numbers = each = form.rank * (out + width)
    else:
        numbers, each = form.num_params(shape), form.terms * form.left[0] * form.left[1] * min(form.right)
    moved, flops = SIZE * (numbers + tokens * (out + width) + out), 2 * tokens * each
    memory, arithmetic = moved / ceilings["bytes_per_s"], flops / ceilings["flops_per_s"]
    bound = "memory" if memory >= arithmetic else "arithmetic"
    return {"bytes": moved, "flops": flops, "floor_us": 1e6 * max(memory, arithmetic), "bound": bound}


def cells(asked):
    """(shape (out, in), name of the form, form, tokens) of everything asked for."""
    for text in asked.shapes:
        width, out = map(int, text.split("x"))
        for name, form in FORMS.items():
            for tokens in asked.tokens:
                yield (out, width), name, definite(form, (out, width)), tokens


def timed(work, flush):
    """Microseconds of one call by CUDA events; the overwriting of L2 keeps the GPU busy while Python launches the work."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    began.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return 1e3 * began.elapsed_time(ended)


def rounds(works, count, flush):
    """{name: microseconds of each round}, in an order shuffled anew each round; warmed up before."""
    for work in works.values():
        for _ in range(3):
            work()
    found, draw = {name: [] for name in works}, random.Random(0)
    for _ in range(count):
        for name in draw.sample(list(works), len(works)):
            found[name].append(timed(works[name], flush))
    return found


def ceilings(flush):
    """Measured: a copy of 1 GiB (read and written), a GEMM of 8192 cubed."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target, square = torch.empty_like(source), torch.randn(8192, 8192, device="cuda", dtype=TYPE)
    works = {"copy": partial(target.copy_, source), "gemm": partial(torch.mm, square, square)}
    best = {name: min(us) / 1e6 for name, us in rounds(works, 20, flush).items()}
    return {"bytes_per_s": 2 * source.numel() / best["copy"], "flops_per_s": 2 * 8192**3 / best["gemm"]}


def int4(dense):
    """The dense layer under torchao's int4 weights; None, and why, where torchao cannot."""
    layer = torch.nn.Sequential(copy.deepcopy(dense))
    try:
        tn.use_torchao_(layer, bits=4)
    except tn.QuantizeError as error:
        print(f"without int4: {error}")
        return None
    return layer


def contestants(form, shape, compiled):
    """Layers by name, random factors, eval mode; and the names whose result is the factored layer's."""
    torch.compiler.reset()  # its limit of recompilations is for one layer's token counts
    out, width = shape
    dense = torch.nn.Linear(width, out, device="cuda", dtype=TYPE).eval()
    plain = tn.FactorizedLinear(form, shape, device="cuda").to(TYPE).eval()
    fused = torch.nn.Sequential(copy.deepcopy(plain))
    tn.use_triton_(fused)
    kernel = partial(tn.low_rank_linear if isinstance(form, tn.LowRank) else tn.kronecker_linear, bias=plain.bias)
    found = {"dense": dense, "int4": int4(dense), "unfused": plain}
    found |= {"compiled": torch.compile(plain, dynamic=False)} if compiled else {}
    found |= {"fused": partial(kernel, left=plain.left, right=plain.right), "switched layer": fused}
    return {name: layer for name, layer in found.items() if layer is not None}, plain


def measure(shape, form, asked, machine, flush):
    """Rows of the table for one layer: every contestant at every number of tokens, checked first."""
    layers, plain = contestants(form, shape, asked.compile)
    exact = copy.deepcopy(plain).double()
    for tokens in asked.tokens:
        x = torch.randn(tokens, shape[1], device="cuda", dtype=TYPE)
        want = torch.nn.functional.linear(x[:64].double(), exact.weight, exact.bias)
        for name in layers.keys() - {"dense", "int4"}:
            first = layers[name](x)
            error = float((first[:64].double() - want).norm() / want.norm())
            assert error < TOLERANCE, f"{name}, {form}, {shape} (out, in), {tokens} tokens: relative error {error}"
            if name == "fused":  # counters left behind, or a race, would show here
                assert all(torch.equal(layers[name](x), first) for _ in range(100)), (
                    f"{form}, {tokens} tokens: other bits"
                )
        for name, us in rounds({n: partial(layer, x) for n, layer in layers.items()}, asked.rounds, flush).items():
            bound = floor(None if name in ("dense", "int4") else form, shape, tokens, machine)
            seconds = statistics.median(us) / 1e6
            shares = {"bandwidth": bound["bytes"] / seconds / machine["bytes_per_s"]}
            shares["flops"] = bound["flops"] / seconds / machine["flops_per_s"]
            if name == "int4":
                shares = {}  # its floor is another: a quarter of the bytes and the scales
            quartiles = statistics.quantiles(us, n=4)
            yield {
                "tokens": tokens,
                "contestant": name,
                "us": 1e6 * seconds,
                "low": quartiles[0],
                "high": quartiles[2],
            } | shares


def markdown(machine, rows):
    """The table, a row a contestant."""
    lines = [
        f"Ceilings: {machine['bytes_per_s'] / 1e12:.2f} TB/s copied, {machine['flops_per_s'] / 1e12:.0f} TFLOP/s GEMM",
        "",
    ]
    lines += ["| in x out | form | tokens | contestant | us (quartiles) | of bandwidth | of FLOPs |", "|" + "---|" * 7]
    for row in rows:
        out, width = row["shape"]
        shares = " | ".join(f"{row[share]:.0%}" if share in row else "" for share in ("bandwidth", "flops"))
        time = f"{row['us']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
        lines.append(f"| {width}x{out} | {row['form']} | {row['tokens']} | {row['contestant']} | {time} | {shares} |")
    return "\n".join(lines) + "\n"


def dry(asked):
    """Cells with their floors, beside dense."""
    print(
        "in x out      form                              tokens         MB      GFLOP   floor us  bound        dense us"
    )
    for shape, name, form, tokens in cells(asked):
        bound, dense = floor(form, shape, tokens, DRY), floor(None, shape, tokens, DRY)
        size = f"{bound['bytes'] / 1e6:10.2f} {bound['flops'] / 1e9:10.3f} {bound['floor_us']:10.2f}"
        text = f"{shape[1]}x{shape[0]}"
        print(f"{text:12}  {name:32} {tokens:7} {size}  {bound['bound']:10} {dense['floor_us']:10.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--to", type=Path, default=Path(__file__).resolve().parents[2] / "figures")
    asked = parser.parse_args()
    if asked.dry:
        dry(asked)
        return
    load("gpu_kernels.py")
    torch.manual_seed(0)
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")  # five times the L2 of an H100
    with torch.no_grad():
        machine, rows = ceilings(flush) | {"device": torch.cuda.get_device_name(), "torch": torch.__version__}, []
        for shape, name, form, _ in {cell[:2]: cell for cell in cells(asked)}.values():
            found = list(measure(shape, form, asked, machine, flush))
            rows += [{"shape": shape, "form": name} | row for row in found]
            print(markdown(machine, rows[-len(found) :]), flush=True)
            write_atomic(asked.to / "bench_gpu.md", markdown(machine, rows))
            write_atomic(asked.to / "bench_gpu.json", json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
