"""Permutation search: planted products come back, moves never lose, noise is the yardstick, and orders live in layers and models."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIGS, logits, tiny

from tnlib.arrange import Arrangement, reassign, regroup
from tnlib.assign import assign
from tnlib.cost import size
from tnlib.hidden import hidden_orders, permute_hidden_
from tnlib.kronecker import Kronecker
from tnlib.layers import FactorizedEmbedding, FactorizedLinear
from tnlib.papers import papers, skeleton
from tnlib.permute import noise_like, permutation_gain, permute_kronecker
from tnlib.plan import plan, report
from tnlib.recipe import Recipe, RecipeError, Rule
from tnlib.shapes import ShapeError
from tnlib.surgery import densify_, factorize_
from tnlib.van_loan import nearest_kronecker, rearrange, restore, right_basis

IDS = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(0))
SPLITS = [((4, 6), (6, 4), 1), ((12, 8), (2, 3), 2), ((2, 3), (12, 8), 1), ((24, 12), (1, 2), 1), ((6, 4), (4, 6), 3)]


def planted(left, right, seed=0, noise=0.0, dtype=torch.float64):
    """P (A (x) B) Q with Gaussian factors, plus noise of relative standard deviation `noise`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    weight = torch.kron(draw(*left), draw(*right))
    out, width = weight.shape
    weight = weight[torch.randperm(out, generator=generator)][:, torch.randperm(width, generator=generator)]
    return weight + noise * weight.std() * draw(out, width)


def error_of(weight, found, left, right, terms=1):
    return float(nearest_kronecker(weight[found.rows][:, found.columns], left, right, terms).error)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_product_comes_back_where_the_published_search_fails(seed):
    left = right = (16, 16)
    weight = planted(left, right, seed, dtype=torch.float32)
    assert error_of(weight, permute_kronecker(weight, left, right), left, right) < 1e-3
    assert error_of(weight, permute_kronecker(weight, left, right, search="damped", seed=seed), left, right) > 0.5


@pytest.mark.parametrize(("left", "right"), [((32, 16), (2, 4)), ((2, 4), (32, 16)), ((12, 12), (3, 4)), ((6, 40), (5, 2))])
def test_planted_products_of_other_shapes_come_back(left, right):
    weight = planted(left, right)
    assert error_of(weight, permute_kronecker(weight, left, right), left, right) < 1e-6  # Gram matrix: half the digits


def test_a_planted_product_is_found_under_noise_as_large_as_itself():
    weight = planted((16, 16), (16, 16), noise=1.0)
    assert permute_kronecker(weight, (16, 16), (16, 16)).rho > 0.6  # 0.707 is what the planted order gives


@pytest.mark.parametrize(("left", "right", "terms"), SPLITS, ids=str)
@pytest.mark.parametrize("options", [{}, {"search": "damped"}, {"search": "damped", "starts": "identity"}], ids=str)
def test_orders_are_permutations_and_rho_is_van_loans(left, right, terms, options):
    weight = torch.randn(left[0] * right[0], left[1] * right[1], dtype=torch.float64)
    found = permute_kronecker(weight, left, right, terms, **options)
    for order, length in zip((found.rows, found.columns), weight.shape):
        assert order.sort().values.equal(torch.arange(length))
    error = error_of(weight, found, left, right, terms)
    assert abs(found.rho - (1 - error**2) ** 0.5) < 1e-7
    assert abs(found.before - (1 - float(nearest_kronecker(weight, left, right, terms).error) ** 2) ** 0.5) < 1e-7
    assert found.history[-1] == found.rho
    if not options:
        assert found.rho >= found.before
        assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(found.history))


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("search", ["sorted", "damped"])
def test_the_other_axis_stays(axis, search):
    weight = torch.randn(24, 12, dtype=torch.float64)
    for left, right in (((12, 3), (2, 4)), ((2, 4), (12, 3))):
        found = permute_kronecker(weight, left, right, axes=axis, search=search)
        kept, moved = (found.columns, found.rows) if axis == "rows" else (found.rows, found.columns)
        assert kept.equal(torch.arange(len(kept)))
        assert not moved.equal(torch.arange(len(moved)))


