"""plan, factorize_ and densify_ on every family: predicted equals actual, exact at full rank, ties kept, nothing half-done."""

import copy

import pytest
import torch
from safetensors.torch import save
from tiny import CONFIGS, logits, recipe, tiny
from torch import nn

import tnlib.surgery
from tnlib import build
from tnlib.block_low_rank import BlockLowRank
from tnlib.kronecker import Kronecker
from tnlib.layers import FactorizedEmbedding, FactorizedLinear, SplitLinear
from tnlib.low_rank import LowRank
from tnlib.papers import papers
from tnlib.plan import plan, report, tied_names
from tnlib.quant import Quantize
from tnlib.quantize import fake_quantize_, quantize_
from tnlib.recipe import Recipe, RecipeError, Rule
from tnlib.shapes import ShapeError
from tnlib.surgery import densify_, factorize_
from tnlib.tensor_ring import TensorRing
from tnlib.tensor_train import TensorTrain
from tnlib.tt_matrix import MPO

IDS = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(0))
FULL = [LowRank(rank=10**6), BlockLowRank(rank=10**6), TensorRing(order=2, rank=10**6), MPO(order=2), TensorTrain(order=2), Kronecker(right=(2, 2), terms=10**6)]
HALF = [
    LowRank(kept=0.5),
    BlockLowRank(kept=0.5),
    MPO(order=2, kept=0.5),
    TensorTrain(order=2, kept=0.5),
    Kronecker(right=(2, 2), terms=1),
]


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("form", FULL, ids=str)
def test_full_rank_leaves_the_logits_alone(family, form):
    model = tiny(family)
    before = logits(model, IDS)
    factorize_(model, recipe(form))
    assert torch.allclose(logits(model, IDS), before, atol=1e-8)
    densify_(model)
    assert torch.allclose(logits(model, IDS), before, atol=1e-8)
    assert not report(model)


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("form", HALF, ids=str)
def test_predicted_params_equal_actual_with_and_without_embedding(family, form):
    for wheres in (("linear",), ("linear", "embedding")):
        model = tiny(family)
        predicted = plan(model, recipe(form, *wheres))
        factorize_(model, recipe(form, *wheres))
        assert count(model) == predicted.total
        assert len(report(model)) >= len(predicted.rows)
        changed = logits(model, IDS)
        assert torch.isfinite(changed).all()
        densify_(model)
        assert torch.allclose(logits(model, IDS), changed, atol=1e-8)
        assert count(model) == predicted.dense_total


def test_tied_head_shares_the_factors_and_their_gradients():
    model = tiny("gpt2")
    assert tied_names(model, "transformer.wte") == ["transformer.wte", "lm_head"]
    factorize_(model, recipe(Kronecker(right=(1, 4)), "embedding"))
    table, head = model.transformer.wte, model.lm_head
    assert isinstance(table, FactorizedEmbedding)
    assert isinstance(head, FactorizedLinear)
    assert table.left is head.left
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert table.left.grad is head.left.grad
    densify_(model)
    assert model.transformer.wte.weight is model.lm_head.weight


def test_dense_head_keeps_the_old_matrix():
    model = tiny("gpt2")
    old = model.lm_head.weight.detach().clone()
    rule = recipe(Kronecker(right=(1, 4)), "embedding", head="dense")
    predicted = plan(model, rule)
    factorize_(model, rule)
    assert torch.equal(model.lm_head.weight, old)
    assert count(model) == predicted.total


def test_four_modules_that_share_one_table_go_on_sharing_it():
    model = tiny("t5")
    sharers = tied_names(model, "shared")
    assert len(sharers) >= 3
    factorize_(model, recipe(LowRank(rank=8), "embedding"))
    assert len({id(model.get_submodule(name).left) for name in sharers}) == 1


