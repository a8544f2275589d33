"""The TT-matrix, which physics calls a matrix product operator (MPO): every core pairs an output with an input mode.

Cores are (r, out_k, in_k, r'). The weight's matrix rank can be full whatever the bond dimension, so an MPO is not a
low-rank layer. It saves parameters and not arithmetic: contracting it core by core often costs more than the dense GEMM.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F

from tnlib.contract import Arrangement, partitions
from tnlib.form import measured_error
from tnlib.shapes import ShapeError, check_weight, padded_modes
from tnlib.tensor_train import _Train, best_train, names, tt_svd


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
    fit = tt_svd(interleave(weight, out_modes, in_modes), max_rank, tolerance, ranks, batch_dims=batch)
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

    def paired(self, factors):
        """The cores as they are, (…, r, out_k, in_k, r')."""
        return names(factors)

    def to_dense(self, factors, shape):
        """The weight (…, out, in) that the cores stand for; rows of padding are cut off."""
        return super().to_dense(factors, shape)[..., : shape[0], :]

    def arrangements(self, shape):
        """Sweeps from either end, over the cores as they are and over every way to merge neighbors beforehand."""
        found = []
        for groups in partitions(len(self.out_modes)):
            merged = ", ".join(f"{first}-{end - 1}" for first, end in groups if end - first > 1)
            merged = f", {merged} merged" if merged else ""
            for name, forward in (("left to right", True), ("right to left", False)):
                found.append(Arrangement(f"{name}{merged}", groups, forward))
                if len(groups) > 1:
                    found.append(Arrangement(f"{name}{merged}, turned", groups, forward, turned=True))
        return tuple(found)

    def _leave(self, y, factors, shape):
        return y[:, : shape[0]]

    def _ends_elsewhere(self, shape):
        return math.prod(self.out_modes) > shape[0]

    def row_groups(self, shape):
        """'chain': a slice of every core, multiplied along the chain; 'halves': both sides merged beforehand, one product."""
        chain = ("chain", tuple((k, k + 1) for k in range(len(self.out_modes))))
        halves = [(f"halves, cut at {cut}", ((0, cut), (cut, len(self.out_modes)))) for cut in range(1, len(self.out_modes))]
        return (chain, *halves)


MPO = TTMatrix
