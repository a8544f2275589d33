"""Kronecker and tensor-train decompositions beside independent oracles: torch.kron, a full SVD, TensorLy, and theory."""

import numpy as np
import pytest
import tensorly.decomposition
import torch
from conftest import SHAPE

from tnlib.kronecker import Kronecker, nearest_kronecker, norm_preserving_scale, prune_factors, rearrange
from tnlib.low_rank import low_rank, low_rank_errors
from tnlib.shapes import ShapeError
from tnlib.tensor_train import TensorTrain, merge_left, possible_ranks, tt_svd
from tnlib.tt_matrix import TTMatrix, ttm_svd


def dense_train(cores):
    """A train contracted the slow way, as an oracle."""
    whole = cores[0]
    for core in cores[1:]:
        whole = torch.tensordot(whole, core, dims=1)
    return whole.squeeze(0).squeeze(-1)


def test_rearranged_kron_is_an_outer_product():
    a, b = torch.randn(2, 5), torch.randn(4, 3)
    assert torch.allclose(rearrange(torch.kron(a, b), (2, 5), (4, 3)), torch.outer(a.ravel(), b.ravel()))


def test_planted_kronecker_terms_are_found_exactly():
    planted = sum(
        torch.kron(torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)) for _ in range(3)
    )
    left, right, error = nearest_kronecker(planted, (4, 6), (6, 6), terms=3)
    rebuilt = sum(torch.kron(a, b) for a, b in zip(left, right))
    assert torch.allclose(rebuilt, planted, atol=1e-10)
    assert error < 1e-7
    assert nearest_kronecker(planted, (4, 6), (6, 6), terms=2).error > 0.1


def test_nearest_kronecker_equals_the_svd_of_the_rearrangement(weight):
    left, right, error = nearest_kronecker(weight, (12, 12), (2, 3), terms=2)
    s = torch.linalg.svdvals(rearrange(weight, (12, 12), (2, 3)))
    assert torch.allclose(error, (s[2:] ** 2).sum().sqrt() / weight.norm())
    assert torch.allclose(left.norm(dim=(1, 2)), right.norm(dim=(1, 2)))  # the singular value is shared evenly


def test_norm_preserving_scale_restores_the_norm_and_raises_the_error(weight):
    form = Kronecker(right=(2, 3), terms=2).resolve(SHAPE)
    plain, plain_error = form.decompose(weight)
    scaled, scaled_error = form.decompose(weight, "norm")
    rho = (1 - plain_error**2).sqrt()
    assert torch.allclose(form.to_dense(scaled, SHAPE).norm(), weight.norm())
    assert torch.allclose(
        scaled_error, (2 - 2 * rho).sqrt()
    )  # Krony-PT's paradox: sqrt(1 - rho^2) becomes sqrt(2 - 2 rho)
    alpha = norm_preserving_scale(weight, form.to_dense(plain, SHAPE))
    assert torch.allclose(alpha, 1 / rho)


def test_scales_start_at_alpha_and_fold_into_the_left_factor(weight):
    form = Kronecker(right=(2, 3), terms=2, scaled=True).resolve(SHAPE)
    factors, _ = form.decompose(weight, "norm")
    assert factors["scale"].shape == (2,)
    assert torch.allclose(factors["scale"], factors["scale"][0].expand(2))
    folded = {"left": factors["left"] * factors["scale"][:, None, None], "right": factors["right"]}
    plain = Kronecker(right=(2, 3), terms=2).resolve(SHAPE)
    assert torch.allclose(form.to_dense(factors, SHAPE), plain.to_dense(folded, SHAPE))


def test_pruning_initialization_keeps_every_other_row_exactly(weight):
    left, right = prune_factors(weight, (12, 36), (2, 1))
    product = torch.kron(left[0], right[0])
    assert torch.equal(right[0], torch.tensor([[1.0], [0.1]], dtype=torch.float64))
    assert torch.equal(product[::2], weight[::2])
    assert torch.allclose(product[1::2], 0.1 * weight[::2])


@pytest.mark.parametrize("modes", [(4, 5, 6), (2, 3, 4, 5), (7, 3), (6,), (5, 1, 4)])
@pytest.mark.parametrize("max_rank", [1, 3, None])
def test_train_error_is_the_sum_of_what_was_cut_and_within_the_bound(modes, max_rank):
    x = torch.randn(modes, dtype=torch.float64)
    cores, ranks, error, discarded = tt_svd(x, max_rank)
    measured = (x - dense_train(cores)).norm() / x.norm()
    best = []
    for k in range(1, len(modes)):
        s = torch.linalg.svdvals(x.reshape(int(np.prod(modes[:k])), -1))
        best.append(((s[ranks[k] :] ** 2).sum() / x.norm() ** 2).sqrt())
    assert torch.allclose(measured, error, atol=1e-9)
    assert torch.allclose(torch.tensor(discarded).sum().double(), error**2, atol=1e-9)
    assert error**2 <= sum(b**2 for b in best) + 1e-12  # Oseledets 2011, theorem 2.2
    assert ranks == possible_ranks("t", modes, max_rank)
    assert all(core.shape == (r, n, s) for core, r, n, s in zip(cores, ranks, modes, ranks[1:]))


