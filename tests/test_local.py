"""Local distillation: moments by hand, closed forms, fixed points, nothing worse than before, ties, resume, errors."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIGS, HALF, WINDOWS, recipe, tiny
from torch import nn

import tnlib.local
from tnlib.block_low_rank import BlockLowRank
from tnlib.kronecker import Kronecker
from tnlib.layer_fit import fit_metric
from tnlib.layers import FactorizedLinear
from tnlib.local import fit_layers_
from tnlib.low_rank import LowRank
from tnlib.metric import Metric
from tnlib.moments import Moments, second_moments
from tnlib.shapes import ShapeError, weight_of
from tnlib.surgery import factorize_
from tnlib.tensor_ring import TensorRing
from tnlib.tensor_train import TensorTrain
from tnlib.tt_matrix import MPO
from tnlib.weighted import fit_weighted

HELD = torch.randint(2, 90, (6, 16), generator=torch.Generator().manual_seed(1))
ORDERED = [
    Kronecker(right=(2, 2), terms=2, permute="both"),
    Kronecker(right=(2, 3), terms=3, permute="rows"),
    Kronecker(right=(1, 2), terms=1, scaled=True, permute="columns"),
]
FULL = [LowRank(rank=10**6), BlockLowRank(rank=10**6), TensorRing(order=2, rank=10**6), MPO(order=2), TensorTrain(order=2), Kronecker(right=(2, 2), terms=4)]


def pair(family, form, *wheres, dtype=torch.float64, **options):
    teacher = tiny(family, dtype)
    student = copy.deepcopy(teacher)
    factorize_(student, recipe(form, *wheres, **options))
    return student, teacher


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def inputs(model, name, windows):
    """All inputs (tokens, in) of one module, gathered the plain way."""
    found = []
    module = model.get_submodule(name)
    with torch.no_grad(), module.register_forward_pre_hook(lambda m, args: found.append(args[0].flatten(0, -2))):
        model(windows)
    return torch.cat(found)


def uneven(width):
    """A badly conditioned second moment (width, width)."""
    mix = torch.randn(width, width, dtype=torch.float64) * torch.logspace(0, -3, width, dtype=torch.float64)
    return mix @ mix.T / width + 1e-4 * torch.eye(width, dtype=torch.float64)


# --- moments -----------------------------------------------------------------------------------------------------------


def test_moments_equal_those_of_the_gathered_inputs_and_are_shared():
    model = tiny("llama")
    names = [
        f"model.layers.1.{place}" for place in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    found = second_moments(model, WINDOWS, names, batch=5)
    for name in names:
        x = inputs(model, name, WINDOWS)
        assert torch.allclose(found[name].second, x.T @ x / len(x), rtol=1e-12)
        assert torch.allclose(found[name].mean, x.mean(0))
        assert torch.allclose(found[name].covariance(), torch.cov(x.T, correction=0), atol=1e-10)
    assert found[names[0]] is found[names[1]]
    assert found[names[0]] is not found[names[2]]
    assert hooks(model) == 0


def test_moments_of_an_embedding_count_its_rows():
    found = second_moments(tiny("gpt2"), WINDOWS.int(), ["transformer.wte"])["transformer.wte"]
    assert torch.equal(found.counts, torch.bincount(WINDOWS.flatten(), minlength=96).double())


@pytest.mark.parametrize("family", list(CONFIGS))
def test_moments_leave_modes_and_hooks_as_they_were(family):
    model = tiny(family).train()
    next(iter(model.children())).eval()
    before = [m.training for m in model.modules()]
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    second_moments(model, HELD, linear)
    assert [m.training for m in model.modules()] == before
    assert hooks(model) == 0


def test_an_infinite_activation_names_its_module_and_leaves_no_hook():
    student, teacher = pair("llama", LowRank(rank=4), "mlp")
    with torch.no_grad():
        teacher.model.layers[0].post_attention_layernorm.weight[3] = float("inf")
    start = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=r"inputs of module model.layers.0.mlp.gate_proj hold \d+ NaN or infinite"):
        fit_layers_(student, teacher, WINDOWS)
    assert hooks(teacher) == 0
    assert all(torch.equal(a, b) for a, b in zip(start.values(), student.state_dict().values()))


def test_a_module_that_the_text_never_reaches_is_named():
    model = tiny("llama")
    model.model.spare = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"module model.spare saw no input"):
        second_moments(model, HELD, ["model.spare"])
    assert second_moments(model, HELD, ["model.spare"], missing=True) == {"model.spare": None}


# --- one weight --------------------------------------------------------------------------------------------------------


@given(rank=st.integers(1, 12), out=st.sampled_from([12, 20, 33]), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_low_rank_reaches_the_whitened_svd_bound(rank, out, seed):
    torch.manual_seed(seed)
    weight, second = torch.randn(out, 20, dtype=torch.float64), uneven(20)
    form = LowRank(rank=rank).resolve((out, 20))
    factors, how = fit_weighted(form, form.decompose(weight)[0], weight, Metric(second))
    root = torch.linalg.cholesky(second)
    values = torch.linalg.svdvals(weight @ root)  # what no rank-r matrix can beat
    bound = (values[rank:].square().sum() / values.square().sum()).sqrt()
    assert how == "closed form"
    assert Metric(second).error(weight - factors["left"] @ factors["right"], weight) == pytest.approx(
        float(bound), abs=1e-7
    )


def test_low_rank_with_row_weights_reaches_its_bound_too():
    weight, rows = torch.randn(30, 12, dtype=torch.float64), torch.rand(30, dtype=torch.float64) + 0.01
    form = LowRank(rank=5)
    factors, _ = fit_weighted(form, form.decompose(weight)[0], weight, Metric(rows=rows))
    values = torch.linalg.svdvals(rows.sqrt()[:, None] * weight)
    bound = (values[5:].square().sum() / values.square().sum()).sqrt()
    assert Metric(rows=rows).error(weight - factors["left"] @ factors["right"], weight) == pytest.approx(
        float(bound), abs=1e-9
    )


@pytest.mark.parametrize(
    "form",
    [LowRank(rank=7), BlockLowRank(rank=7), Kronecker(right=(2, 3), terms=2), Kronecker(left=(4, 3), terms=3, scaled=True)],
    ids=str,
)
def test_white_inputs_make_the_least_squares_start_a_fixed_point(form, weight):
    form = form.resolve(tuple(weight.shape))
    start = form.decompose(weight)[0]
    identity = Metric(torch.eye(weight.shape[1], dtype=torch.float64))
    factors, _ = fit_weighted(form, start, weight, identity)
    assert torch.allclose(form.to_dense(factors, weight.shape), form.to_dense(start, weight.shape), atol=1e-10)


@pytest.mark.parametrize("form", [*HALF[1:], Kronecker(left=(4, 3), terms=3, scaled=True)], ids=str)
def test_other_forms_go_downhill(form, weight):
    form, second = form.resolve(tuple(weight.shape)), uneven(weight.shape[1])
    start = form.decompose(weight)[0]
    factors, how = fit_weighted(form, start, weight, Metric(second), steps=100)
    before, after = (Metric(second).error(weight - form.to_dense(f, weight.shape), weight) for f in (start, factors))
    assert after < 0.9 * before
    ways = {Kronecker: "alternating", BlockLowRank: "alternating", TensorRing: "gradient"}
    assert how == ways.get(type(form), "sweeps")


def test_alternation_never_goes_uphill_and_agrees_with_plain_least_squares(weight):
    form = Kronecker(right=(2, 3), terms=2).resolve(tuple(weight.shape))
    second, start = uneven(weight.shape[1]), form.decompose(weight)[0]
    errors = []
    for sweeps in range(8):
        factors, _ = fit_weighted(form, start, weight, Metric(second), steps=sweeps) if sweeps else (start, "")
        errors.append(Metric(second).error(weight - form.to_dense(factors, weight.shape), weight))
    assert errors == sorted(errors, reverse=True)
    root = torch.linalg.cholesky(second)
    # the last half step solved for right: the same problem as one tall least-squares system
    basis = torch.eye(form.terms * 6, dtype=torch.float64).reshape(-1, form.terms, 2, 3)
    columns = [(form.to_dense({"left": factors["left"], "right": b}, weight.shape) @ root).flatten() for b in basis]
    target = (weight @ root).flatten()
    best = torch.stack(columns, 1) @ torch.linalg.lstsq(torch.stack(columns, 1), target[:, None]).solution[:, 0]
    assert float((target - best).norm() / target.norm()) == pytest.approx(errors[-1], rel=1e-9)


@pytest.mark.parametrize("form", [LowRank(rank=6), BlockLowRank(rank=6)], ids=str)
def test_a_table_with_two_uses_is_fitted_to_both(form):
    weight, rows = torch.randn(24, 36, dtype=torch.float64), torch.rand(24, dtype=torch.float64)
    both = Metric(uneven(36), rows)
    start = form.decompose(weight)[0]
    factors, how = fit_weighted(form, start, weight, both, steps=200)
    scaled = both.relative_to(weight)
    before, after = (scaled.error(weight - form.to_dense(f, weight.shape), weight) for f in (start, factors))
    assert how == "gradient"
    assert after < before


def test_shrinkage_leads_from_the_text_to_the_identity():
    x = torch.randn(50, 8, dtype=torch.float64) * torch.arange(1, 9)
    text = Moments(50, x.mean(0), x.T @ x / 50)
    bare = fit_metric([text], shrink=0).second
    assert torch.allclose(bare, text.second, rtol=1e-4)
    noisy = fit_metric([text], shrink=1e9).second
    assert torch.allclose(noisy / noisy[0, 0], torch.eye(8, dtype=torch.float64), atol=1e-6)
    shift = fit_metric([text], centered=True).second - fit_metric([text]).second
    assert torch.allclose(shift - torch.diag(shift.diagonal()), -torch.outer(text.mean, text.mean).fill_diagonal_(0))


# --- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "form"),
    [*((f, HALF[0]) for f in CONFIGS), *(("llama", f) for f in HALF[1:]), ("gpt2", HALF[3])],
    ids=str,
)
def test_no_layer_gets_worse_and_the_teacher_is_untouched(family, form):
    student, teacher = pair(family, form)
    before = copy.deepcopy(teacher.state_dict())
    fits = fit_layers_(student, teacher, WINDOWS, held_out=HELD, steps=8)
    assert len(fits) == sum(isinstance(m, FactorizedLinear) for m in student.modules())
    assert all(fit.after <= fit.before for fit in fits)
    assert sum(fit.after for fit in fits) < 0.98 * sum(fit.before for fit in fits)
    assert all(fit.held_after is not None and fit.tokens == WINDOWS.numel() for fit in fits)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), teacher.state_dict().values()))
    assert hooks(teacher) == hooks(student) == 0


@pytest.mark.parametrize("form", ORDERED, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_orders_stay_and_the_factors_are_fitted_in_them(family, form, tmp_path):
    student, teacher = pair(family, form, "down", "embedding")
    orders = {n: b.clone() for n, b in student.named_buffers() if n.endswith("_order")}
    assert orders
    first = fit_layers_(student, teacher, WINDOWS, held_out=HELD, steps=8, out=tmp_path)
    assert all(fit.after < fit.before for fit in first)
    assert all(torch.equal(order, student.get_buffer(name)) for name, order in orders.items())
    for fit in first:  # the row's number is that of the layer as it stands, orders and all
        dense, layer = teacher.get_submodule(fit.module.split(", ")[0]), student.get_submodule(fit.module.split(", ")[0])
        weight = weight_of(dense).detach()
        error = (weight - layer.weight.detach()).norm() / weight.norm()
        assert fit.frobenius_after == pytest.approx(float(error), rel=1e-8)
    again, _ = pair(family, form, "down", "embedding")
    assert [fit.after for fit in fit_layers_(again, teacher, WINDOWS, held_out=HELD, steps=8, out=tmp_path)] == [
        fit.after for fit in first
    ]
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("form", FULL, ids=str)
def test_full_rank_stays_exact(form):
    student, teacher = pair("gpt2", form)
    fits = fit_layers_(student, teacher, WINDOWS)
    assert all(fit.method == "kept" and fit.after < 1e-7 for fit in fits)
    with torch.no_grad():
        assert torch.allclose(student(HELD).logits, teacher(HELD).logits, atol=1e-8)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_reported_errors_are_those_of_the_layers_outputs(family):
    """The row's number against the outputs themselves, bias and Conv1D included."""
    student, teacher = pair(family, LowRank(kept=0.4), "down")
    fit = fit_layers_(student, teacher, WINDOWS, held_out=HELD)[1]
    for windows, value in ((WINDOWS, fit.after), (HELD, fit.held_after)):
        x, dense = inputs(teacher, fit.module, windows), teacher.get_submodule(fit.module)
        bias = 0 if dense.bias is None else dense.bias
        missed = (dense(x) - student.get_submodule(fit.module)(x)).norm()
        assert value == pytest.approx(float(missed.detach() / (dense(x) - bias).detach().norm()), rel=1e-8)


