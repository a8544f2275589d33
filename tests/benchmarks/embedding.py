"""Embedding: look-ups in a 49,152 x 576 table held as a TT-matrix of four cores, over those of nn.Embedding.

    python tests/benchmarks/embedding.py [--quick] [--threads 2] [--rounds 7] [--seconds 3] [--out figures]

Forward in evaluation without gradients; forward + backward in training, gradients of all factors (a dense table's gradient is
as large as the table). All contestants hold the same factors, must give the same rows, and for each factor the same sum of
factor times gradient.
"""

import sys
import time
from functools import partial

import ours
import peers
import reexpressed
import report
import torch
from harness import Contestant, race
from layers import MODES, off
from suite import Record, options, settle
from torch import nn

import tnlib as tn

TABLE, QUICK = (49152, 576), (768, 96)


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
    return [Contestant(name, partial(cell.build, make)) for name, make in found.items()]


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
            rows = race(contestants(Cell(form, shape, tokens, mode)), "dense", **pace)
            facts = {"table": f"rank {rank}, {mode}", "column": f"{tokens:,}", "form": f"rank {rank}", "mode": mode}
            record.put(name, facts | {"tokens": tokens, "kept": form.share(shape)}, rows, began)
    report.embedding(record)


if __name__ == "__main__":
    sys.exit(main())
