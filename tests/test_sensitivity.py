"""Profiles: a partial run is a whole one, full rank is no damage, killed runs go on, the model stays bit for bit what it was."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import logits, tiny

import tnlib.sensitivity
from tnlib.evaluate import compare, kl_to_teacher, perplexity
from tnlib.kronecker import Kronecker
from tnlib.local import fit_layers_
from tnlib.low_rank import LowRank
from tnlib.moments import Moments, second_moments
from tnlib.prefix import Prefix
from tnlib.profile import Profile, Row, blank_profile, rank_correlation
from tnlib.proxies import proxy_profile
from tnlib.recipe import Recipe, RecipeError, Rule
from tnlib.sensitivity import sensitivity
from tnlib.shapes import ShapeError
from tnlib.surgery import factorize_
from tnlib.tensor_train import TensorTrain
from tnlib.tt_matrix import MPO

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = torch.randint(2, 90, (5, 12), generator=torch.Generator().manual_seed(0))
FAMILIES = ["llama", "gpt2", "qwen2", "qwen3", "opt"]
FORMS = [LowRank(rank=4), MPO(order=2, max_rank=6)]


def replaced(model, row, moments=None):
    """A factorized copy, made by the public verbs."""
    student = copy.deepcopy(model)
    factorize_(student, Recipe(name="one", rules=(Rule(where=row.names, form=row.form),)))
    if moments is not None:
        fit_layers_(student, model, {name: moments[name] for name in row.names})
    return student


def whole_run(student, teacher):
    """Loss and KL of each window by a run of all blocks, in float64."""
    ours, theirs = (logits(model, WINDOWS).log_softmax(-1) for model in (student, teacher))
    kl = F.kl_div(ours, theirs, reduction="none", log_target=True).sum((1, 2)) / WINDOWS.shape[1]
    loss = -ours[:, :-1].gather(-1, WINDOWS[:, 1:, None]).mean((1, 2))
    return loss, kl


def same_model(model, before):
    state = model.state_dict()
    return all(torch.equal(a, b) for a, b in zip(before.values(), state.values())) and state.keys() == before.keys()


@pytest.mark.parametrize(
    ("family", "unit"), [*((family, "matrix") for family in FAMILIES), ("llama", "block"), ("gpt2", "block")]
)
def test_scores_are_those_of_a_factorized_copy_run_whole(family, unit):
    model = tiny(family)
    profile = sensitivity(model, WINDOWS, FORMS, unit=unit, batch=2)
    dense, _ = whole_run(model, model)
    assert profile.dense_losses == pytest.approx(dense.tolist(), abs=1e-12)
    assert profile.rows
    for row in profile.rows:
        student = replaced(model, row)
        loss, kl = whole_run(student, model)
        assert row.scores["kl"] == pytest.approx(kl.tolist(), abs=1e-10)
        assert row.scores["loss"] == pytest.approx((loss - dense).tolist(), abs=1e-10)
        assert row.mean("kl") > 0
        saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in student.parameters())
        assert next(u for u in profile.units if u.name == row.unit).params - row.params == saved > 0
    row = profile.rows[-1]  # the public measures upcast logits to float32, hence the tolerance
    student = replaced(model, row)
    ours, before, divergence = (
        perplexity(student, WINDOWS),
        perplexity(model, WINDOWS),
        kl_to_teacher(student, model, WINDOWS),
    )
    assert row.mean("kl") == pytest.approx(divergence.value, rel=1e-5)
    assert row.stderr("kl") == pytest.approx(divergence.stderr, rel=1e-5)
    assert row.mean("loss") == pytest.approx(ours.nll - before.nll, abs=1e-5)
    assert row.stderr("loss") == pytest.approx(compare(ours.losses, before.losses).stderr, rel=1e-4)


def test_a_fused_matrix_is_one_unit():
    units = blank_profile(tiny("gpt2"), FORMS).units
    assert [(u.block, u.names, u.shapes) for u in units[:1]] == [(0, ("transformer.h.0.attn.c_attn",), ((72, 24),))]
    assert len(units) == 8
    blocks = blank_profile(tiny("gpt2"), FORMS, unit="block").units
    assert [(u.name, u.block, len(u.names)) for u in blocks] == [("transformer.h.0", 0, 4), ("transformer.h.1", 1, 4)]


@pytest.mark.parametrize(
    "form", [LowRank(rank=10**6), MPO(order=2), TensorTrain(order=2), Kronecker(right=(2, 2), terms=4)], ids=str
)
def test_full_rank_does_no_damage(form, monkeypatch):
    """No full-rank form is smaller than its matrix, and none would be tried: the price is taken away for this test."""
    monkeypatch.setattr(tnlib.profile, "_fits", lambda form, name, shape: 0)
    model = tiny("llama")
    rows = sensitivity(model, WINDOWS, [form], "mlp").rows
    assert len(rows) == 6
    for row in rows:
        assert row.scores["kl"] == pytest.approx([0.0] * 5, abs=1e-10)
        assert row.scores["loss"] == pytest.approx([0.0] * 5, abs=1e-10)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unchanged_model_scores_exactly_nothing(dtype, block):
    prefix = Prefix(tiny("llama", dtype), WINDOWS)
    found = prefix.scores_from(block)
    assert found.kl.tolist() == [0.0] * 5
    assert torch.equal(found.loss, prefix.losses)


def test_earlier_blocks_do_not_run():
    model = tiny("llama")
    prefix, ran = Prefix(model, WINDOWS, batch=2), []
    for number, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(lambda *args, number=number: ran.append(number))
    prefix.scores_from(1)
    assert ran == [1, 1, 1]  # three batches
    assert not any("forward" in block.__dict__ for block in model.model.layers)


def test_larger_and_equal_forms_are_left_out():
    forms = [MPO(order=2, max_rank=10**6), LowRank(rank=4), LowRank(kept=4 * 48 / 24**2), LowRank(rank=11)]
    rows = blank_profile(tiny("llama"), forms).rows
    assert not [row for row in rows if row.form == forms[0]]
    query = [row.form for row in rows if row.unit == "model.layers.0.self_attn.q_proj"]  # 24 x 24
    assert query == [LowRank(rank=4), LowRank(rank=11)]  # the third is rank 4 as well
    key = [
        row.form for row in rows if row.unit == "model.layers.0.self_attn.k_proj"
    ]  # 12 x 24: rank 11 stores 396 > 288
    assert key == [LowRank(rank=4), forms[2]]
    (row, *_) = [row for row in blank_profile(tiny("llama"), forms[3:], unit="block").rows]
    assert {name.split(".")[-1] for name in row.names} == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_forms_fitted_to_activations_are_those_of_fit_layers(family):
    model = tiny(family)
    text = torch.randint(2, 90, (12, 16), generator=torch.Generator().manual_seed(2))
    names = [name for unit in blank_profile(model, FORMS).units for name in unit.names]
    moments = second_moments(model, text, names)
    plain, fitted = (sensitivity(model, WINDOWS, FORMS, "down", moments=some) for some in (None, moments))
    for before, row in zip(plain.rows, fitted.rows):
        assert row.mean("error") >= before.mean("error") - 1e-12
        assert row.scores["kl"] != before.scores["kl"]
        _, kl = whole_run(replaced(model, row, moments), model)
        assert row.scores["kl"] == pytest.approx(kl.tolist(), abs=1e-10)


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    model = tiny("llama")
    before, module_dicts = copy.deepcopy(model.state_dict()), [sorted(m.__dict__) for m in model.modules()]
    storage = [p.data_ptr() for p in model.parameters()]
    reference, scores, calls = sensitivity(model, WINDOWS, FORMS), Prefix.scores_from, []

    def killed(self, block):
        if len(calls) == 9:
            raise KeyboardInterrupt
        calls.append(block)
        return scores(self, block)

    monkeypatch.setattr(Prefix, "scores_from", killed)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, WINDOWS, FORMS, out=tmp_path)
    assert same_model(model, before)
    assert [p.data_ptr() for p in model.parameters()] == storage
    assert [sorted(m.__dict__) for m in model.modules()] == module_dicts
    kept = len(list(tmp_path.glob("*.json")))
    assert 0 < kept < len(reference.units)
    calls.clear()
    monkeypatch.setattr(Prefix, "scores_from", lambda self, block: calls.append(block) or scores(self, block))
    assert sensitivity(model, WINDOWS, FORMS, out=tmp_path) == reference
    assert len(calls) == len(reference.rows) - sum(len(reference.of(u.name)) for u in reference.units[:kept])
    calls.clear()
    more = sensitivity(model, WINDOWS, [*FORMS, LowRank(rank=2)], out=tmp_path)  # one more form, later
    assert len(calls) == len(more.rows) - len(reference.rows) > 0
    with pytest.raises(ValueError, match="is of another run"):
        sensitivity(model, WINDOWS.flip(0), FORMS, out=tmp_path)


def test_an_error_in_the_forward_pass_leaves_the_model_as_it_was():
    model = tiny("gpt2").train()
    before, prefix = copy.deepcopy(model.state_dict()), Prefix(model, WINDOWS)
    model.transformer.ln_f.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prefix.scores_from(1)
    assert not any("forward" in block.__dict__ for block in model.transformer.h)
    with pytest.raises(ZeroDivisionError):
        sensitivity(model, WINDOWS, FORMS)
    assert same_model(model, before)
    assert all(module.training for module in model.modules())
    assert not any(block._forward_hooks for block in model.transformer.h)


def test_profiles_are_plain_data():
    profile = sensitivity(tiny("llama"), WINDOWS, FORMS, "attention")
    again = Profile.from_dict(json.loads(json.dumps(profile.to_dict())))
    assert again == profile
    line = profile.table("loss")[0]
    assert line["kept"] == line["params"] / 24**2
    assert profile.tokens == WINDOWS.numel()
    with pytest.raises(ValueError, match="has no score 'output'; needed one of kl, loss, error, square"):
        profile.table("output")


def test_proxies_are_errors_by_hand():
    model = tiny("gpt2")
    names = [name for unit in blank_profile(model, FORMS).units for name in unit.names]
    identity = {
        name: Moments(1, second=torch.eye(model.get_submodule(name).weight.shape[0]).double()) for name in names
    }
    for row in proxy_profile(model, identity, FORMS).rows:
        assert row.mean("output") == pytest.approx(row.mean("square"), rel=1e-12)
        assert row.mean("relative_output") == pytest.approx(row.mean("error") ** 2, rel=1e-9)
        assert math.isnan(row.stderr("output"))
    moments = second_moments(model, WINDOWS, names)
    row = proxy_profile(model, moments, FORMS, "down").rows[0]
    (name,), found = row.names, []
    with model.get_submodule(name).register_forward_pre_hook(lambda m, args: found.append(args[0].flatten(0, -2))):
        logits(model, WINDOWS)
    missed = model.get_submodule(name)(found[0]) - replaced(model, row).get_submodule(name)(found[0])
    assert row.mean("output") == pytest.approx(float(missed.detach().square().sum(-1).mean()), rel=1e-9)
    whole = sensitivity(model, WINDOWS, FORMS, "down")
    assert [r.mean("error") for r in proxy_profile(model, None, FORMS, "down").rows] == [
        r.mean("error") for r in whole.rows
    ]
    with pytest.raises(
        ValueError, match=r"proxy_profile: got moments of 7 matrices, without transformer.h.0.attn.c_attn"
    ):
        proxy_profile(model, {n: m for n, m in moments.items() if n != names[0]}, FORMS)


def test_rank_correlation_is_over_common_rows():
    def made(values):
        rows = [Row(f"u{k}", LowRank(rank=1 + k % 2), (), 1, 1.0, {"s": (v,)}) for k, v in enumerate(values)]
        return Profile((), tuple(rows), 0, 0.0)

    one, other = made([1, 5, 2, 6, 3, 4]), made([10, 9, 20, 8, 30, 10])
    assert rank_correlation(one, one, "s", "s") == {"all": pytest.approx(1), "LowRank(rank=1)": 1, "LowRank(rank=2)": 1}
    assert rank_correlation(one, made([math.exp(v) for v in (1, 5, 2, 6, 3, 4)]), "s", "s")["all"] == pytest.approx(1)
    found = rank_correlation(one, other, "s", "s")
    assert (found["LowRank(rank=1)"], found["LowRank(rank=2)"]) == (pytest.approx(1), pytest.approx(-1))
    assert math.isnan(rank_correlation(one, made([1, 2]), "s", "s")["all"])
    with pytest.raises(ValueError, match="have none in common"):
        rank_correlation(one, made([]), "s", "s")


@pytest.mark.parametrize(
    ("family", "arguments", "error", "words"),
    [
        ("llama", {"where": "embedding"}, RecipeError, "is not in one of the 2 blocks model.layers"),
        ("llama", {"where": "lm_head"}, RecipeError, "is not in one of the 2 blocks"),
        ("llama", {"where": "qkv"}, RecipeError, "claims no module"),
        ("llama", {"unit": "layer"}, RecipeError, "needed at least one Form and unit 'matrix' or 'block'"),
        ("llama", {"forms": []}, RecipeError, "needed at least one Form"),
        (
            "llama",
            {"forms": [Kronecker(right=(5, 5))]},
            ShapeError,
            r"q_proj, weight \(24, 24\) \(out, in\):\n.*does not divide",
        ),
        ("llama", {"windows": WINDOWS + 90}, ValueError, "needed ids in it"),
        ("llama", {"moments": {}}, ValueError, "sensitivity: got moments of 0 matrices, without model.layers.0"),
        ("bert", {}, ShapeError, "needed a causal language model"),
        ("t5", {}, ShapeError, "needed exactly one"),
    ],
)
def test_what_is_refused(family, arguments, error, words):
    given = {"windows": WINDOWS, "forms": FORMS} | arguments
    with pytest.raises(error, match=words):
        sensitivity(tiny(family), **given)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_that_are_not_finite_are_refused(family):
    model = tiny(family)
    name = blank_profile(model, FORMS).units[2].name
    model.get_submodule(name).weight.data[0, 0] = math.nan
    with pytest.raises(ShapeError, match=f"sensitivity, matrix {name}: .* 1 of .* entries NaN or infinite"):
        sensitivity(model, WINDOWS, FORMS)
    model = tiny(family)
    model.get_input_embeddings().weight.data[5] = math.inf
    with pytest.raises(ValueError, match="needed finite logits"):
        sensitivity(model, torch.full((3, 4), 5), FORMS)
