"""The TT-matrix, which physics calls a matrix product operator (MPO): every core pairs an output with an input mode.

Cores are (r, out_k, in_k, r'). The weight's matrix rank can be full whatever the bond dimension, so an MPO is not a
low-rank layer. It saves parameters and not arithmetic: contracting it core by core often costs more than the dense GEMM.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tnlib.contract import Plan
from tnlib.form import as_it_is, measured_error
from tnlib.shapes import ShapeError, check_weight, padded_modes
from tnlib.tensor_train import _Train, best_train, merge_left, merge_right, names, tt_svd


def ttm_svd(weight, out_modes, in_modes, max_rank=None, tolerance=0.0, ranks=None):
    """TT-matrix (MPO) of `weight` by TT-SVD of its interleaved tensor (o_1 i_1, o_2 i_2, …).

    weight: (…, out, in) with out = product of out_modes, in = product of in_modes; leading axes are a batch of weights
    max_rank, tolerance, ranks: as in `tt_svd`; max_rank is the bond dimension chi
    Returns: TensorTrainFit whose cores are (…, r, out_k, in_k, r')
    Raises: ShapeError if the modes do not multiply to the weight's sizes or are not equally many
    Source: Oseledets 2011, section 4.3; CompactifAI v2, section 2. Exact at full rank.
    """
    check_weight(weight, "ttm_svd")
    if len(out_modes) != len(in_modes) or (math.prod(out_modes), math.prod(in_modes)) != tuple(weight.shape[-2:]):
        raise ShapeError(
            f"ttm_svd: got out_modes {tuple(out_modes)}, in_modes {tuple(in_modes)} for weight {tuple(weight.shape)} (out, in); "
            "needed equally many modes whose products are the two sizes. Use balanced_modes(size, order)."
        )
    batch = weight.dim() - 2
    tensor = interleave(weight, out_modes, in_modes)  # (…, o_1*i_1, …, o_d*i_d)
    fit = tt_svd(tensor, max_rank, tolerance, ranks, batch_dims=batch)
    return fit._replace(cores=_paired(fit.cores, out_modes, in_modes))


def _paired(cores, out_modes, in_modes):
    """Cores (…, r, o*i, r') as (…, r, o, i, r')."""
    return [core.unflatten(-2, (o, i)) for core, o, i in zip(cores, out_modes, in_modes)]


def interleave(weight, out_modes, in_modes):
    """The tensor that a TT-matrix is a train of: (…, out, in) -> (…, o_1*i_1, …, o_d*i_d)."""
    d, batch = len(out_modes), weight.dim() - 2
    split = weight.reshape(*weight.shape[:batch], *out_modes, *in_modes)  # (…, o_1..o_d, i_1..i_d)
    order = [axis for k in range(d) for axis in (batch + k, batch + d + k)]
    return split.permute(*range(batch), *order).reshape(
        *weight.shape[:batch], *(o * i for o, i in zip(out_modes, in_modes))
    )


@dataclass(frozen=True)
class TTMatrix(_Train):
    """weight (out, in) as cores (r, out_k, in_k, r'); `max_rank` is the bond dimension. MPO is another name for it.

    pad_rows: let out_modes multiply to more than the weight's rows (a vocabulary that has no modes); the extra rows are zero.
        With order=, modes are those of the next number that splits well
    """

    pad_rows: bool = False

    _axes = 2  # mode axes of a core, (r, o, i, r')

    def _modes(self):
        return tuple(o * i for o, i in zip(self.out_modes, self.in_modes))

    def _split_rows(self, size):
        return padded_modes(size, self.order) if self.pad_rows else super()._split_rows(size)

    def _check_modes(self, shape):
        if len(self.out_modes) != len(self.in_modes):
            raise ShapeError(
                f"TTMatrix: got {len(self.out_modes)} out_modes {self.out_modes} and {len(self.in_modes)} in_modes {self.in_modes}; "
                "needed equally many, one pair a core. Pad the shorter one with 1."
            )
        if self.pad_rows and math.prod(self.out_modes) >= shape[0]:
            shape = (math.prod(self.out_modes), shape[1])
        super()._check_modes(shape)

    def factor_shapes(self, shape):
        """Stored cores by name, (r, out_k, in_k, r')."""
        pairs = zip(self.out_modes, self.in_modes)
        return {f"core{k}": (self.ranks[k], o, i, self.ranks[k + 1]) for k, (o, i) in enumerate(pairs)}

    def decompose(self, weight, init="svd", generator=None):
        """weight (…, out, in) -> cores by name, relative error (…,). init: 'svd' (TT-SVD), 'als' (that, then sweeps)."""
        padded = F.pad(weight, (0, 0, 0, math.prod(self.out_modes) - weight.shape[-2]))  # (…, product of out_modes, in)
        tensor = interleave(padded, self.out_modes, self.in_modes)  # (…, o_1*i_1, …, o_d*i_d)
        cores, error = best_train("TTMatrix", tensor, self.ranks, init, weight.dim() - 2)
        factors = self._named(_paired(cores, self.out_modes, self.in_modes))
        if padded.shape == weight.shape:
            return factors, error
        return factors, measured_error(weight, self.to_dense(factors, weight.shape[-2:]))  # padding rows do not count

    def _split(self):
        """Bond at which the two merged halves meet in `to_dense`: the one with the smallest rank is the cheapest GEMM."""
        return min(range(1, len(self.ranks) - 1), key=self.ranks.__getitem__, default=0)

    def _halves(self, factors):
        """Both sides of the split, merged: (…, pairs on the left, r), (…, r, pairs on the right); pairs are o_1*i_1*o_2*i_2*…"""
        cores, at = [core.flatten(-3, -2) for core in names(factors)], self._split()
        return merge_left(cores[:at]), merge_right(cores[at:])

    def _outputs_first(self, tensor, cores):
        """Last axis o_a*i_a*o_b*i_b*… of the named cores -> two axes (…, outputs, inputs)."""
        pairs = [size for k in cores for size in (self.out_modes[k], self.in_modes[k])]
        split, batch = tensor.unflatten(-1, pairs), tensor.dim() - 1
        order = [*range(batch, split.dim(), 2), *range(batch + 1, split.dim(), 2)]
        return split.permute(*range(batch), *order).reshape(
            *tensor.shape[:-1], math.prod(pairs[::2]), math.prod(pairs[1::2])
        )

    def to_dense(self, factors, shape):
        """The weight (…, out, in) that the cores stand for: each half merged, one GEMM, one reordering."""
        if len(self.out_modes) == 1:
            return factors["core0"].squeeze(-1).squeeze(-3)[..., : shape[0], :]
        left, right = self._halves(factors)
        whole = (left @ right).flatten(-2)  # (…, o_1*i_1*…*o_d*i_d)
        return self._outputs_first(whole, range(len(self.out_modes)))[..., : shape[0], :]

    def _merge_flops(self):
        """Cost of merging both halves at the split, one GEMM a core."""
        modes, at, total = self._modes(), self._split(), 0
        for k in range(1, at):
            total += 2 * math.prod(modes[: k + 1]) * self.ranks[k] * self.ranks[k + 1]
        for k in range(at, len(modes) - 1):
            total += 2 * math.prod(modes[k:]) * self.ranks[k] * self.ranks[k + 1]
        return total

    def _sweep_plan(self, name, tokens, forward):
        """Cost of contracting core by core, from the first core or from the last."""
        d, flops, elements = len(self.out_modes), 0, 0
        for step in range(d):
            k = step if forward else d - 1 - step
            done, ahead = (range(k), range(k + 1, d)) if forward else (range(k + 1, d), range(k))
            around = tokens * math.prod(self.out_modes[j] for j in done) * math.prod(self.in_modes[j] for j in ahead)
            core = self.ranks[k] * self.out_modes[k] * self.in_modes[k] * self.ranks[k + 1]
            entering, leaving = (self.ranks[k], self.ranks[k + 1]) if forward else (self.ranks[k + 1], self.ranks[k])
            flops += 2 * around * core
            elements += around * (self.in_modes[k] * entering + self.out_modes[k] * leaving) + core
        return Plan(name, flops, elements, 3 * d)

    def plans(self, shape, tokens):
        """'left to right', 'right to left': core by core, copy-free; 'rebuild': the weight, then one GEMM."""
        build = self._merge_flops() + 2 * math.prod(self._modes()) * self.ranks[self._split()]
        sweeps = [self._sweep_plan("left to right", tokens, True), self._sweep_plan("right to left", tokens, False)]
        return [*sweeps, self._rebuild_plan(shape, tokens, build)]

    def contract(self, x, factors, shape, plan="left to right", between=as_it_is):
        """x (tokens, in) -> (tokens, out), one small matrix times a batch of blocks for each core."""
        cores, tokens, last = names(factors), x.shape[0], len(factors) - 1
        blocks, ahead, done = tokens, shape[1], 1
        if plan == "left to right":
            for k, core in enumerate(cores):  # state: (tokens * outputs done, r * i, inputs ahead)
                r, o, i, s = core.shape
                ahead //= i
                x = core.permute(1, 3, 0, 2).reshape(o * s, r * i) @ x.reshape(blocks, r * i, ahead)
                x = between(x, f"core{k}") if k < last else x
                blocks *= o
        else:
            blocks *= shape[1]
            for k, core in reversed(list(enumerate(cores))):  # state: (tokens * inputs ahead, i * s, outputs done)
                r, o, i, s = core.shape
                blocks //= i
                x = core.reshape(r * o, i * s) @ x.reshape(blocks, i * s, done)
                x = between(x, f"core{k}") if k else x
                done *= o
        return x.reshape(tokens, -1)[:, : shape[0]]  # (tokens, out)

    def row_plans(self, shape, tokens):
        """'chain': gather a slice of every core, multiply along the chain; 'halves': merge both sides once, gather, one product."""
        d, width, at = len(self.out_modes), shape[1], self._split()
        slices = sum(self.ranks[k] * self.in_modes[k] * self.ranks[k + 1] for k in range(d))
        steps = sum(math.prod(self.in_modes[: k + 1]) * self.ranks[k] * self.ranks[k + 1] for k in range(1, d))
        chain = Plan("chain", 2 * tokens * steps, 2 * tokens * (slices + width), 3 * d)
        table = (math.prod(self._modes()[:at]) + math.prod(self._modes()[at:])) * self.ranks[at]
        gathered = (math.prod(self.in_modes[:at]) + math.prod(self.in_modes[at:])) * self.ranks[at]
        flops = 2 * tokens * width * self.ranks[at] + self._merge_flops()
        return [chain, Plan("halves", flops, 4 * table + 2 * tokens * (gathered + width), 2 * d + 5)]

    def rows(self, ids, factors, shape, plan="chain"):
        """Rows `ids` (tokens,) of the weight, without building it: (tokens, in)."""
        if plan == "halves" and len(self.out_modes) > 1:
            return self._rows_from_halves(ids, factors, shape)
        row = torch.ones(len(ids), 1, 1, dtype=factors["core0"].dtype, device=ids.device)  # (tokens, inputs done, r)
        below = math.prod(self.out_modes)
        for core, o in zip(names(factors), self.out_modes):
            below //= o
            piece = core.movedim(1, 0).flatten(2)[ids // below % o]  # (tokens, r, i*r')
            row = (row @ piece).reshape(len(ids), -1, core.shape[-1])  # (tokens, inputs done * i, r')
        return row.reshape(len(ids), shape[1])

    def _rows_from_halves(self, ids, factors, shape):
        at, (left, right) = self._split(), self._halves(factors)
        d, below = len(self.out_modes), math.prod(self.out_modes[at:])
        left = self._outputs_first(left.mT, range(at)).movedim(0, -1)  # (O_L, I_L, r)
        right = self._outputs_first(right, range(at, d)).movedim(1, 0)  # (O_R, r, I_R)
        return (left[ids // below] @ right[ids % below]).reshape(len(ids), shape[1])  # (tokens, in)


MPO = TTMatrix
