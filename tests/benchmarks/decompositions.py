"""Decompositions: time, error and memory of tnlib's, of torch's SVDs and of the peers' on one matrix; and of whole models.

    python tests/benchmarks/decompositions.py [--quick] [--only MPO] [--timeout 300] [--out figures]

Synthetic matrices have the spectrum s_i ~ i^-0.7 between Gaussian vectors; real ones are of SmolLM2-135M (as shipped: 4 bits,
dequantized), block 15, gate and up stacked. "excess" is the relative error above that of an exact sweep in float64, which for
a sum of Kronecker products is the best there is; below zero is better than that sweep. "peak" is the resident memory on top
of what was there before the call, in sizes of the matrix, taken in a fresh process for each contestant in which MKL has the few
MB of buffers that it keeps; one that needs more than --share seconds there is not timed in turns. The floor of the times is a
copy of the matrix.
"""

import json
import sys
import time
from functools import partial

import peer_decompositions as peer
import report
import torch
from harness import Contestant, Unavailable, fresh, peak_mb, race
from peers import versions
from suite import Record, options, settle

import tnlib as tn

SETTLED = 1024  # side of the product and of the eigenvectors after which MKL has the buffers that it keeps, a few MB
WORSE = 0.05  # error above the exact sweep's from which an answer is wrong
REAL = ["model.layers.15.mlp.gate_proj.weight", "model.layers.15.mlp.up_proj.weight"]


