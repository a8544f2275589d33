"""spectrum: the needed triplets equal a full SVD's, by either route, in batches, to the stated error."""

import pytest
import torch

from tnlib import spectrum
from tnlib.spectrum import truncate


@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (9, 9), (1, 5), (5, 1), (256, 300), (310, 259)])  # from 256: strips of a Gram
@pytest.mark.parametrize("rank", [1, 3, None])
def test_equals_full_svd(shape, rank):
    matrix = torch.randn(shape, dtype=torch.float64)
    cut = truncate(matrix, rank)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    r = cut.rank
    assert torch.allclose(cut.left @ cut.right, u[:, :r] * s[:r] @ v[:r], atol=1e-10)
    assert torch.allclose(cut.values, s[:r], atol=1e-10)
    assert torch.allclose(cut.discarded, (s[r:] ** 2).sum(), atol=1e-10)


def test_the_shorter_side_is_orthonormal_and_balancing_keeps_the_product():
    for shape, side in (((6, 11), "left"), ((11, 6), "right")):
        cut = truncate(torch.randn(shape, dtype=torch.float64), 4)
        basis = cut.left if side == "left" else cut.right.mT
        assert cut.orthonormal == side
        assert torch.allclose(basis.mT @ basis, torch.eye(4, dtype=torch.float64), atol=1e-12)
        left, right = cut.balanced()
        assert torch.allclose(left @ right, cut.left @ cut.right, atol=1e-12)
        assert torch.allclose(left.norm(dim=0), right.norm(dim=1), atol=1e-10)


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3])
def test_tolerance_keeps_the_fewest_that_reach_it(tolerance):
    matrix = torch.randn(30, 40, dtype=torch.float64) * torch.logspace(0, -4, 40, dtype=torch.float64)
    cut = truncate(matrix, tolerance=tolerance)
    error = (cut.discarded / cut.total).sqrt()
    assert error <= tolerance
    fewer = truncate(matrix, cut.rank - 1)
    assert (fewer.discarded / fewer.total).sqrt() > tolerance


def test_strips_of_a_gram_are_its_lower_triangle():
    for shape in ((2, 256, 300), (2, 1500, 301)):
        matrix = torch.randn(shape)
        gram = matrix @ matrix.mT if shape[1] <= shape[2] else matrix.mT @ matrix
        assert torch.allclose(spectrum._gram(matrix).tril(), gram.tril(), atol=1e-3)
        assert torch.allclose(spectrum._gram(matrix, torch.float64).tril(), gram.double().tril(), atol=1e-3)


def test_batch_equals_one_by_one():
    stack = torch.randn(3, 2, 8, 12, dtype=torch.float64)
    cut = truncate(stack, 3)
    one = truncate(stack[1, 1], 3)
    assert torch.allclose((cut.left @ cut.right)[1, 1], one.left @ one.right, atol=1e-12)
    assert torch.allclose(cut.discarded[1, 1], one.discarded)


@pytest.mark.parametrize("limit", ["GRAM_LIMIT", "SQUARE_LIMIT"])
@pytest.mark.parametrize("transposed", [False, True])
def test_block_lanczos_captures_the_exact_energy_on_a_flat_spectrum(monkeypatch, transposed, limit):
    matrix = torch.randn(480, 600)  # Gaussian: the flattest spectrum there is, the hardest to separate
    matrix = matrix.T if transposed else matrix
    exact = truncate(matrix, 10)
    monkeypatch.setattr(spectrum, limit, 100)
    monkeypatch.setattr(spectrum, "_exact", None)  # not this way
    found = truncate(matrix, 10)
    excess = (found.discarded / found.total).sqrt() - (exact.discarded / exact.total).sqrt()
    assert excess + 1e-7 >= 0
    assert excess < 1e-4  # the library's promise for large unfoldings


def test_what_is_nearly_of_low_rank_is_cut_in_float64_whatever_its_size(monkeypatch):
    monkeypatch.setattr(spectrum, "SQUARE_LIMIT", 100)
    planted = torch.randn(480, 10) @ torch.randn(10, 600)
    cut = truncate(planted, 10)
    assert (cut.discarded / cut.total).sqrt() < 1e-6
    assert (planted - cut.left @ cut.right).norm() < 1e-5 * planted.norm()


@pytest.mark.parametrize("noise", [1.0, 1e-3])
def test_large_matrices_are_cut_in_float32_only_where_it_cannot_be_seen(monkeypatch, noise):
    matrix = torch.randn(60, 8) @ torch.randn(8, 90) / 8**0.5 + noise * torch.randn(60, 90)
    exact, dtypes, eigh = truncate(matrix.double(), 8), [], torch.linalg.eigh
    monkeypatch.setattr(spectrum, "LARGE", 0)
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: dtypes.append(gram.dtype) or eigh(gram))
    found = truncate(matrix, 8)
    assert dtypes == [torch.float32] + [torch.float64] * (noise < 1)
    missed = [(cut.discarded / cut.total).sqrt() for cut in (found, exact)]
    assert torch.allclose(*missed, rtol=1e-4)
    assert torch.allclose((matrix - found.left @ found.right).norm() / matrix.norm(), missed[1].float(), rtol=1e-4)


def test_zero_and_rank_deficient_matrices_stay_finite():
    left, right = truncate(torch.zeros(4, 6), 2).balanced()
    assert torch.equal(left @ right, torch.zeros(4, 6))
    thin = torch.randn(20, 1) @ torch.randn(1, 30)
    left, right = truncate(thin, 5).balanced()
    assert torch.isfinite(left).all()
    assert torch.allclose(left @ right, thin, atol=1e-5)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 40), (40, 6), (7, 7)])
def test_whole_is_a_basis_in_which_truncate_gives_the_other_side(monkeypatch, shape, large):
    monkeypatch.setattr(spectrum, "LARGE", 1 if large else 1 << 40)
    matrix = torch.randn(shape)
    found, turn = spectrum.whole(matrix)
    one = truncate(matrix)
    eye = torch.eye(turn.shape[-1])
    assert torch.allclose(turn.mT @ turn, eye.expand_as(turn), atol=1e-6)
    left, right = (found.left, turn.mT @ found.right) if found.orthonormal == "left" else (found.left @ turn, found.right)
    assert torch.allclose(left @ right, matrix, atol=1e-5)
    rows = right if found.orthonormal == "left" else left.mT
    assert torch.allclose(rows.norm(dim=-1), one.values.float(), rtol=1e-3)  # the singular values, in order
    assert found.orthonormal == one.orthonormal
    assert not found.discarded.any()
