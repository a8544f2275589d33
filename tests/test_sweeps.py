"""Sweeps over the cores of a train: they only go downhill, the canonical error is the measured one, and where they start matters."""

import math

import numpy as np
import pytest
import tensorly
import torch
from conftest import SHAPE
from hypothesis import given, settings
from hypothesis import strategies as st

from tnlib.recipe import Recipe, Rule
from tnlib.shapes import ShapeError
from tnlib.sweeps import als
from tnlib.tensor_train import TensorTrain, merge_left, tt_svd
from tnlib.tt_matrix import TTMatrix

FORMS = [
    TensorTrain(order=2, max_rank=5),
    TensorTrain(order=2, ranks=(1, 9, 9, 9, 1), redundant=True),
    TTMatrix(order=3, max_rank=4),
    TTMatrix(order=1),
    TTMatrix(out_modes=(5, 5, 1), in_modes=(3, 3, 4), max_rank=4, pad_rows=True),
]


def random_train(modes, rank, batch=()):
    """A tensor that is a train of bonds `rank`, float64."""
    ranks = (1, *[rank] * (len(modes) - 1), 1)
    cores = [torch.randn(*batch, r, n, s, dtype=torch.float64) for r, n, s in zip(ranks, modes, ranks[1:])]
    return merge_left(cores).reshape(*batch, *modes)


def measured(tensor, cores, batch_dims=0):
    wide = tensor.flatten(batch_dims).double()
    return (wide - merge_left(cores).flatten(batch_dims).double()).norm(dim=-1) / wide.norm(dim=-1)


@settings(max_examples=20, deadline=None)
@given(
    modes=st.lists(st.integers(1, 6), min_size=1, max_size=5), rank=st.integers(1, 7), batch=st.sampled_from([(), (2,)])
)
def test_downhill_never_worse_than_tt_svd_and_the_energy_is_the_error(modes, rank, batch):
    x = torch.randn(*batch, *modes, dtype=torch.float64)
    start = tt_svd(x, rank, batch_dims=len(batch))
    fit = als(start.cores, x, batch_dims=len(batch))
    assert fit.ranks == start.ranks
    squares = torch.cat([start.error[None], fit.history]) ** 2
    assert (squares.diff(dim=0) <= 1e-12).all()
    assert torch.allclose(fit.error**2, measured(x, fit.cores, len(batch)) ** 2, atol=1e-12)
    assert torch.allclose(
        fit.error**2, 1 - (fit.cores[-1] ** 2).sum((-3, -2, -1)) / x.flatten(len(batch)).square().sum(-1), atol=1e-12
    )


def test_all_cores_but_the_last_are_orthonormal():
    x = torch.randn(5, 6, 4, 3, dtype=torch.float64)
    for core in als(tt_svd(x, 4).cores, x).cores[:-1]:
        flat = core.flatten(0, 1)  # (r*n, r')
        assert torch.allclose(flat.T @ flat, torch.eye(flat.shape[1], dtype=x.dtype), atol=1e-12)


def test_exact_at_full_rank_and_where_the_tensor_has_the_rank():
    x, low = torch.randn(4, 5, 6, 3, dtype=torch.float64), random_train((5, 4, 6, 5), 3)
    for tensor, cap in ((x, None), (low, 3), (low, 5)):
        start = tt_svd(tensor, cap)
        assert measured(tensor, als(start.cores, tensor).cores) < 1e-12
    fit = als(tt_svd(low, 3).cores, low)
    assert len(fit.history) == 4 + 2 * 3 + 1  # one sweep, and one more, there and back, that finds nothing


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_hidden_train_is_found_from_random_cores(batch):
    x = random_train((6, 5, 6, 5), 2, batch)
    start = [torch.randn_like(core) for core in tt_svd(x, 2, batch_dims=len(batch)).cores]
    fit = als(start, x, sweeps=60, tolerance=0, batch_dims=len(batch))
    assert (measured(x, fit.cores, len(batch)) < 1e-6).all()