def kronecker(shape, right, terms):
    (r0, r1), (rows, columns) = right, shape
    return (rows // r0, r0), (columns // r1, r1), (1, terms, 1)


def mpo(shape, order, bond):
    form = tn.MPO(order=order, max_rank=bond).resolve(shape)
    return form.out_modes, form.in_modes, form.ranks


FC, SMOL = (3072, 768), (3072, 576)
CASES = {  # name: (matrix, out_modes, in_modes, ranks)
    "Van Loan 3072x768, (1536,768)⊗(2,1)": (FC, *kronecker(FC, (2, 1), 1)),
    "Van Loan 3072x768, (64,256)⊗(48,3), 10 terms": (FC, *kronecker(FC, (48, 3), 10)),
    "Van Loan real 3072x576, (1536,576)⊗(2,1)": ("real", *kronecker(SMOL, (2, 1), 1)),
    "Van Loan real 3072x576, (64,192)⊗(48,3), 10 terms": ("real", *kronecker(SMOL, (48, 3), 10)),
    "Van Loan real 3072x576, (48,24)⊗(64,24), 10 terms": ("real", *kronecker(SMOL, (64, 24), 10)),
    "MPO 3072x768, 3 cores, bond 32": (FC, *mpo(FC, 3, 32)),
    "MPO 3072x768, 3 cores, bond 64": (FC, *mpo(FC, 3, 64)),
    "MPO real 3072x576, 3 cores, bond 64": ("real", *mpo(SMOL, 3, 64)),
    "MPO real 3072x576, 4 cores, bond 128": ("real", *mpo(SMOL, 4, 128)),
    "MPO 2048x2048, 4 cores, bond 64": ((2048, 2048), *mpo((2048, 2048), 4, 64)),
    "MPO 4096x4096, 3 cores, bond 64": ((4096, 4096), *mpo((4096, 4096), 3, 64)),
    "MPO 4096x4096, 4 cores, bond 64": ((4096, 4096), *mpo((4096, 4096), 4, 64)),
    "MPO 4096x11008, 3 cores, bond 100": ((4096, 11008), *mpo((4096, 11008), 3, 100)),
}
SMALL = (96, 64)
QUICK = {
    "Van Loan 96x64, (48,64)⊗(2,1)": (SMALL, *kronecker(SMALL, (2, 1), 1)),
    "MPO 96x64, 3 cores, bond 8": (SMALL, *mpo(SMALL, 3, 8)),
}
MODEL = "SmolLM2-135M"  # the cells' name; each form keeps half
FORMS = {
    "low rank": tn.LowRank(kept=0.5),
    "Kronecker, right (2,1)": tn.Kronecker(right=(2, 1)),
    "Kronecker, right (2,2)": tn.Kronecker(right=(2, 2), kept=0.5),
    "TT 3+3": tn.TensorTrain(order=3, kept=0.5),
    "MPO 3 cores": tn.MPO(order=3, kept=0.5),
    "MPO 4 cores": tn.MPO(order=4, kept=0.5),
}


def matrix(which):
    """A real or a synthetic matrix, float32."""
    if which == "real":
        return torch.cat([tn.load_weight("smollm2-135m", key).float() for key in REAL])
    (rows, columns), generator = which, torch.Generator().manual_seed(0)
    k = min(rows, columns)
    left, right = torch.randn(rows, k, generator=generator), torch.randn(k, columns, generator=generator)
    return (left * torch.arange(1, k + 1) ** -0.7) @ right / (rows * columns) ** 0.5


class Case:
    """A matrix, its modes, and the error of the exact sweep."""

    def __init__(self, name):
        which, *self.modes = {**CASES, **QUICK}[name]
        self.weight = matrix(which)

    def check(self, exact, cores):
        """None, or what is wrong with the cores."""
        bonds = [core.shape[-1] for core in cores[:-1]]
        if any(bond > cap for bond, cap in zip(bonds, self.modes[2][1:])):
            return f"bonds {bonds} above {self.modes[2][1:-1]}"
        error = peer.error(self.weight, cores, *self.modes[:2])
        return None if error < exact + WORSE else f"relative error {error:.4f}, exact {exact:.4f}"

    def contestants(self, exact, names):
        for name in names:
            call = partial(peer.CONTESTANTS[name], self.weight, *self.modes)
            yield Contestant(name, lambda call=call: (call, partial(self.check, exact)))
        yield Contestant("copy of the matrix", lambda: (self.weight.clone, lambda copy: None))


def one(name, asked):
    """Rows of a case: each contestant alone for its memory, then those that are quick enough in turns."""
    case = Case(name)
    exact = peer.error(case.weight, peer.exact(case.weight, *case.modes), *case.modes[:2])
    alone = {}
    for contestant in peer.CONTESTANTS:
        found = apart(name, contestant, asked)
        alone[contestant] = found | ({"excess": found["error"] - exact} if "error" in found else {})
    quick = [n for n, found in alone.items() if found["status"] == "ok" and found["first call, s"] < asked.share]
    pace = {"rounds": asked.rounds, "seconds": asked.seconds, "share": asked.share}
    rows = race(case.contestants(exact, quick), "tnlib", **pace)
    for contestant, found in alone.items():
        rows[contestant] = found if contestant not in rows else found | rows[contestant]
    order = [*peer.CONTESTANTS, "copy of the matrix"]
    return {n: rows[n] for n in order}, {"table": f"{name}; exact error {exact:.4f}", "case": name, "exact": exact}


def apart(case, contestant, asked):
    """What `worker` finds in a fresh process."""
    given = ("--worker", case, "--contestant", contestant, "--threads", asked.threads)
    return fresh(__file__, *given, timeout=asked.timeout)


def worker(asked):
    """In a fresh process: one contestant once, on a small matrix first, so that what it imports is there, and MKL's own buffers."""
    if asked.worker == MODEL:
        return whole_model(FORMS[asked.contestant])
    contestant = peer.CONTESTANTS[asked.contestant]
    contestant(torch.randn(SMALL, generator=torch.Generator().manual_seed(0)), *mpo(SMALL, 3, 8))
    for dtype in (torch.float32, torch.float64):
        torch.linalg.eigh(torch.ones(SETTLED, SETTLED, dtype=dtype) @ torch.eye(SETTLED, dtype=dtype))
    case = Case(asked.worker)
    began = time.perf_counter()
    cores, mb, _ = peak_mb(partial(contestant, case.weight, *case.modes))
    seconds = time.perf_counter() - began
    size = case.weight.numel() * 4 / 1e6
    return {"first call, s": seconds, "peak": mb / size, "error": peer.error(case.weight, cores, *case.modes[:2])}


def whole_model(form):
    """Seconds, peak and mean error of factorize_ on all 210 matrices."""
    model = tn.load_model("smollm2-135m", dtype="float32")
    before = sum(p.numel() for p in model.parameters())
    recipe = tn.Recipe(name="bench", rules=(tn.Rule(where="linear", form=form),))
    began = time.perf_counter()
    _, mb, _ = peak_mb(lambda: tn.factorize_(model, recipe, progress=False))
    seconds = time.perf_counter() - began
    errors = [layer.error for layer in model.modules() if isinstance(layer, tn.FactorizedLinear)]
    kept = sum(p.numel() for p in model.parameters()) / before
    mean = sum(errors) / len(errors)
    return {"seconds": seconds, "matrices": len(errors), "error": mean, "peak, MB": mb, "kept of the model": kept}


def main(arguments=None):
    parser = options(__doc__, rounds=5, seconds=2.0)
    parser.add_argument("--timeout", type=float, default=300, help="seconds of a contestant in a process of its own")
    parser.add_argument("--worker", help="used by the script itself")
    parser.add_argument("--contestant", help="used by the script itself")
    asked = settle(parser, arguments)
    if asked.worker:
        try:
            print(json.dumps(worker(asked)))
        except Unavailable as reason:
            print(json.dumps({"status": "missing", "reason": str(reason)}))
        return
    record = Record("bench_decompositions", asked)
    record.facts["peers"] = versions()
    for name in QUICK if asked.quick else CASES:
        if record.wants(name):
            began = time.perf_counter()
            rows, facts = one(name, asked)
            record.put(name, facts, rows, began)
    if not asked.quick and record.wants(name := f"{MODEL}, all matrices"):
        began = time.perf_counter()
        rows = {form: apart(MODEL, form, asked) for form in FORMS}
        record.put(name, {"table": f"{name}, half of the numbers kept"}, rows, began)
    report.decompositions(record)


if __name__ == "__main__":
    sys.exit(main())
