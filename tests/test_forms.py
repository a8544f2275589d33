"""Every form: exact at full rank, sizes as predicted, errors as reported, every plan of contraction equal to the dense product."""

import itertools
import math

import pytest
import torch
from conftest import SHAPE
from hypothesis import given, settings
from hypothesis import strategies as st

from tnlib.block_low_rank import BlockLowRank
from tnlib.choose import bucket
from tnlib.kronecker import Kronecker
from tnlib.low_rank import LowRank, low_rank
from tnlib.shapes import ShapeError
from tnlib.tensor_ring import TensorRing, downhill
from tnlib.tensor_train import TensorTrain
from tnlib.tt_matrix import MPO, TTMatrix

EXACT = [
    LowRank(rank=10**6),
    BlockLowRank(rank=10**6),
    BlockLowRank(bands=4, rank=10**6),
    Kronecker(right=(2, 3), terms=10**6),
    Kronecker(left=(4, 6), terms=10**6, scaled=True),
    TensorTrain(order=2),
    TensorTrain(order=3, max_rank=10**6),
    TTMatrix(order=2),
    MPO(order=3, max_rank=10**6),
    TTMatrix(out_modes=(5, 5), in_modes=(6, 6), pad_rows=True),
    TensorRing(order=3, rank=10**6),
    TensorRing(out_modes=(2, 12), in_modes=(18, 2), rank=24),
]


@pytest.mark.parametrize("loose", EXACT, ids=str)
def test_exact_at_full_rank_in_float64(loose, weight):
    form = loose.resolve(SHAPE)
    factors, error = form.decompose(weight)
    assert torch.allclose(form.to_dense(factors, SHAPE), weight, atol=1e-10)
    assert error < 1e-10


def test_predicted_size_equals_the_factors(form, weight):
    factors, _ = form.decompose(weight)
    orders = {name: factors.pop(name) for name in form.index_shapes(SHAPE)}
    assert {name: tuple(f.shape) for name, f in factors.items()} == form.factor_shapes(SHAPE)
    assert sum(f.numel() for f in factors.values()) == form.num_params(SHAPE)
    assert {name: tuple(o.shape) for name, o in orders.items()} == form.index_shapes(SHAPE)
    assert form.share(SHAPE) == form.num_params(SHAPE) / math.prod(SHAPE)


def test_reported_error_equals_the_measured_one(form, weight):
    factors, error = form.decompose(weight)
    measured = (weight - form.to_dense(factors, SHAPE)).norm() / weight.norm()
    assert torch.allclose(error, measured, atol=1e-7)  # sqrt of a difference of squares: half the digits of float64


@pytest.mark.parametrize("tokens", [1, 7])
def test_every_plan_equals_the_dense_product(form, weight, tokens):
    factors, _ = form.decompose(weight)
    x = torch.randn(tokens, SHAPE[1], dtype=torch.float64)
    for plan in form.plans(SHAPE, tokens):
        if plan.name != "rebuild":
            y = form.contract(x, factors, SHAPE, plan.name)
            assert torch.allclose(y, x @ form.to_dense(factors, SHAPE).T, atol=1e-10), plan.name
    assert torch.allclose(form.forward(x, factors, SHAPE), x @ form.to_dense(factors, SHAPE).T, atol=1e-10)


def test_rows_equal_the_dense_rows(form, weight):
    factors, _ = form.decompose(weight)
    ids = torch.tensor([0, 23, 5, 5, 11])
    for plan in form.row_plans(SHAPE, 5):
        assert torch.allclose(form.rows(ids, factors, SHAPE, plan.name), form.to_dense(factors, SHAPE)[ids], atol=1e-10)


def test_a_batch_of_weights_equals_one_by_one(form):
    stack = torch.randn(3, *SHAPE, dtype=torch.float64)
    factors, error = form.decompose(stack)
    alone, alone_error = form.decompose(stack[1])
    assert error.shape == (3,)
    assert torch.allclose(error[1], alone_error)
    assert torch.allclose(form.to_dense(factors, SHAPE)[1], form.to_dense(alone, SHAPE), atol=1e-10)