def test_a_fitted_bias_makes_the_mean_output_right():
    student, teacher = pair("gpt2", LowRank(rank=3), "up")
    name = fit_layers_(student, teacher, WINDOWS)[0].module
    x = inputs(teacher, name, WINDOWS)
    gap = (teacher.get_submodule(name)(x) - student.get_submodule(name)(x)).mean(0).detach()
    assert float(gap.abs().max()) < 1e-10


def test_bands_of_a_fused_matrix_and_tied_tables():
    student, teacher = pair("gpt2", LowRank(kept=0.5), "qkv", split=3)
    fits = fit_layers_(student, teacher, WINDOWS)
    assert all(fit.after < fit.before for fit in fits)
    student, teacher = pair("gpt2", Kronecker(right=(1, 4)), "embedding")
    (fit,) = fit_layers_(student, teacher, WINDOWS, steps=30)
    assert fit.module == "transformer.wte, lm_head"
    assert fit.after < fit.before
    assert student.transformer.wte.left is student.lm_head.left
    assert student.lm_head.error == student.transformer.wte.error == fit.frobenius_after


def test_fewer_tokens_than_inputs_fit_that_text_exactly_and_others_badly_without_shrinkage():
    held = {}
    for shrink in (0.0, 1.0):
        student, teacher = pair("llama", LowRank(rank=16), "down", dtype=torch.float32)
        fit = fit_layers_(student, teacher, WINDOWS[:1, :10], held_out=HELD, shrink=shrink)[0]  # 10 tokens, 48 inputs
        held[shrink] = fit.held_after
        assert (fit.after < 1e-2) == (shrink == 0)
    assert held[1.0] < held[0.0]


