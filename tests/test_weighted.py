"""Fits in the norm of the inputs and of the gradients: coordinates, monotone sweeps, exact cases, ranks of bonds."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnlib.block_low_rank import BlockLowRank
from tnlib.contract import merge
from tnlib.kronecker import Kronecker
from tnlib.low_rank import LowRank
from tnlib.metric import Metric, both_sides, inverses, mode_roots, through
from tnlib.sweeps import als
from tnlib.tensor_train import TensorTrain
from tnlib.tt_matrix import MPO, interleave
from tnlib.van_loan import nearest_kronecker
from tnlib.weighted import fit_weighted
from tnlib.weighted_train import spread_ranks, sweep_train

OUT, IN = (4, 3, 2), (3, 2, 4)


def uneven(width, seed=0):
    """A badly conditioned second moment (width, width)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, dtype=torch.float64, generator=generator)
    mix = mix * torch.logspace(0, -2, width, dtype=torch.float64)
    return mix @ mix.T / width + 1e-4 * torch.eye(width, dtype=torch.float64)


def matrix(out=24, width=24, seed=1):
    return torch.randn(out, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kron(tools):
    whole = torch.ones(1, 1, dtype=torch.float64)
    for tool in tools:
        whole = torch.kron(whole, tool)
    return whole


def dense(cores):
    return merge(cores).squeeze(-1).squeeze(0)


def start(weight, ranks, outs=OUT, ins=IN):
    form = MPO(out_modes=outs, in_modes=ins, ranks=ranks).resolve(tuple(weight.shape))
    return form.paired(form.decompose(weight)[0])


@given(modes=st.lists(st.integers(1, 5), min_size=1, max_size=4), rows=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_products_over_modes_are_those_with_the_kronecker_product(modes, rows):
    tools = [matrix(n, n, seed=k) for k, n in enumerate(modes)]
    whole, x = kron(tools), matrix(rows, math.prod(modes))
    assert torch.allclose(through(x, tools), x @ whole)
    second = uneven(math.prod(modes))
    assert torch.allclose(both_sides(second, tools), whole.T @ second @ whole)


def test_roots_of_modes_are_those_of_a_kronecker_product():
    parts = [uneven(n, seed=n) for n in IN]
    second = kron(parts)
    whole = kron(mode_roots(second, IN))
    found = whole @ whole.T
    assert torch.allclose(found / found.trace(), second / second.trace(), atol=1e-5 / len(second))
    assert torch.allclose(kron(inverses(mode_roots(second, IN))) @ whole, torch.eye(24, dtype=torch.float64), atol=1e-6)


METRICS = {  # and what share of the start's squared error may be left: by one site, by two
    "inputs": (Metric(uneven(24)), 0.8, 0.8),
    "both sides": (Metric(uneven(24), outputs=uneven(24, 5)), 0.8, 0.8),
    "look-ups": (Metric(rows=torch.linspace(0.1, 1, 24).double()), 0.99, 1.05),
    "table": (Metric(uneven(24), torch.linspace(0.1, 1, 24).double()), 0.99, 1.05),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("sites", [1, 2])
def test_sweeps_never_go_uphill_and_say_the_error_that_is_there(name, sites):
    metric, *left = METRICS[name]
    weight = matrix()
    cores = start(weight, (1, 5, 6, 1))
    before = metric.square(weight - dense(cores))
    found, errors = sweep_train(cores, weight, metric, sweeps=6, sites=sites)
    assert [core.shape for core in found] == [core.shape for core in cores]
    assert errors[-1] == pytest.approx(metric.square(weight - dense(found)), rel=1e-6)
    assert errors[-1] < left[sites - 1] * before
    if sites == 1:
        assert errors == sorted(errors, reverse=True)
        assert errors[0] <= before * (1 + 1e-12)


def test_with_the_identity_a_sweep_is_that_of_plain_least_squares():
    weight = matrix()
    cores = start(weight, (1, 5, 6, 1))
    _, errors = sweep_train(cores, weight, Metric(torch.eye(24, dtype=torch.float64)), sweeps=1)
    plain = als([core.flatten(1, 2) for core in cores], interleave(weight, OUT, IN), sweeps=2, tolerance=0)
    there_and_back = float(plain.history[5])  # three cores chosen, then the second and the first again
    assert (errors[0] / float(weight.square().sum())) ** 0.5 == pytest.approx(there_and_back, rel=1e-8)


def test_in_a_metric_that_is_a_kronecker_product_the_start_is_the_svd_of_the_whitened_weight():
    weight, second = matrix(), kron([uneven(n, seed=n) for n in IN])
    cores = start(weight, (1, 6, 1), (6, 4), (6, 4))
    _, errors = sweep_train(cores, weight, Metric(second), sweeps=20)
    root = kron([torch.linalg.cholesky(uneven(n, seed=n)) for n in IN])
    values = torch.linalg.svdvals(interleave(weight @ root, (6, 4), (6, 4)))  # two cores: one bond, Eckart & Young
    assert errors[-1] == pytest.approx(float(values[6:].square().sum()), rel=1e-4)


def test_full_ranks_are_exact_in_every_metric():
    weight = matrix()
    cores = start(weight, None)
    found, _ = sweep_train(cores, weight, Metric(uneven(24)))
    assert torch.allclose(dense(found), weight)


def test_two_sites_follow_the_spectrum():
    low = matrix(24, 3) @ matrix(3, 24, seed=2)
    cores = start(low, (1, 9, 8, 1))
    found, _ = sweep_train(cores, low, Metric(uneven(24)), ranks=(1, 9, 8, 1), sites=2, tolerance=0.3, sweeps=2)
    assert [core.shape[0] for core in found] != [core.shape[0] for core in cores]
    assert all(a.shape[-1] == b.shape[0] for a, b in pairwise(found))
    assert Metric(uneven(24)).error(low - dense(found), low) < 0.6


@pytest.mark.parametrize("metric", [Metric(uneven(24)), Metric(uneven(24), outputs=uneven(22, 5))], ids=["inputs", "both sides"])
def test_rows_of_padding_do_not_count(metric):
    weight = matrix(22)
    form = MPO(out_modes=OUT, in_modes=IN, ranks=(1, 5, 6, 1), pad_rows=True).resolve((22, 24))
    plain = form.decompose(weight)[0]
    factors, how = fit_weighted(form, plain, weight, metric)
    before, after = (metric.error(weight - form.to_dense(f, (22, 24)), weight) for f in (plain, factors))
    assert how == "sweeps"
    assert after < 0.8 * before
    sizes = [float(factor.square().mean().sqrt()) for factor in factors.values()]
    assert max(sizes) == pytest.approx(min(sizes))  # one learning rate suits them all


@pytest.mark.parametrize("rank", [2, 5, 24])
def test_low_rank_of_inputs_and_gradients_reaches_the_bound_of_both_whitenings(rank):
    weight, metric = matrix(), Metric(uneven(24), outputs=uneven(24, 5))
    form = LowRank(rank=rank).resolve((24, 24))
    factors, how = fit_weighted(form, form.decompose(weight)[0], weight, metric)
    seen = torch.linalg.cholesky(metric.outputs).T @ weight @ torch.linalg.cholesky(metric.second)
    values = torch.linalg.svdvals(seen)
    bound = (values[rank:].square().sum() / values.square().sum()).sqrt()
    assert how == "closed form"
    assert metric.error(weight - factors["left"] @ factors["right"], weight) == pytest.approx(float(bound), abs=1e-6)


BANDS = {
    "inputs": Metric(uneven(24)),
    "both sides": Metric(uneven(24), outputs=uneven(24, 5)),
    "fewer inputs than axes": Metric(matrix(24, 15, 9) @ matrix(24, 15, 9).T),
}


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("bands", [2, 3])
def test_bands_never_go_uphill_and_settle_below_bands_fitted_alone(name, bands):
    weight, metric, form = matrix(), BANDS[name], BlockLowRank(bands=bands, rank=3).resolve((24, 24))
    plain = form.decompose(weight)[0]
    errors = [metric.error(weight - form.to_dense(plain, (24, 24)), weight)]
    for sweeps in (*range(8), 200, 201):  # with none: the bands fitted alone, if that is better
        factors, how = fit_weighted(form, plain, weight, metric, steps=sweeps)
        errors.append(metric.error(weight - form.to_dense(factors, (24, 24)), weight))
    assert how == "alternating"
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[1]
    assert errors[-1] < 0.95 * errors[1]
    assert errors[-1] == errors[-2]  # settled


def test_the_last_band_of_a_sweep_is_the_whitened_svd_of_what_the_others_leave_it():
    weight, metric, form = matrix(), Metric(uneven(24), outputs=uneven(24, 5)), BlockLowRank(rank=3).resolve((24, 24))
    factors, _ = fit_weighted(form, form.decompose(weight)[0], weight, metric, steps=1)
    reached = metric.square(weight - form.to_dense(factors, (24, 24)))
    over = torch.linalg.cholesky(metric.outputs).T
    root = torch.linalg.cholesky(metric.second.flip(0, 1)).flip(0, 1)  # upper triangular: the last band stays out of the first one's columns
    gap = weight.clone()
    gap[:, :12] -= factors["left"][:, :3] @ factors["right"][0]
    first, last = (over @ gap @ root).split(12, 1)
    bound = first.square().sum() + torch.linalg.svdvals(last)[3:].square().sum()
    assert reached == pytest.approx(float(bound), rel=1e-9)


@pytest.mark.parametrize("metric", [Metric(uneven(24)), Metric(uneven(24), outputs=uneven(24, 5)), Metric(rows=torch.linspace(0.1, 1, 24))])
def test_one_band_is_low_rank(metric):
    weight, form = matrix(), BlockLowRank(bands=1, rank=5).resolve((24, 24))
    factors, how = fit_weighted(form, form.decompose(weight)[0], weight, metric)
    best, _ = fit_weighted(LowRank(rank=5), {}, weight, metric)
    assert how == "closed form"
    assert torch.allclose(form.to_dense(factors, (24, 24)), best["left"] @ best["right"])


@pytest.mark.parametrize("metric", [Metric(rows=torch.linspace(0.1, 1, 24)), Metric(outputs=uneven(24))], ids=["look-ups", "outputs"])
def test_bands_that_do_not_meet_in_the_metric_have_a_closed_form(metric):
    weight, form = matrix(), BlockLowRank(bands=4, rank=3).resolve((24, 24))
    factors, how = fit_weighted(form, form.decompose(weight)[0], weight, metric)
    alone = [fit_weighted(LowRank(rank=3), {}, band, metric)[0] for band in weight.chunk(4, 1)]
    assert how == "closed form"
    assert torch.allclose(form.to_dense(factors, (24, 24)), torch.cat([one["left"] @ one["right"] for one in alone], 1))


def test_a_tensor_train_whose_outer_ranks_are_whole_is_the_whitened_svd():
    weight, metric = matrix(), Metric(uneven(24))
    form = TensorTrain(in_modes=(4, 6), out_modes=(6, 4), ranks=(1, 4, 4, 4, 1)).resolve((24, 24))
    factors, _ = fit_weighted(form, form.decompose(weight)[0], weight, metric)
    best = fit_weighted(LowRank(rank=4), {}, weight, metric)[0]
    wished = metric.square(weight - best["left"] @ best["right"])
    assert metric.square(weight - form.to_dense(factors, (24, 24))) == pytest.approx(wished, rel=1e-6)


def test_a_kronecker_fit_starts_where_its_modes_are_white():
    second = torch.kron(uneven(12, 3), uneven(2, 4))
    weight, form = matrix(), Kronecker(right=(2, 2), terms=1).resolve((24, 24))
    roots = mode_roots(second, (12, 2))
    whitened = through(weight, roots)
    bound = nearest_kronecker(whitened, (12, 12), (2, 2), 1).error  # exact: the metric is a Kronecker product itself
    factors, how = fit_weighted(form, form.decompose(weight)[0], weight, Metric(second), steps=1)
    error = Metric(second).error(weight - form.to_dense(factors, (24, 24)), weight)
    assert how == "alternating"
    assert error == pytest.approx(float(bound), rel=1e-4)


@given(limit=st.integers(60, 900), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_spread_ranks_keep_the_budget_and_are_possible(limit, seed):
    weight = matrix(seed=seed)
    ranks = spread_ranks(weight, Metric(uneven(24)), OUT, IN, limit)
    form = MPO(out_modes=OUT, in_modes=IN, ranks=ranks).resolve((24, 24))
    assert form.ranks == ranks
    assert form.num_params((24, 24)) <= limit or ranks == (1, 1, 1, 1)
    more = [(*ranks[:k], ranks[k] + 1, *ranks[k + 1 :]) for k in (1, 2)]
    grown = [MPO(out_modes=OUT, in_modes=IN, ranks=r).resolve((24, 24)) for r in more]
    assert all(form.ranks != r or form.num_params((24, 24)) > limit for form, r in zip(grown, more))


def test_metric_units():
    weight = matrix()
    for metric in (
        Metric(uneven(24)),
        Metric(rows=torch.rand(24).double()),
        Metric(outputs=uneven(24)),
        Metric(uneven(24), outputs=uneven(24, 3)),
    ):
        assert metric.relative_to(weight).square(weight) == pytest.approx(1.0)
    both = Metric(uneven(24), torch.rand(24).double())
    assert both.relative_to(weight).square(weight) == pytest.approx(2.0)