@pytest.mark.parametrize("search", ["sorted", "damped"])
def test_a_tall_tables_columns_need_their_inner_products_only(search):
    weight = planted((300, 12), (1, 2), noise=0.1)
    found = permute_kronecker(weight, (300, 12), (1, 2), axes="columns", search=search)
    assert found.rows.equal(torch.arange(300))
    error = float(nearest_kronecker(weight[:, found.columns], (300, 12), (1, 2)).error)
    assert found.rho == pytest.approx((1 - error**2) ** 0.5, abs=1e-9)
    assert search == "damped" or error < 0.15


def test_with_tiny_factors_the_natural_order_is_a_fixed_point_of_the_published_search():
    weight = torch.randn(48, 96, dtype=torch.float64)
    stuck = permute_kronecker(weight, (24, 48), (2, 2), terms=2, search="damped", starts="identity")
    assert stuck.rows.equal(torch.arange(48))
    assert stuck.columns.equal(torch.arange(96))
    assert permute_kronecker(weight, (24, 48), (2, 2), terms=2).rho > stuck.rho + 0.02


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 10**6))
def test_no_move_lowers_rho(split, seed):
    left, right, terms = split
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(left[0] * right[0], left[1] * right[1], generator=generator, dtype=torch.float64)
    rows, columns = (torch.randperm(n, generator=generator) for n in weight.shape)
    state = Arrangement(weight, left, right, terms, rows, columns)
    state.fit()
    for move, axis in itertools.product((reassign, regroup), ("rows", "columns")):
        before = state.rho
        setattr(state, axis, move([state if axis == "rows" else state.T]))
        state.fit()
        assert state.rho >= before - 1e-10


def test_the_transposed_arrangement_has_the_same_rho_and_basis():
    state = Arrangement(torch.randn(24, 12, dtype=torch.float64), (12, 3), (2, 4), 2, torch.randperm(24), torch.randperm(12))
    product = state.product()
    flipped = state.T
    carried = flipped.basis
    assert torch.allclose(flipped.product(), product.T)
    assert torch.allclose(carried @ carried.T, flipped.basis @ flipped.basis.T)


def test_restore_undoes_rearrange():
    weight = torch.randn(3, 24, 12)
    assert restore(rearrange(weight, (12, 3), (2, 4)), (12, 3), (2, 4)).equal(weight)


def test_a_wide_basis_by_iteration_finds_what_the_gram_finds(monkeypatch):
    weight = planted((16, 16), (16, 16), noise=0.5)
    blocks = rearrange(weight, (16, 16), (16, 16))
    exact = right_basis(blocks, 2)[1]
    monkeypatch.setattr("tnlib.van_loan.GRAM_LIMIT", 4)
    basis, found = right_basis(blocks, 2)
    assert torch.allclose(basis.T @ basis, torch.eye(2, dtype=torch.float64), atol=1e-10)
    assert exact * (1 - 1e-3) < found <= exact * (1 + 1e-12)  # stops when an iteration adds less than 1e-4 of it
    assert right_basis(blocks, 2, basis)[1] >= found * (1 - 1e-12)


def test_assignment_is_exact_and_blocks_never_lose(monkeypatch):
    scores = torch.randn(6, 6)
    best = max(itertools.permutations(range(6)), key=lambda p: sum(scores[i, x] for i, x in enumerate(p)))
    assert assign(scores).tolist() == list(best)
    monkeypatch.setattr("tnlib.assign.BLOCK", 70)
    scores, current, places = torch.randn(300, 300, dtype=torch.float64), torch.randperm(300), torch.arange(300)
    total = {n: float(scores[places, assign(scores, current, exact=n)].sum()) for n in (300, 299)}
    assert float(scores[places, current].sum()) < total[299] < total[300]
    assert assign(scores, current, exact=299).sort().values.equal(places)
    settled = assign(scores)
    assert assign(scores, settled, exact=299).equal(settled)


def test_gain_on_noise_is_the_yardstick():
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(7))
    of_noise = permutation_gain(noise, (8, 8), (4, 4))
    assert of_noise.gain > 0.05  # the search always finds something
    assert abs(of_noise.beyond_null) < 0.05
    assert permutation_gain(planted((8, 8), (4, 4)).float(), (8, 8), (4, 4)).beyond_null > 0.3