def test_a_tie_that_cannot_share_is_refused_and_nothing_is_touched():
    model = tiny("llama")
    odd = nn.Bilinear(24, 24, 24)
    odd.weight = model.model.layers[0].mlp.up_proj.weight
    model.model.odd = odd
    before = logits(model, IDS)
    with pytest.raises(RecipeError, match=r"tied to model.odd \(Bilinear\), which cannot share factors"):
        factorize_(model, recipe(LowRank(rank=2), "mlp"))
    assert torch.equal(logits(model, IDS), before)


def test_nan_in_the_last_matrix_leaves_the_whole_model_untouched():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    layers = [type(m) for m in model.modules()]
    with pytest.raises(
        ShapeError, match=r"recipe 'test', module model.layers.1.mlp.down_proj: got \(24, 48\) float64 with 1 of 1152"
    ):
        factorize_(model, recipe(LowRank(rank=2), "mlp"))
    assert [type(m) for m in model.modules()] == layers


def test_an_interruption_half_way_leaves_the_model_as_it_was(monkeypatch):
    model, built = tiny("llama"), []
    build = tnlib.surgery.build

    def interrupted(*args):
        if len(built) == 3:
            raise KeyboardInterrupt
        built.append(build(*args))
        return built[-1]

    monkeypatch.setattr(tnlib.surgery, "build", interrupted)
    before = logits(model, IDS)
    with pytest.raises(KeyboardInterrupt):
        factorize_(model, recipe(LowRank(rank=2), "mlp"))
    assert not report(model)
    assert torch.equal(logits(model, IDS), before)


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("where", ["mlp", "qkv", "embedding"])
def test_an_interrupted_factorization_goes_on_where_it_was(monkeypatch, tmp_path, where):
    plain, model = tiny("gpt2"), tiny("gpt2")
    wanted = recipe(MPO(order=2, kept=0.5), where, **({"split": 3} if where == "qkv" else {}))
    factorize_(plain, wanted, seed=3)
    built, whole = [], build.build_layer

    def interrupted(module, *args):
        if module.weight.is_meta:
            return whole(module, *args)
        if built and len(built) % 2 and not built.append(None):
            raise KeyboardInterrupt
        built.append(module)
        return whole(module, *args)

    monkeypatch.setattr(build, "build_layer", interrupted)
    before = copy.deepcopy(model.state_dict())
    for _ in range(9):
        try:
            factorize_(model, wanted, seed=3, out=tmp_path)
            break
        except KeyboardInterrupt:
            assert _same(model.state_dict(), before)
    assert _same(model.state_dict(), plain.state_dict())
    assert len([module for module in built if module is not None]) == len(list(tmp_path.glob("*.safetensors")))
    errors = [[m.error for m in x.modules() if hasattr(m, "error")] for x in (model, plain)]
    assert errors[0] == errors[1]
    assert all(p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), plain.parameters()))


def test_finished_layers_of_another_weight_or_a_damaged_file_are_refused(tmp_path):
    wanted = recipe(LowRank(kept=0.5), "mlp")
    factorize_(tiny("gpt2"), wanted, out=tmp_path)
    other = tiny("gpt2")
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "mlp" in n and p.dim() == 2).add_(1)
    with pytest.raises(ValueError, match=r"another weight, rule, seed or calibration.*Give out= another folder"):
        factorize_(other, wanted, out=tmp_path)
    path = next(iter(sorted(tmp_path.glob("*.safetensors"))))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="is damaged"):
        factorize_(tiny("gpt2"), wanted, out=tmp_path)
    path.write_bytes(save({"left": torch.zeros(2)}))  # somebody else's file, without a fingerprint
    with pytest.raises(ValueError, match="another weight, rule, seed or calibration"):
        factorize_(tiny("gpt2"), wanted, out=tmp_path)


def test_a_form_that_does_not_fit_names_recipe_module_and_weight():
    with pytest.raises(
        ShapeError, match=r"recipe 'test', module model.layers.0.mlp.gate_proj, weight \(48, 24\) \(out, in\)"
    ):
        plan(tiny("llama"), recipe(Kronecker(right=(5, 2)), "mlp"))


