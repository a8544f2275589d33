"""Plans and how they are carried out: the same outputs and gradients by every one, costs as predicted, choices that stay."""

import copy
import dataclasses
import itertools
import json
import math

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from conftest import FORMS, SHAPE
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.flop_counter import FlopCounterMode

import tnlib as tn
from tnlib import chain, choose, kept, links, machine
from tnlib.block_low_rank import BlockLowRank
from tnlib.choose import Case
from tnlib.contract import Copy, Move, Product, merge, partitions
from tnlib.factorized import materialize_
from tnlib.kronecker import Kronecker
from tnlib.layers import FactorizedEmbedding, FactorizedLinear
from tnlib.low_rank import LowRank
from tnlib.one_token import steps_for_one
from tnlib.shapes import ShapeError
from tnlib.tensor_ring import TensorRing
from tnlib.tt_matrix import MPO, TTMatrix

OUT, IN = SHAPE


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A machine that remembers nothing yet."""
    monkeypatch.setenv("TNLIB_CACHE", str(tmp_path))
    for cached in (machine._memory, machine._machine):
        cached.cache_clear()
    monkeypatch.setattr(choose, "_chosen", {})
    yield tmp_path / "machines"
    for cached in (machine._memory, machine._machine):
        cached.cache_clear()


@pytest.fixture
def small_groups(monkeypatch):
    """Tokens go through in several groups."""
    monkeypatch.setattr(chain, "GROUP", 4096)
    monkeypatch.setattr(chain, "LARGE_GROUP", 4096)


# ---- every plan computes the same


@pytest.mark.parametrize("groups", ["torch's own", "one group", "several groups"])
def test_outputs_and_gradients_of_every_plan_are_those_of_the_dense_weight(form, groups, request, monkeypatch):
    if groups == "several groups":
        request.getfixturevalue("small_groups")
    monkeypatch.setattr(chain, "TINY", 10**9 if groups == "torch's own" else 0)
    x = torch.randn(37, IN, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUT, dtype=torch.float64, requires_grad=True)
    factors = form.random(SHAPE, 0.2, dtype=torch.float64)
    leaves = [x, bias, *(f.requires_grad_() for f in factors.values() if f.is_floating_point())]
    y = nn.functional.linear(x, form.to_dense(factors, SHAPE), bias)
    wanted = torch.autograd.grad(y.square().sum(), leaves)
    for plan in form.plans(SHAPE, 37):
        found = form.contract(x, factors, SHAPE, plan.name, bias=bias)
        assert torch.allclose(found, y, atol=1e-10), plan.name
        for a, b in zip(torch.autograd.grad(found.square().sum(), leaves), wanted):
            assert torch.allclose(a, b, atol=1e-8), plan.name


def test_what_is_prepared_for_one_token_gives_what_the_chain_gives(form):
    x, factors = torch.randn(1, IN, dtype=torch.float64), form.random(SHAPE, 0.2, dtype=torch.float64)
    for plan in form.plans(SHAPE, 1):
        found = form.chain(factors, SHAPE, plan)
        bias = torch.randn(found.sizes[-1], dtype=torch.float64)  # rows of padding are in it
        assert torch.equal(found.prepared(1)(x, bias), chain.run(x, found, bias)), plan.name


@pytest.mark.parametrize("right", [(2, 1), (4, 1), (1, 3)])
def test_tiny_factors_and_many_rows_take_another_way_to_the_same(right):
    layer = FactorizedLinear(Kronecker(right=right), SHAPE).double()
    x = torch.randn(links.MANY // 6 + 5, IN, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    wanted = torch.autograd.grad(nn.functional.linear(x, layer.weight, layer.bias).square().sum(), leaves)
    for a, b in zip(torch.autograd.grad(layer(x).square().sum(), leaves), wanted):
        assert torch.allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize("turned_in", [False, True])
@pytest.mark.parametrize("turned_out", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "width", "count", "beside"),
    [(96, 80, 8, 9, True), (96, 80, 12, 9, False), (9, 7, 5, 1, True), (5, 6, 2, 3, False)],
)
def test_blocks_side_by_side_or_one_by_one_give_the_same(turned_in, turned_out, m, k, width, count, beside):
    assert links.side_by_side(m, k, width, count) == beside
    matrix, blocks = torch.randn(m, k, dtype=torch.float64), torch.randn(count, k, width, dtype=torch.float64)
    link = links.Link(matrix, width, turned_in, turned_out)
    state = blocks.mT.contiguous() if turned_in else blocks
    wanted = matrix @ blocks  # (count, m, width)
    grad = torch.randn_like(wanted)
    for plain in (False, True):
        y = links.apply_link(link, state, plain=plain).view(count, -1)
        assert torch.allclose(y, (wanted.mT if turned_out else wanted).reshape(count, -1))
    place = torch.empty(count, m * width, dtype=torch.float64)
    links.apply_link(link, state, place)
    assert torch.allclose(place.view(count, -1), (wanted.mT if turned_out else wanted).reshape(count, -1))
    (step,) = steps_for_one([link], [state.numel()])  # as if all blocks were one token's
    assert torch.equal(step(state).reshape(count, -1), links.apply_link(link, state).view(count, -1))
    found = links.matrix_grad(link, (grad.mT if turned_out else grad).contiguous(), state, None)
    assert torch.allclose(found, (grad @ blocks.mT).sum(0))


@pytest.mark.parametrize("columns", [1, 2, links.THIN, links.THIN + 1])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_single_block_of_few_columns_gives_the_product_and_torchs_gradients(columns, turned, grad):
    m, k = 160, 256  # above LARGE
    matrix = torch.randn(k, m, dtype=torch.float64).t() if turned else torch.randn(m, k, dtype=torch.float64)
    matrix, block = matrix.requires_grad_(grad), torch.randn(k, columns, dtype=torch.float64, requires_grad=grad)
    y = links.apply_link(links.Link(matrix, columns), block, plain=grad)
    assert y.is_contiguous()
    assert torch.allclose(y.view(m, columns), matrix @ block)
    if grad:
        found = torch.autograd.grad(y.square().sum(), [matrix, block])
        wanted = torch.autograd.grad((matrix @ block).square().sum(), [matrix, block])
        assert all(torch.allclose(a, b) for a, b in zip(found, wanted))


def test_blocks_side_by_side_are_priced_as_one_product_and_the_copies_around_it():
    move = Move(0, (0, 1, 2, 3), 8)
    assert move.steps((96, 80), 80 * 8 * 9) == ([Product(96, 80, 72), Copy(80 * 72, 8), Copy(96 * 72, 8)], 96 * 72)
    assert move.steps((96, 80), 80 * 8) == ([Product(96, 80, 8)], 96 * 8)
    assert move._replace(turned_in=True).steps((96, 80), 80 * 72)[0] == [Product(96, 80, 72), Copy(96 * 72, 8)]
    assert move.steps((6, 5), 5 * 72) == ([Product(6, 5, 8, 9)], 6 * 72)


@pytest.mark.parametrize(("width", "batched"), [(20, False), (64, True)])
def test_torchs_own_backward_pass_makes_no_gradient_of_a_large_matrix_for_every_block(width, batched):
    matrix = torch.randn(96, 80, requires_grad=True)
    y = links.apply_link(links.Link(matrix, width), torch.randn(9, 80, width), plain=True)
    found, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        found.add(node.name())
        nodes += [other for other, _ in node.next_functions if other is not None]
    assert ("BmmBackward0" in found) == batched


def test_frozen_factors_get_no_gradient_and_the_input_does(form, small_groups):
    layer = FactorizedLinear(form, SHAPE, bias=False).double()
    first = next(iter(layer.factors.values()))
    first.requires_grad_(False)
    x = torch.randn(40, IN, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    assert first.grad is None
    assert all(f.grad is not None for f in layer.factors.values() if f.requires_grad)
    assert torch.allclose(x.grad, 2 * x.detach() @ layer.weight.detach().T @ layer.weight.detach(), atol=1e-8)


def test_half_precision_gradients_of_many_groups_are_summed_in_float32(small_groups):
    layer = FactorizedLinear(Kronecker(right=(2, 3), terms=2), SHAPE, bias=False)
    x = torch.randn(2000, IN)
    layer(x).sum().backward()
    exact = layer.left.grad.clone()
    half = copy.deepcopy(layer).bfloat16()
    half.zero_grad()
    half(x.bfloat16()).sum().backward()
    assert (half.left.grad.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("form", [f for f in FORMS if not isinstance(f, LowRank)], ids=str)
@pytest.mark.parametrize("tokens", [11, 31, 307])
def test_training_keeps_what_is_no_larger_than_the_input_or_than_what_the_factors_save(form, tokens, monkeypatch):
    monkeypatch.setattr(chain, "TINY", 0)
    form = form.resolve(SHAPE)
    factors = {n: f.requires_grad_(f.is_floating_point()) for n, f in form.random(SHAPE).items()}

    def has_tokens(tensor):  # their number is prime to all modes and ranks
        return any(size % tokens == 0 for size in tensor.shape)

    for plan in form.plans(SHAPE, tokens):
        x, saved = torch.randn(tokens, IN, requires_grad=True), {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place in memory
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            form.contract(x, factors, SHAPE, plan.name)
        sizes = [tensor.untyped_storage().nbytes() // 4 for tensor in saved.values() if has_tokens(tensor)]
        larger = sum(size for size in sizes if size > tokens * IN)
        assert larger <= max(0, math.prod(SHAPE) - form.num_params(SHAPE)), plan.name


def test_merging_neighbors_one_by_one_or_all_at_once_is_the_same():
    cores = [torch.randn(3, *size, dtype=torch.float64) for size in ((1, 2, 3, 4), (4, 3, 2, 5), (5, 2, 2, 1))]
    whole = merge(cores)
    assert whole.shape == (3, 1, 12, 12, 1)
    assert torch.allclose(merge([merge(cores[:2]), cores[2]]), whole)
    assert torch.allclose(whole[0, 0, :, :, 0], TTMatrix((2, 3, 2), (3, 2, 2)).to_dense({f"core{k}": c[0] for k, c in enumerate(cores)}, (12, 12)))  # fmt: skip


def test_partitions_are_all_ways_to_cut_but_the_one_without_a_cut():
    assert [len(partitions(count)) for count in (1, 2, 3, 4)] == [0, 1, 3, 7]
    assert partitions(3)[0] == ((0, 1), (1, 2), (2, 3))


def test_what_stands_between_sees_the_input_and_every_intermediate_result(form):
    seen, x = {}, torch.randn(5, IN)
    factors = form.random(SHAPE)
    y = form.forward(x, factors, SHAPE, between=lambda state, place: seen.setdefault(place, state))
    assert set(seen) == {"input", *form.places(SHAPE)}
    assert torch.allclose(y, x @ form.to_dense(factors, SHAPE).T, atol=1e-4)


def test_an_unknown_plan_is_refused():
    layer = FactorizedLinear(LowRank(rank=3), SHAPE)
    layer.plan = "left first"
    with pytest.raises(ShapeError, match="got plan 'left first'; needed one of 'factors', 'rebuild'"):
        layer(torch.randn(2, IN))


# ---- what a plan costs


def test_predicted_flops_are_those_that_torch_counts(form, monkeypatch):
    monkeypatch.setattr(links, "FEW", 0)  # all by matrix products, which torch counts
    factors, x = form.random(SHAPE), torch.randn(9, IN)
    for plan in form.plans(SHAPE, 9):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            form.contract(x, factors, SHAPE, plan.name)
        assert counter.get_total_flops() == plan.flops, plan.name


@pytest.mark.parametrize("bands", [1, 2, 4])
def test_bands_multiply_what_low_rank_of_as_many_numbers_does(bands):
    form, (out, width), tokens = BlockLowRank(bands=bands, rank=6).resolve(SHAPE), SHAPE, 9
    assert form.plans(SHAPE, tokens)[0].flops == 2 * tokens * 6 * (width + bands * out) == 2 * tokens * form.num_params(SHAPE)
    assert form.flops(SHAPE, tokens) == 2 * tokens * form.num_params(SHAPE)
    (gather,) = form.row_plans(SHAPE, tokens)
    factors, counter = form.random(SHAPE), FlopCounterMode(display=False)
    with counter, torch.no_grad():
        form.rows(torch.arange(tokens), factors, SHAPE)
    assert counter.get_total_flops() == gather.flops == 2 * tokens * 6 * width


def test_what_a_plan_holds_is_what_its_matrices_take_beside_the_factors(form):
    factors = form.random(SHAPE)
    own = {factor.untyped_storage().data_ptr() for factor in factors.values()}
    for plan in form.plans(SHAPE, 9)[:-1]:
        made = [m for m in form.chain(factors, SHAPE, plan).matrices if m.untyped_storage().data_ptr() not in own]
        assert sum(matrix.numel() for matrix in made) == plan.held, plan.name


def test_matrices_that_are_factors_in_another_shape_are_two_views_at_most(form):
    factors = {name: factor.requires_grad_(factor.is_floating_point()) for name, factor in form.random(SHAPE).items()}
    own = [factor.untyped_storage().data_ptr() for factor in factors.values()]
    for plan in form.plans(SHAPE, 9)[:-1]:
        found = form.chain(factors, SHAPE, plan).matrices
        if all(matrix.untyped_storage().data_ptr() in own for matrix in found):
            for matrix in found:
                node, views = matrix.grad_fn, 0
                while node is not None and node.next_functions:
                    node, views = node.next_functions[0][0], views + 1
                assert views <= 2, (plan.name, matrix.shape)


def test_rates_price_a_large_product_by_arithmetic_and_a_thin_one_by_traffic():
    rates = machine.Machine((1e9,) * 5, (1e9,) * 5, cached=1e8, streamed=1e7, reordered=2e7, call=1e-6)
    plan = LowRank(rank=1000).resolve((2000, 2000)).plans((2000, 2000), 500)[0]
    assert rates.seconds(plan) == pytest.approx(plan.flops / 1e9 + 2e-6)
    assert rates.seconds(plan, built=False) == rates.seconds(plan)
    thin = LowRank(rank=1).resolve((20, 20)).plans((20, 20), 1)[0]
    assert rates.seconds(thin) == pytest.approx(2 * (20 + 20 + 1) / 1e8 + 2e-6)
    copies = dataclasses.replace(thin, run=(Copy(1000),))
    assert rates.seconds(copies) == pytest.approx(1000 / 2e7 + 1e-6)
    copies = dataclasses.replace(thin, run=(Copy(1000, run=2), Copy(1000, run=8)))
    assert rates.seconds(copies) == pytest.approx(1000 / 4e7 + 2000 / 1e8 + 2e-6)


def test_rates_are_measured_once_and_read_again(memory):
    rates = machine.machine("cpu", torch.float32)
    assert min(*rates.products, *rates.batches, rates.cached, rates.streamed, rates.call) > 0
    machine._machine.cache_clear()
    machine._memory.cache_clear()
    assert machine.machine("cpu", torch.float32) == rates
    (path,) = memory.glob("*.json")
    path.write_text(path.read_text().replace("reordered", "rearranged"))  # by a version that had other rates
    machine._machine.cache_clear()
    machine._memory.cache_clear()
    assert machine.machine("cpu", torch.float32).reordered > 0


# ---- choices


def case(tokens=4096, **more):
    form = MPO(order=3, max_rank=64).resolve((3072, 768))
    return Case(form, (3072, 768), tokens, "cpu", torch.float32, **({"grad": False, "room": 0} | more))


def test_without_timing_the_fastest_prediction_is_taken(memory, monkeypatch):
    monkeypatch.setattr(choose, "machine", lambda *about: machine.TYPICAL["cpu"])  # no moment of this machine decides
    assert choose.choose(case()) == case().plans()[0][1]
    assert choose.choose(case()).name == "rebuild"
    thin = LowRank(rank=32).resolve((3072, 768))
    assert choose.choose(Case(thin, (3072, 768), 4096, "cpu", torch.float32, False, 0)).name == "factors"


def test_survivors_are_timed_once_and_the_winner_is_remembered(memory, monkeypatch):
    monkeypatch.setattr(choose, "CLOSE", 1e9)
    slow, ran = case().plans()[2][1], []

    def attempt(plan):
        ran.append(plan.name)
        return lambda: None if plan == slow else torch.randn(200_000).sort()

    assert choose.choose(case(), attempt) == slow
    assert len(ran) == choose.SURVIVORS
    assert choose.choose(case(), attempt) == slow
    monkeypatch.setattr(choose, "_chosen", {})
    machine._memory.cache_clear()  # another process
    assert choose.choose(case(), attempt) == slow
    assert len(ran) == choose.SURVIVORS


def test_training_and_evaluation_take_one_plan_without_gradients_and_another_with_them(memory, monkeypatch):
    monkeypatch.setattr(choose, "WORTH_TIMING", math.inf)
    layer = FactorizedLinear(MPO(order=3, max_rank=4), (48, 36)).requires_grad_(False)
    x = torch.randn(5, 36, requires_grad=True)
    layer.eval()(x)
    assert not layer.kept.again  # what suits a backward pass is not for calls without
    with torch.no_grad():
        assert torch.equal(layer(x), layer.train()(x))
    assert [case.grad for case, _ in choose._chosen] == [True, False]


@pytest.mark.parametrize(("tick", "rounds"), [(1e-6, choose.MOST), (1.0, choose.ROUNDS)])
def test_quick_plans_are_timed_in_more_rounds_than_slow_ones(monkeypatch, tick, rounds):
    clock, ran = itertools.count(0.0, tick), []
    monkeypatch.setattr(choose.time, "perf_counter", lambda: next(clock))
    assert choose.time_in_turns([lambda: ran.append(1)], "cpu") == pytest.approx([tick / (20 if tick < 1e-3 else 1)])
    assert len(ran) == 2 + (rounds - 1) * (20 if tick < 1e-3 else 1)  # once unclocked, once to find how many make a round


def test_who_is_far_behind_after_two_rounds_is_timed_no_more(monkeypatch):
    now, ran = [0.0], []

    def step(name, seconds):
        def run():
            now[0] += seconds
            ran.append(name)

        return run

    monkeypatch.setattr(choose.time, "perf_counter", lambda: now[0])
    found = choose.time_in_turns([step("quick", 1.0), step("slow", 1.5), step("near", 1.3)], "cpu", behind=1.4)
    assert found == pytest.approx([1.0, 1.5, 1.3])
    assert [ran.count(name) for name in ("quick", "slow", "near")] == [1 + choose.ROUNDS, 3, 1 + choose.ROUNDS]


def test_what_won_is_asked_again_of_other_code(monkeypatch):
    monkeypatch.setattr(machine, "_source", lambda: "older")
    before = machine._place("cpu")
    monkeypatch.undo()
    assert machine._place("cpu") != before


def test_what_another_process_remembered_first_counts(memory):
    machine.remember("cpu", "key", "mine")
    (path,) = memory.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"other": "theirs"}))
    assert machine.remember("cpu", "other", "mine") == "theirs"
    assert json.loads(path.read_text())["key"] == "mine"


def test_a_damaged_memory_is_measured_again(memory):
    machine.remember("cpu", "key", "mine")
    (path,) = memory.glob("*.json")
    for damage in ('{"key": ', "[1, 2]"):
        path.write_text(damage)
        machine._memory.cache_clear()
        assert machine.recall("cpu", "key") is None
        assert machine.remember("cpu", "key", "again") == "again"


def test_a_folder_that_cannot_be_written_costs_only_the_memory(memory, monkeypatch):
    blocked = memory.parent / "file"
    blocked.write_text("")
    monkeypatch.setenv("TNLIB_CACHE", str(blocked))
    assert machine.remember("cpu", "key", "mine") == "mine"
    assert machine.recall("cpu", "key") == "mine"


def test_deterministic_algorithms_time_nothing(memory):
    torch.use_deterministic_algorithms(True)
    try:
        assert choose.choose(case(), lambda plan: pytest.fail("timed")) == case().plans()[0][1]
    finally:
        torch.use_deterministic_algorithms(False)


def test_timing_inside_a_checkpointed_block_leaves_no_trace(memory, monkeypatch):
    monkeypatch.setattr(choose, "WORTH_TIMING", 0)
    monkeypatch.setattr(choose, "CLOSE", 1e9)
    layer, x = FactorizedLinear(MPO(order=3, max_rank=6), SHAPE), torch.randn(5, IN, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer(x).sum().backward()
    assert all(torch.equal(grads[name], p.grad) for name, p in layer.named_parameters())


# ---- what is kept


@pytest.fixture
def layer():
    layer = FactorizedLinear(MPO(order=3, max_rank=2), SHAPE).eval()
    materialize_(layer, "auto")
    return layer


def test_evaluation_keeps_what_it_built_and_training_gives_it_back(layer):
    x = torch.randn(5, IN)
    layer.plan = "left to right, 0-1 merged"
    with torch.no_grad():
        y = layer(x)
        assert 0 < layer.kept.numbers <= math.prod(SHAPE) - layer.form.num_params(SHAPE)
        kept = layer.kept.numbers
        assert torch.equal(layer(x), y)
        assert layer.kept.numbers == kept
    layer.train()
    assert layer.kept.numbers == 0


@pytest.mark.parametrize(("policy", "keeps"), [("auto", False), ("always", True), ("never", False)])
def test_only_always_keeps_the_dense_weight(layer, policy, keeps):
    materialize_(layer, policy)
    layer.plan = "rebuild"
    with torch.no_grad():
        layer(torch.randn(5, IN))
    assert (layer.kept.numbers == math.prod(SHAPE)) == keeps


CHANGES = {
    "in place": lambda layer: layer.core1.mul_(2),
    "state dict": lambda layer: layer.load_state_dict({n: p + 1 for n, p in layer.state_dict().items()}),
    "dtype": lambda layer: layer.double(),
    "new tensor": lambda layer: setattr(layer, "core1", nn.Parameter(layer.core1 * 3)),
    "data": lambda layer: setattr(layer.core1, "data", layer.core1.data * 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_follows_the_factors(layer, change):
    materialize_(layer, "always")
    for plan in ("rebuild", "left to right, 0-1 merged", "left to right", None):
        layer.plan = plan
        with torch.no_grad():
            layer(torch.randn(5, IN, dtype=layer.core0.dtype))
            assert bool(layer.kept.again) == (plan is None)
            CHANGES[change](layer)
            x = torch.randn(5, IN, dtype=layer.core0.dtype)
            assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4)


def test_copies_and_checkpoints_hold_no_more_than_the_factors(layer):
    materialize_(layer, "always")
    layer.plan = "rebuild"
    with torch.no_grad():
        layer(torch.randn(5, IN))
    assert copy.deepcopy(layer).kept.numbers == 0
    assert copy.copy(layer.kept).numbers == 0  # by the protocol that pickle takes as well
    assert layer.kept.numbers == math.prod(SHAPE)
    assert set(layer.state_dict()) == {*layer.factors, "bias"}


def test_gradients_flow_in_evaluation_too(layer):
    materialize_(layer, "always")
    with torch.no_grad():
        layer(torch.randn(5, IN))
    layer(torch.randn(5, IN)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_what_is_kept_never_outgrows_the_dense_weight(layer):
    with torch.no_grad():
        for plan in layer.form.plans(SHAPE, 7):
            layer.plan = plan.name
            layer(torch.randn(7, IN))
            assert layer.kept.numbers + layer.form.num_params(SHAPE) <= math.prod(SHAPE)


def test_an_embedding_keeps_its_halves():
    table = FactorizedEmbedding(TTMatrix(order=3, max_rank=3), (4096, 27)).eval()
    materialize_(table, "auto")
    ids = torch.arange(4096)
    with torch.no_grad():
        assert torch.allclose(table(ids), table.weight[ids], atol=1e-6)
        for plan in table.form.row_plans(table.shape, 5):
            table.plan = plan.name
            assert torch.allclose(table(ids[:5]), table.weight[:5], atol=1e-6)
        assert table.kept.numbers > 0
        table.core0.mul_(2)
        assert torch.allclose(table(ids), table.weight[ids], atol=1e-6)


def test_an_unknown_policy_is_refused(layer):
    with pytest.raises(ValueError, match="materialize: got policy 'sometimes'; needed one of auto, never, always"):
        materialize_(layer, "sometimes")


# ---- compiled, autocast, explained


@pytest.mark.parametrize("form", [Kronecker(right=(2, 3), terms=2), Kronecker(right=(2, 1)), MPO(order=3, max_rank=2), BlockLowRank(rank=5), TensorRing(order=3, rank=2)], ids=str)
def test_a_compiled_layer_serves_all_token_counts_with_one_graph(form):
    torch._dynamo.reset()  # its limit of graphs is one for all layers of a process
    layer = FactorizedLinear(form, SHAPE).eval()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (2, 5, 64, 700):
            x = torch.randn(tokens, IN)
            assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_autocast_computes_in_bfloat16_and_trains_float32_factors(form):
    layer, x = FactorizedLinear(form, SHAPE), torch.randn(6, IN)
    for plan in layer.form.plans(SHAPE, 6):
        layer.plan = plan.name
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
        assert torch.allclose(y.float(), x @ layer.weight.T + layer.bias, atol=0.2)


@pytest.mark.parametrize("training", [False, True])
def test_explain_names_every_plan_and_the_one_that_is_taken(training, layer):
    layer.train(training)
    found = layer.explain(33)
    assert {plan.name for plan in found} == {plan.name for plan in layer.form.plans(SHAPE, 33)}
    assert sum(plan.chosen for plan in found) == 1
    assert all(plan.measured_ms is None or plan.measured_ms > 0 for plan in found)
    assert all(plan.name in str(found) for plan in found)
    layer.plan = "rebuild"
    assert next(plan for plan in layer.explain(1) if plan.chosen).name == "rebuild"
    with pytest.raises(ShapeError, match="needed at least 1"):
        layer.explain(0)


def test_a_call_that_repeats_an_earlier_one_follows_the_factors_the_policy_and_autocast(layer):
    x = torch.randn(2, 3, IN)
    with torch.no_grad():
        for _ in range(2):
            y = layer(x)
        assert layer.kept.again
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        layer.core0.mul_(2)
        layer.bias.zero_()
        assert torch.allclose(layer(x), x @ layer.weight.T, atol=1e-5)
        assert not torch.allclose(layer(x), y)
        layer.materialize = "never"
        layer(x)
        assert layer.kept.numbers == 0
    layer.materialize = "auto"
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    assert layer.core0.grad is not None


def test_a_call_that_repeats_an_earlier_one_follows_orders_plans_and_what_comes_between():
    layer, x = FactorizedLinear(Kronecker(right=(2, 1), permute="both"), SHAPE).eval(), torch.randn(3, IN)

    def right():
        return torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)

    with torch.no_grad():
        y = layer(x)
        (again,) = layer.kept.again.values()
        assert again.fits(x, layer._parameters, layer._buffers)
        assert torch.equal(layer(x), y)
        for name, order in layer.orders.items():
            order.copy_(order.flip(0))
            assert not layer.kept.again[x.shape].fits(x, layer._parameters, layer._buffers)
            assert right(), name
        layer.plan = "rebuild"
        assert right()
        layer.plan = None
        assert right()
        layer.between = Nothing()
        assert torch.equal(layer(x), layer.bias.expand(3, -1))


def test_calls_of_several_shapes_are_ready_and_of_no_more_than_some(layer):
    xs = [torch.randn(tokens, IN) for tokens in range(1, kept.SHAPES + 3)]
    with torch.no_grad():
        for x in xs * 2:
            assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
            assert x.shape in layer.kept.again
            assert len(layer.kept.again) <= kept.SHAPES
        layer.core0.mul_(2)
        layer(xs[0])
        assert list(layer.kept.again) == [xs[0].shape]  # the others held what was built before


@pytest.mark.parametrize("name", ["bias", "core1"])
def test_a_call_that_repeats_an_earlier_one_follows_what_is_computed_by_now(layer, name):
    x = torch.randn(3, IN)
    with torch.no_grad():
        layer(x)
        register_parametrization(layer, name, Twice())
        assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, tensor):
        return 2 * tensor


class Nothing(nn.Module):
    """Between two cores: zeros."""

    def forward(self, state, place):
        return torch.zeros_like(state)


def test_whole_models_take_a_policy():
    model = nn.Sequential(FactorizedLinear(LowRank(rank=2), SHAPE), nn.Linear(OUT, 2))
    tn.materialize_(model, "always")
    assert model[0].materialize == "always"


def test_as_layers_start_changes_through_data_count_too(form):
    layer, x = FactorizedLinear(form, SHAPE).double().eval(), torch.randn(3, IN, dtype=torch.float64)
    with torch.no_grad():
        for plan in (None, *(plan.name for plan in layer.form.plans(SHAPE, 3))):
            layer.plan = plan
            for _ in range(2):
                layer(x)
                next(iter(layer.factors.values())).data.mul_(2)
                layer.bias.data.add_(1)
                if "scale" in layer.factors:
                    layer.scale.data.fill_(0.5)
                assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-7)