def test_noise_like_has_the_norms_and_nothing_else():
    weight = torch.randn(32, 24, dtype=torch.float64) * torch.randn(32, 1, dtype=torch.float64).exp()
    twin = noise_like(weight)
    assert torch.allclose(twin.norm(dim=0), weight.norm(dim=0))
    assert torch.allclose(twin.norm(dim=1), weight.norm(dim=1), rtol=1e-5)  # alternating: rows were scaled before columns
    assert torch.equal(twin, noise_like(weight))
    unequal = torch.randn(64, 64, dtype=torch.float64) * torch.randn(64, 1, dtype=torch.float64).exp()
    only_norms = permutation_gain(unequal, (32, 32), (2, 2), seeds=2)
    assert only_norms.beyond_null > 0.1  # beside Gaussian noise, norms look like structure
    assert abs(only_norms.beyond_norms) < 0.05


def test_the_seed_decides_and_more_starts_are_no_worse():
    weight = planted((8, 8), (4, 4))
    one, same, many = (permute_kronecker(weight, (8, 8), (4, 4), search="damped", starts=n, seed=3) for n in (1, 1, 4))
    assert one.rows.equal(same.rows)
    assert many.rho >= one.rho


BAD = [
    (lambda w: permute_kronecker(w, (5, 6), (6, 6)), r"is \(30, 36\); needed weight \(24, 36\)"),
    (lambda w: permute_kronecker(w, (4, 6), (6, 6), axes="all"), "needed axes of rows, columns, both"),
    (lambda w: permute_kronecker(w, (4, 6), (6, 6), search="best"), "a search of sorted, damped"),
    (lambda w: permute_kronecker(w, (4, 6), (6, 6), sweeps=0), "needed positive integers"),
    (lambda w: permute_kronecker(w / 0, (4, 6), (6, 6)), "NaN or infinite"),
    (lambda w: Kronecker(right=(2, 2), permute="all"), "needed permute '' or one of rows, columns, both"),
    (lambda w: Kronecker(right=(2, 2), permute="both", search="best"), "a search of sorted, damped"),
]


@pytest.mark.parametrize(("call", "words"), BAD, ids=[words[:30] for _, words in BAD])
def test_bad_searches_say_what_to_do(call, words):
    with pytest.raises(ShapeError, match=words):
        call(torch.randn(24, 36))


@pytest.mark.parametrize("init", ["svd", "norm"])
def test_a_layer_of_a_scrambled_product_is_that_product(init):
    weight = planted((8, 6), (3, 4))
    layer = FactorizedLinear.from_dense(weight, Kronecker(right=(3, 4), permute="both"), init)
    assert torch.allclose(layer.weight, weight, atol=1e-6)  # the last step is a Gram's eigenvector: half the digits
    x = torch.randn(5, 24, dtype=torch.float64)
    assert torch.allclose(layer(x), x @ weight.T, atol=1e-5)
    assert set(layer.state_dict()) == {"left", "right", "row_order", "column_order"}
    assert layer.row_order.dtype == layer.column_order.dtype == torch.int32
    assert [name for name, _ in layer.named_parameters()] == ["left", "right"]


def test_the_orders_follow_a_state_dict_and_a_meta_layer():
    form = Kronecker(right=(3, 4), permute="both")
    layer = FactorizedLinear.from_dense(planted((8, 6), (3, 4)), form)
    with torch.device("meta"):
        hollow = FactorizedLinear(form, (24, 24), bias=False, dtype=torch.float64, draw=False)
    hollow.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(hollow.weight, layer.weight)


def test_a_permuted_form_survives_json_and_scaling():
    recipe = papers["tqcompressor-81m"]
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    axes = {rule.form.permute for rule in recipe.scaled_to(tiny("llama")).rules}
    assert axes == {"both", "columns"}