@pytest.mark.parametrize("name", list(papers))
def test_every_paper_runs_on_a_tiny_model_of_its_own_family(name):
    original = papers[name]
    model = tiny({"gpt2": "gpt2", "gpt2-50k": "gpt2", "bert-base-uncased": "bert"}.get(original.base, "llama"))
    scaled = original.scaled_to(model)
    rules = tuple(r for r in scaled.rules if r.where not in (("pooler",), "pooler"))  # a masked-LM BERT has none
    scaled = Recipe(name=name, rules=rules)
    predicted = plan(model, scaled)
    factorize_(model, scaled)
    assert count(model) == predicted.total
    assert torch.isfinite(logits(model, IDS)).all()
    assert torch.isfinite(model.float()(input_ids=IDS).logits).all()


def test_split_bands_of_a_fused_matrix():
    model = tiny("gpt2")
    factorize_(model, recipe(LowRank(rank=24), "qkv", split=3))
    assert isinstance(model.transformer.h[0].attn.c_attn, SplitLinear)
    reference = logits(tiny("gpt2"), IDS)
    assert torch.allclose(logits(model, IDS), reference, atol=1e-8)
    assert len(report(model)) == 2


def test_generation_training_and_copying_work_on_a_factorized_model():
    model = tiny("llama", torch.float32)
    factorize_(model, recipe(LowRank(kept=0.5), "linear", "embedding"))
    out = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 13)
    twin, optimizer = copy.deepcopy(model).train(), None
    optimizer = torch.optim.Adam(twin.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = twin(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0), out)


def test_random_initialization_follows_the_seed():
    models = [tiny("llama") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2)):
        factorize_(model, recipe(MPO(order=2, max_rank=3), "mlp", init="random"), seed=seed)
    a, b, c = (logits(model, IDS) for model in models)
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)


def test_plan_prints_both_ranks_when_one_was_lowered():
    text = str(plan(tiny("llama"), recipe(LowRank(rank=999), "mlp")))
    assert "LowRank(rank=24) (asked rank=999)" in text
    assert "tied weights once" in text
    assert "<table>" in plan(tiny("llama"), recipe(LowRank(rank=9), "mlp"))._repr_html_()


def state(model):
    """Which tensor stands under each name, and its sum: two names may have one."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: (id(tensor), float(tensor.detach().double().sum())) for name, tensor in named}


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "opt", "bert", "t5"])
@pytest.mark.parametrize("head", ["tied", "dense"])
def test_tying_anew_changes_nothing(family, head):
    model = tiny(family)
    recipe = Recipe(name="t", rules=(Rule(where="embedding", form=LowRank(rank=4), head=head),))
    factorize_(model, recipe)
    for change in (lambda m: None, densify_):
        change(model)
        before = state(model)
        model.tie_weights()
        assert state(model) == before
    assert ("lm_head.weight" in model.all_tied_weights_keys) == (head == "tied" and family != "bert")


def test_tying_anew_keeps_the_ties_that_surgery_did_not_touch():
    model = tiny("llama")
    factorize_(model, Recipe(name="t", rules=(Rule(where="mlp", form=LowRank(rank=4)),)))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("what", ["dense", "factors"])
def test_tying_anew_leaves_quantized_tables(what):
    model, grid = tiny("llama", torch.float32), Quantize(bits=4, what=what, learn="frozen")
    if what == "factors":
        factorize_(model, Recipe(name="t", rules=(Rule(where="embedding", form=LowRank(rank=4)),)))
    for verb in (fake_quantize_, quantize_):
        verb(model, grid)
        before, ids = state(model), torch.arange(6)[None]
        said = logits(model, ids)
        model.tie_weights()
        assert state(model) == before
        assert logits(model, ids).equal(said)
