"""Embedding: look-ups in a 49,152 x 576 table held as a TT-matrix of four cores, over those of nn.Embedding.

    python tests/benchmarks/embedding.py [--quick] [--threads 2] [--rounds 7] [--seconds 3] [--out figures]

Forward in evaluation without gradients; forward + backward in training, gradients of all factors (a dense table's gradient is
as large as the table). All contestants hold the same factors, must give the same rows, and for each factor the same sum of
factor times gradient. products alone: those that the tokens need, of tnlib's way with the fewest, all tables at hand, see bare.py;
with gathers: and what they multiply is gathered from the tables first, the digits of the ids at hand as well.
"""

import sys
import time
from dataclasses import replace
from functools import partial

import ours
import peers
import reexpressed
import report
import torch
from bare import bare
from harness import Contestant, race
from layers import MODES, off, unchecked
from suite import Record, options, settle
from torch import nn

import tnlib as tn
from tnlib.lookup import BLOCK, tables

TABLE, QUICK = (49152, 576), (768, 96)
LIKELY = 1 << 22  # numbers of the tables of a plan above which it is not looked at: none such is quick


class Cell:
    """Factors, ids and right rows of one cell."""

    def __init__(self, form, shape, tokens, mode):
        self.form, self.shape, self.tokens, self.training = form, shape, tokens, mode != MODES[0]
        generator = torch.Generator().manual_seed(1)
        self.factors = form.random(shape, 1.0, generator)
        self.table = form.to_dense(self.factors, shape)
        self.ids = torch.randint(shape[0], (tokens,), generator=generator)
        self.rows = self.table[self.ids]  # (tokens, dim)
        self.product = float(self.rows.double().square().sum())

    def build(self, make):
        """The call to be timed, and its check."""
        module = make().train(self.training)
        if not self.training:
            return torch.no_grad()(lambda: module(self.ids)), partial(off, "rows", right=self.rows)
        named = dict(module.named_parameters())
        return (
            lambda: (rows := module(self.ids), torch.autograd.grad(rows, [*named.values()], self.rows)),
            partial(self.wrong, named),
        )

    def wrong(self, named, answer):
        """The rows, and Euler's sum for every factor."""
        for (name, parameter), grad in zip(named.items(), answer[1]):
            got = float((parameter.detach().double() * grad.double()).sum())
            if abs(got - self.product) > 1e-3 * self.product:
                return f"gradient of {name}: {got:.4g} of factor times gradient, not {self.product:.4g}"
        return off("rows", answer[0], self.rows)


def contestants(cell):
    """nn.Embedding twice, tnlib's choice and each of its ways, the peers."""
    own = (cell.form, cell.shape, cell.factors)
    dense = partial(nn.Embedding.from_pretrained, cell.table, freeze=False)
    found = {"dense": dense, "dense again": dense, "tnlib": partial(ours.embedding, *own)}
    if not cell.training:  # in training nothing is kept
        found["tnlib, auto"] = partial(ours.embedding, *own, "auto")
    for plan in ours.row_plans(cell.form, cell.shape, cell.tokens):
        found[f"plan: {plan}"] = partial(ours.ForcedRows, *own, plan)
    others = peers.EMBEDDING | reexpressed.EMBEDDING
    found |= {name: partial(make, cell.form, cell.factors, cell.shape) for name, make in others.items()}
    found = [Contestant(name, partial(cell.build, make)) for name, make in found.items()]
    probes = {"products": products} | ({} if cell.training else {"products and gathers": with_gathers})
    return [*found, *(Contestant(name, partial(make, cell), probe=True) for name, make in probes.items())]


def products(cell):
    """A call that runs products alone, nothing built, and no check."""
    plans = [replace(plan, build=()) for plan in cell.form.row_plans(cell.shape, cell.tokens)]
    return unchecked(torch.no_grad()(bare(plans, cell.training)))


def with_gathers(cell):
    """The same for the quickest plan, and before it the gathers that it needs: a block of tokens at a time, as in lookup.py."""
    found, cores = [], cell.form.paired(cell.factors)
    for plan in cell.form.row_plans(cell.shape, cell.tokens):
        if plan.held > LIKELY:
            continue
        entries = [table.entries for table in tables(cores, plan.groups)]
        blocks = -(-cell.tokens * 4 * sum(each.shape[1] for each in entries) // BLOCK)
        tokens = -(-cell.tokens // blocks)
        wanted = [(each, torch.randint(len(each), (tokens,)), each.new_empty(tokens, each.shape[1])) for each in entries]
        same = next(other for other in cell.form.row_plans(cell.shape, tokens) if other.name == plan.name)
        call = partial(gather_and_run, wanted, bare([replace(same, build=())], False), blocks)
        found.append((min(timed(call) for _ in range(3)), len(found), call))
    return unchecked(torch.no_grad()(min(found)[-1]))


def gather_and_run(wanted, run, times):
    for _ in range(times):
        for entries, digits, place in wanted:
            torch.index_select(entries, 0, digits, out=place)
        run()


def timed(call):
    call()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main(arguments=None):
    parser = options(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 512, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    asked = settle(parser, arguments)
    shape = QUICK if asked.quick else TABLE
    if asked.quick:
        asked.tokens, asked.ranks = [1, 64], [8]
    record = Record("bench_embedding", asked)
    record.facts["peers"] = peers.versions()
    for rank, mode, tokens in [(r, m, t) for r in asked.ranks for m in MODES for t in asked.tokens]:
        name = f"rank {rank}, {mode}, {tokens} tokens"
        if record.wants(name):
            began, form = time.perf_counter(), tn.TTMatrix(order=4, max_rank=rank).resolve(shape)
            pace = {"rounds": asked.rounds, "seconds": asked.seconds, "share": asked.share}
            alone = {"products alone": lambda seconds: seconds["products"]}
            if mode == MODES[0]:
                alone["products and gathers alone"] = lambda seconds: seconds["products and gathers"]
            rows = race(contestants(Cell(form, shape, tokens, mode)), "dense", computed=alone, **pace)
            facts = {"table": f"rank {rank}, {mode}", "column": f"{tokens:,}", "form": f"rank {rank}", "mode": mode}
            record.put(name, facts | {"tokens": tokens, "kept": form.share(shape)}, rows, began)
    report.embedding(record)


if __name__ == "__main__":
    sys.exit(main())