def test_a_permuted_embedding_with_tied_head_equals_its_dense_self():
    model = tiny("gpt2")
    rule = Rule(where="embedding", form=Kronecker(right=(1, 4), permute="columns"))
    predicted = plan(model, Recipe(name="test", rules=(rule,)))
    factorize_(model, Recipe(name="test", rules=(rule,)))
    table, head = model.transformer.wte, model.lm_head
    assert isinstance(table, FactorizedEmbedding)
    assert table.column_order is head.column_order
    assert not table.column_order.equal(torch.arange(24, dtype=torch.int32))
    assert sum(p.numel() for p in model.parameters()) == predicted.total
    before, twin = logits(model, IDS), copy.deepcopy(model)
    densify_(twin)
    assert torch.allclose(logits(twin, IDS), before, atol=1e-10)
    assert twin.lm_head.weight is twin.transformer.wte.weight


def test_sizes_state_the_orders_apart():
    predicted = plan(skeleton("gpt2"), papers["tqcompressor-81m"])
    assert predicted.total == 81_336_388  # tied, with positions
    assert predicted.total + predicted.head == 119_933_764  # with a dense head beside
    assert predicted.index_bytes == 4 * (12 * (768 + 3072) + 768)
    assert f"{predicted.index_bytes:,} bytes of row and column orders" in str(predicted)
    model = tiny("llama")
    mlp = Recipe(name="test", rules=(Rule(where="mlp", form=Kronecker(right=(2, 2), permute="both")),))
    expected = plan(model, mlp).index_bytes
    factorize_(model, mlp)
    assert size(model).bytes_by_dtype["int32"] == expected


def mlp_recipe(family, **options):
    up = "up" if family in ("gpt2", "bert", "opt", "t5") else ("gate", "up")
    right = options.pop("right", (2, 3))
    rules = (Rule(where=up, form=Kronecker(right=right, **options)), Rule(where="down", form=Kronecker(right=right[::-1], **options)))
    return Recipe(name="test", rules=rules)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_neurons_are_reordered_for_free(family):
    model, recipe = tiny(family), mlp_recipe(family, terms=2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)  # biases that matter
    before = logits(model, IDS)
    orders = hidden_orders(model, recipe)
    assert torch.equal(logits(model, IDS), before)  # looking touches nothing
    assert len(orders) == (4 if family.startswith("t5") else 2)
    permute_hidden_(model, orders)
    assert torch.allclose(logits(model, IDS), before, atol=1e-10)
    factorize_(model, recipe)
    errors = {row["module"]: row["error"] for row in report(model)}
    for found in orders.values():
        assert not found.order.equal(torch.arange(48))
        assert sum(found.after.values()) > sum(found.before.values())
        assert all(abs(errors[name] - (1 - rho**2) ** 0.5) < 1e-6 for name, rho in found.after.items())
    assert sum(b.numel() for b in model.buffers() if b.dtype == torch.int32) == 0  # no order is stored


def test_only_claimed_matrices_choose_the_order_and_all_follow_it():
    model = tiny("llama")
    before, gate = logits(model, IDS), model.model.layers[0].mlp.gate_proj.weight.clone()
    rule = Rule(where="down", form=Kronecker(right=(3, 2)), blocks=(0,))
    orders = hidden_orders(model, Recipe(name="test", rules=(rule,)))
    assert list(orders) == ["model.layers.0"]
    assert list(orders["model.layers.0"].after) == ["model.layers.0.mlp.down_proj"]
    permute_hidden_(model, orders)
    assert torch.equal(model.model.layers[0].mlp.gate_proj.weight, gate[orders["model.layers.0"].order])
    assert torch.allclose(logits(model, IDS), before, atol=1e-10)


def test_neurons_that_cannot_share_an_order_are_refused():
    model = tiny("llama")
    uneven = Recipe(name="test", rules=(Rule(where=("gate", "up"), form=Kronecker(right=(2, 3))), Rule(where="down", form=Kronecker(right=(2, 3)))))
    with pytest.raises(ShapeError, match="needed one split for all of an MLP"):
        hidden_orders(model, uneven)
    with pytest.raises(RecipeError, match="found no MLP matrix with a Kronecker form"):
        hidden_orders(model, Recipe(name="test", rules=(Rule(where="o", form=Kronecker(right=(2, 2))),)))
    with pytest.raises(RecipeError, match=r"got block 'model\.layers\.9'; needed one of model\.layers\.0"):
        permute_hidden_(model, {"model.layers.9": torch.arange(48)})
    with pytest.raises(RecipeError, match="model type '' is not known"):
        hidden_orders(torch.nn.Linear(4, 4), uneven)
