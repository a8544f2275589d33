"""Decompositions of one matrix: tnlib's, torch's own SVDs swept over the modes, and those of the peers.

Each takes (weight, out_modes, in_modes, ranks), ranks with 1 at both ends, and returns cores (r, out, in, r'). A Kronecker
sum of k terms is the case of two cores and ranks (1, k, 1), so that every TT-matrix peer can take part in it.
`exact` is the reference: the same sweep in float64 by the Gram matrix of the shorter side, for two cores the best there is.
"""

import contextlib
import io
import math
from functools import partial

import torch
from peers import need

import tnlib as tn
from tnlib.tt_matrix import interleave


def tnlib(weight, out_modes, in_modes, ranks):
    if len(out_modes) == 2:
        left, right = zip(out_modes, in_modes)
        a, b, _ = tn.nearest_kronecker(weight, left, right, ranks[1])  # (k, l0, l1), (k, r0, r1)
        return [a.permute(1, 2, 0)[None], b[..., None]]
    return tn.ttm_svd(weight, out_modes, in_modes, ranks=ranks).cores


def swept(svd, weight, out_modes, in_modes, ranks):
    """TT-SVD from the first core to the last; svd: (matrix, k) -> left (m, k), right (k, n)."""
    cores, rest, r = [], interleave(weight, out_modes, in_modes), 1
    for o, i, s in zip(out_modes[:-1], in_modes, ranks[1:]):
        left, rest = svd(rest.reshape(r * o * i, -1), s)
        cores.append(left.reshape(r, o, i, -1))
        r = left.shape[1]
    return [*cores, rest.reshape(r, out_modes[-1], in_modes[-1], 1)]


def full_svd(matrix, k):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :k], s[:k, None] * vh[:k]


def svd_lowrank(matrix, k, niter):
    u, s, v = torch.svd_lowrank(matrix, min(k, *matrix.shape), niter)
    return u, s[:, None] * v.T


def gram(matrix, k):
    """Exact up to float64's rounding, in the time of the shorter side."""
    wide = matrix.double()
    if wide.shape[0] <= wide.shape[1]:
        left = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -k:]  # (m, k)
        return left, left.T @ wide
    right = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -k:]  # (n, k)
    return wide @ right, right.T


exact = partial(swept, gram)


def tensorly(method, weight, out_modes, in_modes, ranks):
    need("tensorly")
    import tensorly
    from tensorly.decomposition import tensor_train_matrix

    with tensorly.backend_context("pytorch"):
        return tensor_train_matrix(weight.reshape(*out_modes, *in_modes), list(ranks), svd=method).factors


def torchtt(weight, out_modes, in_modes, ranks):
    need("torchtt")
    with contextlib.redirect_stdout(io.StringIO()):
        import torchtt

    shape = list(zip(out_modes, in_modes))
    return torchtt.TT(weight.reshape(*out_modes, *in_modes), shape=shape, rmax=list(ranks)).cores


def torch_mpo(weight, out_modes, in_modes, ranks):
    need("torch_mpo")
    from torch_mpo.decomposition import matrix_tt_svd

    found, r, cores = matrix_tt_svd(weight, list(in_modes), list(out_modes), list(ranks)), 1, []
    for core, o, i in zip(found, out_modes, in_modes):
        cores.append(core.reshape(r, o, -1, i).transpose(2, 3))  # (r, o, i, r')
        r = cores[-1].shape[-1]
    return cores


def tntorch(weight, out_modes, in_modes, ranks):
    need("tntorch")
    import tntorch

    return tntorch.TTMatrix(weight, list(ranks[1:-1]), list(out_modes), list(in_modes)).cores


def tntorch_eig(weight, out_modes, in_modes, ranks):
    need("tntorch")
    import tntorch

    found = tntorch.Tensor(interleave(weight, out_modes, in_modes), ranks_tt=list(ranks[1:-1]), algorithm="eig").cores
    return [core.reshape(core.shape[0], o, i, -1) for core, o, i in zip(found, out_modes, in_modes)]


CONTESTANTS = {
    "tnlib": tnlib,
    "tnlib again": tnlib,
    "torch full SVD": partial(swept, full_svd),
    "torch.svd_lowrank": partial(swept, partial(svd_lowrank, niter=2)),
    "torch.svd_lowrank, 10 iterations": partial(swept, partial(svd_lowrank, niter=10)),
    "tensorly": partial(tensorly, "truncated_svd"),
    "tensorly, randomized": partial(tensorly, "randomized_svd"),
    "tntorch": tntorch,
    "tntorch, eig": tntorch_eig,
    "torchTT": torchtt,
    "torch-mpo": torch_mpo,
}


def rebuilt(cores, out_modes, in_modes):
    """The weight (out, in) that cores stand for."""
    whole = cores[0].flatten(0, 2)  # (o*i, r)
    for core in cores[1:]:
        whole = (whole @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])  # (pairs, r')
    d = len(out_modes)
    pairs = [size for pair in zip(out_modes, in_modes) for size in pair]
    order = [*range(0, 2 * d, 2), *range(1, 2 * d, 2)]
    return whole.reshape(pairs).permute(order).reshape(math.prod(out_modes), math.prod(in_modes))


def error(weight, cores, out_modes, in_modes):
    """Relative Frobenius error, by subtracting."""
    return float((weight - rebuilt(cores, out_modes, in_modes).to(weight)).norm() / weight.norm())