def test_random_factors_have_the_variance_asked_for(form):
    generator = torch.Generator().manual_seed(1)
    drawn = [form.to_dense(form.random(SHAPE, 0.3, generator), SHAPE) for _ in range(200)]
    spread = torch.stack(drawn).square().mean().sqrt()
    if getattr(form, "pad_rows", False) or "scale" not in form.factor_shapes(SHAPE):
        assert abs(spread / 0.3 - 1) < 0.25  # products of Gaussians: heavy tails, 200 draws


def test_resolving_twice_changes_nothing(form):
    assert form.resolve(SHAPE) == form


def test_one_band_is_low_rank_and_bands_are_low_rank_each(weight):
    whole, one = LowRank(rank=5).resolve(SHAPE), BlockLowRank(bands=1, rank=5).resolve(SHAPE)
    (factors, error), (same, also) = whole.decompose(weight), one.decompose(weight)
    assert torch.allclose(one.to_dense(same, SHAPE), whole.to_dense(factors, SHAPE))
    assert also == pytest.approx(float(error))
    assert one.num_params(SHAPE) == whole.num_params(SHAPE)
    assert BlockLowRank(bands=1, kept=0.5).resolve(SHAPE).rank == LowRank(kept=0.5).resolve(SHAPE).rank
    three = BlockLowRank(bands=3, rank=2).resolve(SHAPE)
    alone = [low_rank(band, 2) for band in weight.chunk(3, 1)]
    assert torch.allclose(three.to_dense(three.decompose(weight)[0], SHAPE), torch.cat([a.left @ a.right for a in alone], 1))


def test_a_ring_of_two_sites_is_a_kronecker_sum_of_rank_squared_terms():
    form = TensorRing(out_modes=(6, 4), in_modes=(9, 4), rank=3).resolve(SHAPE)
    ring = form.random(SHAPE, dtype=torch.float64)
    left, right = ring["core0"], ring["core1"]  # (r, o_1, i_1, s), (s, o_2, i_2, r)
    terms = [torch.kron(left[a, :, :, b], right[b, :, :, a]) for a in range(3) for b in range(3)]
    assert torch.allclose(form.to_dense(ring, SHAPE), sum(terms))
    assert form.num_params(SHAPE) == Kronecker(right=(4, 4), terms=9).num_params(SHAPE)


def test_a_ring_is_the_trace_of_a_product_of_matrices():
    form = TensorRing(order=3, rank=3).resolve(SHAPE)
    ring = form.random(SHAPE, dtype=torch.float64)
    dense = form.to_dense(ring, SHAPE).reshape(*form.out_modes, *form.in_modes)
    for o, i in (((0, 0, 0), (0, 0, 0)), ((1, 0, 2), (2, 1, 0)), ((1, 2, 3), (2, 2, 3))):
        product = torch.linalg.multi_dot([ring[f"core{k}"][:, o[k], i[k], :] for k in range(3)])
        assert torch.allclose(dense[(*o, *i)], product.trace())


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_a_ring_is_at_least_as_near_as_the_open_chain_of_its_bond(rank, weight):
    ring, opened = (f.resolve(SHAPE) for f in (TensorRing(order=3, rank=rank), MPO(order=3, max_rank=rank)))
    assert float(ring.decompose(weight)[1]) <= float(opened.decompose(weight)[1]) + 1e-12


def test_at_equal_numbers_a_ring_of_three_is_nearer_to_noise_than_all_others():
    """It finds nothing in noise; its numbers reach further."""
    noise = torch.randn(96, 96, dtype=torch.float64)
    others = [LowRank(kept=0.5), BlockLowRank(kept=0.5), MPO(order=3, kept=0.5), TensorTrain(order=2, kept=0.5), Kronecker(right=(8, 8), kept=0.5)]
    ring, *errors = (float(f.resolve(noise.shape).decompose(noise)[1]) for f in (TensorRing(order=3, kept=0.5), *others))
    assert ring < 0.9 * min(errors)