def test_of_two_modes_it_is_the_truncated_svd():
    x = torch.randn(20, 30, dtype=torch.float64)
    start = [torch.randn(1, 20, 4, dtype=x.dtype), torch.randn(4, 30, 1, dtype=x.dtype)]
    best = torch.linalg.svdvals(x)[4:].square().sum().sqrt() / x.norm()
    assert als(tt_svd(x, 4).cores, x).error == pytest.approx(float(best), rel=1e-10)
    assert als(start, x, sweeps=2000, tolerance=0).error == pytest.approx(float(best), rel=1e-6)


def test_gains_on_noise_and_is_below_what_tensorly_finds():
    x = torch.randn(6, 7, 8, 6, dtype=torch.float64)
    start = tt_svd(x, 4)
    fit = als(start.cores, x, sweeps=200, tolerance=1e-8)
    assert fit.error < 0.995 * start.error
    with tensorly.backend_context("numpy"):  # tensorly-torch sets another at import
        theirs = tensorly.tt_to_tensor(tensorly.decomposition.tensor_train(x.numpy(), rank=[1, 4, 4, 4, 1]))
    assert fit.error < np.linalg.norm(x.numpy() - theirs) / x.norm()


def test_each_core_is_the_least_squares_solution_with_the_others_in_place():
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    cores = als(tt_svd(x, 3).cores, x, sweeps=500, tolerance=0).cores
    for k, core in enumerate(cores):
        unit = torch.eye(core.numel(), dtype=x.dtype)
        design = [merge_left([*cores[:k], e.reshape(core.shape), *cores[k + 1 :]]).flatten() for e in unit]
        best = torch.linalg.lstsq(torch.stack(design, 1), x.flatten()[:, None]).solution  # (numbers in the core, 1)
        assert torch.allclose(best, core.reshape(-1, 1), atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forms_know_als_as_an_initialization(form, weight):
    form = form.resolve(SHAPE)
    svd, before = form.decompose(weight)
    factors, error = form.decompose(weight, "als")
    assert {n: f.shape for n, f in factors.items()} == {n: f.shape for n, f in svd.items()}
    missed = (weight - form.to_dense(factors, SHAPE)).norm() / weight.norm()
    assert float(error) == pytest.approx(float(missed), abs=1e-7)
    assert missed <= before + 1e-7
    batch, _ = form.decompose(torch.stack([weight, 2 * weight]), "als")
    assert torch.allclose(form.to_dense(batch, SHAPE)[1], 2 * form.to_dense(factors, SHAPE), atol=1e-6)


def test_a_recipe_says_als_and_another_form_refuses_it(weight):
    rule = Rule(where="mlp", form=TTMatrix(order=3, max_rank=4), init="als")
    assert Recipe.from_dict(Recipe(name="x", rules=(rule,)).to_dict()).rules[0].init == "als"
    with pytest.raises(ShapeError, match="got init='alt'; this format knows svd, als"):
        TTMatrix(order=2, max_rank=3).resolve(SHAPE).decompose(weight, "alt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_half_precisions_come_back_as_float32_and_no_worse(dtype):
    x = torch.randn(6, 7, 8).to(dtype)
    start = tt_svd(x, 4)
    fit = als(start.cores, x)
    assert {core.dtype for core in fit.cores} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert fit.error <= start.error
    assert float(fit.error) == pytest.approx(float(measured(x, fit.cores)), abs=1e-6)


def test_zero_and_damaged_tensors():
    zero = torch.zeros(3, 4, 5)
    assert float(als(tt_svd(zero, 2).cores, zero).error) == 0
    cores = tt_svd(torch.randn(3, 4, 5), 2).cores
    with pytest.raises(ShapeError, match=r"als: .* 1 of 60 entries NaN or infinite"):
        als(cores, zero.index_put((torch.tensor(0),) * 3, torch.tensor(math.nan)))
    with pytest.raises(ShapeError, match=r"als: got cores .* for modes \(3, 4\); needed one"):
        als(cores, zero[..., 0])
