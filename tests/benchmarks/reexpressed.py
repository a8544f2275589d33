"""Peers that no package index has, as their sequence of operations in our own words. Nothing here is their code.

Krony: Krony-PT's MLP layer makes the matrix of every term by torch.kron in each forward, adds them up, and calls F.linear.
TQ: TQCompressor's linear layer contracts the right factor first, whatever the sizes, for all terms at once, and adds last.
TrainHalves: the linear layer of QAT-TT (Yang et al.) merges input cores and output cores in each call, then two products.
Sequential: the MPO layer of quantum_tensors contracts core by core; each step brings the axes into order by a permute,
    which copies, for a product of two matrices.
TableHalves: the embedding of QAT-TT merges both halves of a TT-matrix in each call, gathers rows from both, and
    multiplies them token by token.

Each takes the factors that tnlib's form has, so that all contestants of a cell stand for the same weight.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Krony(nn.Module):
    def __init__(self, form, factors, shape):
        super().__init__()
        self.left, self.right = (nn.Parameter(factors[name].clone()) for name in ("left", "right"))

    def forward(self, x):
        return F.linear(x, sum(torch.kron(a, b) for a, b in zip(self.left, self.right)))


class TQ(nn.Module):
    def __init__(self, form, factors, shape):
        super().__init__()
        self.left, self.right = (nn.Parameter(factors[name].clone()) for name in ("left", "right"))

    def forward(self, x):
        x = x.reshape(-1, 1, self.left.shape[2], self.right.shape[2])  # (tokens, 1, l1, r1)
        y = self.left @ (x @ self.right.mT)  # (tokens, k, l1, r0) -> (tokens, k, l0, r0)
        return y.sum(1).reshape(len(x), -1)  # (tokens, out)


class _Cores(nn.Module):
    def __init__(self, form, factors, shape):
        super().__init__()
        self.form, self.shape = form, shape
        self.cores = nn.ParameterList(factors[f"core{k}"].clone() for k in range(len(factors)))


class TrainHalves(_Cores):
    def forward(self, x):
        cores, at = list(self.cores), len(self.form.in_modes)
        left, right = cores[0], cores[at]
        for core in cores[1:at]:
            left = torch.tensordot(left, core, 1)  # (1, i_1, …, i_k, r)
        for core in cores[at + 1 :]:
            right = torch.tensordot(right, core, 1)  # (r, o_1, …, o_k, r')
        left, right = left.reshape(self.shape[1], -1), right.reshape(-1, self.shape[0])  # (in, r), (r, out)
        return x @ left @ right


class Sequential(_Cores):
    def forward(self, x):
        tokens, ahead, done = len(x), self.shape[1], 1
        state = x.reshape(tokens, 1, 1, ahead)  # (tokens, outputs done, r, inputs ahead)
        for core in self.cores:
            r, o, i, s = core.shape
            ahead //= i
            state = state.reshape(tokens, done, r, i, ahead).permute(0, 1, 4, 2, 3)  # (tokens, done, ahead, r, i)
            matrix = core.permute(0, 2, 1, 3).reshape(r * i, o * s)
            state = (state.reshape(-1, r * i) @ matrix).reshape(tokens, done, ahead, o, s)
            done *= o
            state = state.permute(0, 1, 3, 4, 2).reshape(tokens, done, s, ahead)
        return state.reshape(tokens, -1)  # (tokens, out)


class TableHalves(_Cores):
    def forward(self, ids):
        cores, at = list(self.cores), len(self.cores) // 2
        left, right = (self._merge(part) for part in (cores[:at], cores[at:]))
        below = math.prod(self.form.out_modes[at:])
        left, right = left[ids // below], right[ids % below]  # (tokens, 1, inputs, r), (tokens, r, inputs, 1)
        return (left.squeeze(1) @ right.squeeze(3)).reshape(len(ids), -1)[:, : self.shape[1]]  # (tokens, in)

    def _merge(self, cores):
        """Cores of one half -> (rows, r, inputs, r')."""
        merged = cores[0].permute(1, 0, 2, 3)  # (o, r, i, r')
        for core in cores[1:]:
            o, r, i, _ = merged.shape
            merged = torch.einsum("oris,spjt->oprijt", merged, core)
            merged = merged.reshape(o * core.shape[1], r, i * core.shape[2], -1)
        return merged


KRONECKER = {"krony-PT (re-expressed)": Krony, "TQCompressor (re-expressed)": TQ}
TRAIN = {"QAT-TT (re-expressed)": TrainHalves}
MPO = {"quantum_tensors (re-expressed)": Sequential}
EMBEDDING = {"QAT-TT (re-expressed)": TableHalves}