def test_training_a_ring_holds_no_more_than_its_weight():
    form = TensorRing(order=3, rank=8).resolve((64, 64))
    ring = {name: core.requires_grad_() for name, core in form.random((64, 64)).items()}
    x, held = torch.randn(5, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        y = form.forward(x, ring, (64, 64))
    assert max(t.numel() for t in held) <= 64 * 64  # not the (16 * 16, 64) of two merged cores
    gradients = torch.autograd.grad(y.square().sum(), ring.values())
    plain = torch.autograd.grad((x @ form.to_dense(ring, (64, 64)).T).square().sum(), ring.values())
    for one, other in zip(gradients, plain):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_going_downhill_does_not_go_up_and_leaves_cores_of_one_size(weight):
    form = TensorRing(order=3, rank=3).resolve(SHAPE)
    start = form.random(SHAPE, dtype=torch.float64)
    found = downhill(form, start, weight, lambda difference: difference, 20)
    before, after = ((weight - form.to_dense(ring, SHAPE)).norm() for ring in (start, found))
    assert after < 0.95 * before
    sizes = [float(core.square().mean().sqrt()) for core in found.values()]
    assert max(sizes) == pytest.approx(min(sizes))


def test_kept_is_a_budget_that_is_filled():
    for loose in (
        LowRank(kept=0.5),
        BlockLowRank(kept=0.5),
        TensorTrain(order=2, kept=0.5),
        MPO(order=2, kept=0.5),
        Kronecker(right=(2, 2), kept=0.5),
        TensorRing(order=3, kept=0.5),
    ):
        shape = (96, 64)
        form = loose.resolve(shape)
        assert form.share(shape) <= 0.5
        assert form.share(shape) > 0.24, form  # one more term or rank would not fit


@pytest.mark.parametrize("make", [lambda r: LowRank(rank=r), lambda r: BlockLowRank(rank=r), lambda r: MPO(order=3, max_rank=r), lambda r: TensorTrain(order=2, max_rank=r),
                                  lambda r: Kronecker(right=(2, 3), terms=r)])  # fmt: skip
def test_error_does_not_grow_with_rank(make, weight):
    errors = [float(make(r).resolve(SHAPE).decompose(weight)[1]) for r in range(1, 12)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))