def test_cores_on_both_sides_of_the_one_split_last_are_orthonormal_where_a_cut_keeps_all():
    tensor = torch.randn(3, 2, 5, 4, 6, 2, dtype=torch.float64)
    cores = tt_svd(tensor, ranks=(1, 3, 6, 7, 12, 2, 1)).cores
    turned = [
        torch.allclose(flat @ flat.mT, torch.eye(len(flat), dtype=flat.dtype), atol=1e-10)
        for flat in [*(core.flatten(0, 1).mT for core in cores[:3]), *(core.flatten(1) for core in cores[3:])]
    ]
    assert turned.count(False) == 1  # the core that carries the singular values
    merged = merge_left(cores[:2])  # (6, 6): the basis of the first two modes
    left = torch.linalg.svd(tensor.reshape(6, -1), full_matrices=False).U
    assert torch.allclose((left.mT @ merged).abs(), torch.eye(6, dtype=left.dtype), atol=1e-6)  # in order, up to signs


@pytest.mark.parametrize("tolerance", [0.6, 0.2, 1e-2])
def test_train_tolerance_is_met(tolerance):
    x = torch.randn(4, 5, 6, 3, dtype=torch.float64)
    fit = tt_svd(x, tolerance=tolerance)
    assert (x - dense_train(fit.cores)).norm() / x.norm() <= tolerance
    assert max(fit.ranks) < 15 or tolerance < 0.1


def test_train_is_no_worse_than_tensorly_by_more_than_the_sweep_direction():
    x = torch.randn(6, 7, 8, dtype=torch.float64)
    with tensorly.backend_context("numpy"):  # tensorly-torch sets another at import
        theirs = tensorly.decomposition.tensor_train(x.numpy(), rank=[1, 4, 4, 1]).to_tensor()
    their_error = np.linalg.norm(x.numpy() - theirs) / x.norm()
    assert abs(float(tt_svd(x, 4).error) - float(their_error)) < 0.02  # both quasi-optimal, swept from different ends


def test_sampled_sine_of_a_sum_has_rank_two():
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    x = torch.sin(t[:, None, None, None] + t[None, :, None, None] + t[None, None, :, None] + t)
    fit = tt_svd(x, tolerance=1e-7)
    assert fit.ranks == (1, 2, 2, 2, 1)


def test_a_train_weight_has_matrix_rank_at_most_its_middle_rank(weight):
    form = TensorTrain(order=2, max_rank=3).resolve(SHAPE)
    dense = form.to_dense(form.decompose(weight)[0], SHAPE)
    assert torch.linalg.matrix_rank(dense) == form.middle_rank == 3


def test_an_mpo_of_bond_dimension_one_is_a_kronecker_product_of_full_rank():
    a, b = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    cores, ranks, error, _ = ttm_svd(torch.kron(a, b), (4, 6), (6, 6), max_rank=1)
    assert error < 1e-7
    assert ranks == (1, 1, 1)
    form = TTMatrix(out_modes=(4, 6), in_modes=(6, 6), max_rank=1).resolve(SHAPE)
    dense = form.to_dense({f"core{k}": core for k, core in enumerate(cores)}, SHAPE)
    assert torch.linalg.matrix_rank(dense) == 24
    assert torch.allclose(dense, torch.kron(a, b))


def test_ranks_of_the_wrong_length_are_refused_not_dropped():
    with pytest.raises(ShapeError, match="needed 4 ranks with 1 at both ends"):
        tt_svd(torch.randn(8, 12, 8), ranks=(24, 48, 24))


def test_low_rank_errors_are_those_of_every_rank(weight):
    errors = low_rank_errors(weight)
    assert errors.shape == (24,)
    for rank in (1, 7, 24):
        assert torch.allclose(errors[rank - 1], low_rank(weight, rank).error, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precisions_are_decomposed_in_float32(dtype):
    weight = torch.randn(SHAPE).to(dtype)
    assert low_rank(weight, 24).left.dtype == torch.float32
    assert low_rank(weight, 12).error < low_rank(weight, 6).error


def test_float32_at_full_rank_is_exact_to_its_own_rounding():
    weight = torch.randn(64, 96)
    for form in (TTMatrix(order=3), TensorTrain(order=2)):
        form = form.resolve((64, 96))
        assert (form.to_dense(form.decompose(weight)[0], (64, 96)) - weight).abs().max() < 1e-5  # float32