def test_students_share_moments_that_were_collected_once():
    fits = []
    for shared in (False, True):
        student, teacher = pair("llama", LowRank(kept=0.5), "mlp")
        names = [name for name, m in student.named_modules() if isinstance(m, FactorizedLinear)]
        texts = [second_moments(teacher, text, names) if shared else text for text in (WINDOWS, HELD)]
        fits.append([(f.after, f.held_after) for f in fit_layers_(student, teacher, texts[0], held_out=texts[1])])
    assert fits[0] == fits[1]
    student, teacher = pair("llama", LowRank(kept=0.5), "mlp")
    with pytest.raises(ValueError, match=r"without model.layers.1.mlp.down_proj \(1 missing\)"):
        fit_layers_(student, teacher, {name: m for name, m in texts[0].items() if name != names[-1]})


def test_memory_limit_changes_passes_and_not_results():
    fits = []
    for limit in (1.0, 1e-9):
        student, teacher = pair("llama", LowRank(kept=0.5), "mlp")
        fits.append([f.after for f in fit_layers_(student, teacher, WINDOWS, memory_gb=limit)])
    assert fits[0] == pytest.approx(fits[1], rel=1e-12)


def test_half_precision_students_are_fitted_in_their_own_dtype():
    student, teacher = pair("llama", LowRank(kept=0.5), "mlp", dtype=torch.bfloat16)
    fits = fit_layers_(student, teacher, WINDOWS)
    assert all(fit.after < fit.before for fit in fits)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    reference, teacher = pair("llama", MPO(order=2, kept=0.5), "mlp")
    fit_layers_(reference, teacher, WINDOWS, steps=10)
    student, _ = pair("llama", MPO(order=2, kept=0.5), "mlp")
    start, fit, calls = copy.deepcopy(student.state_dict()), tnlib.local.fit_job, []

    def killed(job, **options):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(job.name)
        return fit(job, **options)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one layer at a time, so that exactly three are done
    monkeypatch.setattr(tnlib.local, "fit_job", killed)
    with pytest.raises(KeyboardInterrupt):
        fit_layers_(student, teacher, WINDOWS, steps=10, out=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(start.values(), student.state_dict().values()))
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    calls.clear()
    monkeypatch.setattr(tnlib.local, "fit_job", lambda job, **options: calls.append(job.name) or fit(job, **options))
    fits = fit_layers_(student, teacher, WINDOWS, steps=10, out=tmp_path)
    torch.set_num_threads(threads)
    assert len(calls) == 3
    assert len(fits) == 6
    assert all(torch.equal(a, b) for a, b in zip(reference.state_dict().values(), student.state_dict().values()))
    json.dumps([vars(fit) for fit in fits])
    student, _ = pair("llama", MPO(order=2, kept=0.5), "mlp")
    with pytest.raises(ValueError, match="is of another run"):
        fit_layers_(student, teacher, HELD, steps=10, out=tmp_path)


def test_wrong_teachers_are_refused():
    student, teacher = pair("llama", LowRank(rank=4), "mlp")
    with pytest.raises(ShapeError, match="the student has no factorized layer"):
        fit_layers_(teacher, student, WINDOWS)
    with pytest.raises(ShapeError, match=r"module model.layers.0.mlp.gate_proj: the teacher has no dense layer"):
        fit_layers_(student, copy.deepcopy(student), WINDOWS)
    student.model.norm.weight = teacher.model.norm.weight
    with pytest.raises(ValueError, match=r"share 1 parameters, model\.norm\.weight among them"):
        fit_layers_(student, teacher, WINDOWS)