BAD = [
    (lambda: LowRank(rank=0), "rank=0; needed positive integers"),
    (lambda: LowRank(), "needed one of the two"),
    (lambda: LowRank(kept=0.5, rank=3), "needed one of the two"),
    (lambda: LowRank(kept=1.5), "kept=1.5; needed a share above 0"),
    (lambda: LowRank(kept=0.001).resolve(SHAPE), "leaves rank 0; raise kept"),
    (lambda: BlockLowRank(rank=0), "BlockLowRank: got rank=0; needed positive integers"),
    (lambda: BlockLowRank(bands=0, rank=2), "bands=0; needed positive integers"),
    (lambda: BlockLowRank(bands=2), "needed one of the two"),
    (lambda: BlockLowRank(bands=5, rank=2).resolve(SHAPE), r"5 do not divide weight \(24, 36\).*from \[1, 2, 3, 4, 6, 9, 12, 18, 36\]"),
    (lambda: BlockLowRank(bands=2, kept=0.01).resolve(SHAPE), "rank 0 for each of 2 bands; raise kept, or choose fewer"),
    (lambda: BlockLowRank(rank=2).resolve(SHAPE).decompose(torch.randn(SHAPE), "als"), "this format knows svd"),
    (lambda: Kronecker(), "neither left nor right"),
    (lambda: Kronecker(right=(3, 2)).resolve((256, 64)), r"right factor \(3, 2\) does not divide weight \(256, 64\)"),
    (lambda: Kronecker(right=(2, 2), left=(3, 3)).resolve(SHAPE), "Give only one of them"),
    (lambda: Kronecker(right=(2, 2), terms=0), "needed positive integers"),
    (lambda: Kronecker(right=(2, 1), kept=0.1).resolve(SHAPE), "Raise kept"),
    (lambda: Kronecker(right=(2, 2), terms=2).resolve(SHAPE).decompose(torch.randn(SHAPE), "prune"), "needed terms=1"),
    (lambda: TTMatrix(max_rank=3), "needed both, or order=3"),
    (lambda: TTMatrix(order=3, max_rank=0), "needed positive integers"),
    (lambda: TTMatrix(order=3, max_rank=4, kept=0.5), "Give one"),
    (lambda: TTMatrix(order=3, ranks=(24, 48, 24)).resolve((768, 768)), "needed 4 ranks with 1 at both ends"),
    (lambda: TTMatrix(out_modes=(5, 5), in_modes=(6, 6)).resolve(SHAPE), "multiply to 25; needed 24"),
    (lambda: TTMatrix(out_modes=(24,), in_modes=(6, 6)).resolve(SHAPE), "needed equally many"),
    (lambda: MPO(order=3, max_rank=2).resolve((31, 8)), "size 31 has no 3 modes"),
    (lambda: MPO(order=2, kept=0.01).resolve(SHAPE), "even rank 1 needs more"),
    (lambda: TensorRing(order=3), "needed one of the two. Give rank=32 or kept=0.5"),
    (lambda: TensorRing(rank=3), "needed both, or order=3"),
    (lambda: TensorRing(order=3, rank=0), "TensorRing: got .*rank=0; needed positive integers"),
    (lambda: TensorRing(order=1, rank=3).resolve(SHAPE), "needed at least two of each side"),
    (lambda: TensorRing(order=3, kept=0.01).resolve(SHAPE), "leaves rank 0 for sites of .*; raise kept"),
    (lambda: TensorRing(out_modes=(5, 5), in_modes=(6, 6), rank=2).resolve(SHAPE), "multiply to 25; needed 24"),
    (lambda: TensorRing(order=3, rank=2).resolve(SHAPE).decompose(torch.randn(SHAPE), "als"), "this format knows svd"),
    (lambda: LowRank(rank=2).resolve(SHAPE).decompose(torch.randn(SHAPE), "prune"), "this format knows svd"),
    (lambda: LowRank(rank=2).resolve(SHAPE).decompose(torch.full(SHAPE, float("nan"))), "NaN or infinite"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_bad_forms_say_what_to_do(call, words):
    with pytest.raises(ShapeError, match=words):
        call()


def test_ranks_beyond_the_possible_become_the_actual_ones():
    assert LowRank(rank=999).resolve(SHAPE).rank == 24
    assert [BlockLowRank(bands=b, rank=999).resolve(SHAPE).rank for b in (1, 2)] == [24, 18]
    assert Kronecker(right=(2, 3), terms=999).resolve(SHAPE).terms == 6
    assert TTMatrix(order=3, max_rank=999).resolve((24, 36)).ranks == (1, 6, 16, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([LowRank(kept=0.7), BlockLowRank(kept=0.8), MPO(order=2, kept=0.7), TensorTrain(order=2, kept=0.9), Kronecker(right=(2, 2), kept=0.7), TensorRing(order=2, kept=0.7)]),
    st.sampled_from([8, 12, 18, 20, 36]), st.sampled_from([8, 12, 30, 32]),
)  # fmt: skip
def test_any_form_on_any_shape_keeps_its_promises(loose, out, width):
    shape, weight = (out, width), torch.randn(out, width, dtype=torch.float64)
    form = loose.resolve(shape)
    factors, error = form.decompose(weight)
    dense = form.to_dense(factors, shape)
    assert form.num_params(shape) <= loose.kept * out * width
    assert abs(float(error) - float((weight - dense).norm() / weight.norm())) < 1e-7
    x = torch.randn(3, width, dtype=torch.float64)
    assert torch.allclose(form.forward(x, factors, shape), x @ dense.T, atol=1e-9)


def test_bucket_rounds_up_to_powers_of_two():
    assert [bucket(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
