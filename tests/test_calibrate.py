"""Calibration: equals one pass over the whole model, resumes, is refused for another run, joins, and feeds factorize_."""

import copy
import importlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from tiny import CONFIGS, HALF, WINDOWS, logits, recipe, tiny

from tnlib.calibrate import calibrate, calibrate_parts, join_calibrations, load_calibration
from tnlib.gradients import with_gradients
from tnlib.local import fit_layers_
from tnlib.low_rank import LowRank
from tnlib.metric import Metric
from tnlib.moments import second_moments
from tnlib.plan import plan
from tnlib.recipe import Recipe, RecipeError, Rule
from tnlib.sequential import factorize_in_sequence_
from tnlib.shapes import ShapeError
from tnlib.surgery import factorize_
from tnlib.tt_matrix import MPO
from tnlib.walk import Walk

STACKED = [family for family in CONFIGS if not family.startswith("t5")]


def same(one, other):
    assert set(one) == set(other)
    assert [n for n in one if one[n] is None] == [n for n in one if other[n] is None]
    return all(
        torch.allclose(getattr(one[n], part), getattr(other[n], part), rtol=1e-9, atol=1e-12)
        for n in one
        if one[n] is not None
        for part in ("mean", "second", "counts")
        if getattr(one[n], part) is not None
    )


@pytest.mark.parametrize("family", STACKED)
def test_a_walk_ends_where_the_model_does(family):
    model = tiny(family).train()
    walk = Walk(model, WINDOWS, batch=5)
    for number in range(len(walk.blocks)):
        walk.through(number, lambda at, run: walk.keep(at, 0, run()))
    model.eval()
    with torch.no_grad():
        whole = model.base_model(WINDOWS, output_hidden_states=True)
        last = whole.hidden_states[-1]  # some families put their last norm behind it
    found = torch.cat([states[0] for states in walk.states])
    norm = next(
        (m for n, m in model.base_model.named_modules() if n in ("norm", "ln_f", "decoder.final_layer_norm")), None
    )
    with torch.no_grad():
        assert torch.allclose(norm(found) if norm else found, last)
    assert not any("forward" in block.__dict__ for block in walk.blocks)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_calibration_equals_one_pass_over_the_whole_model(family, tmp_path):
    model, wanted = tiny(family).train(), recipe(LowRank(rank=2), "linear", "embedding")
    modes = [m.training for m in model.modules()]
    found = calibrate(model, WINDOWS, wanted, batch=5, out=tmp_path)
    names = list(found)
    whole = second_moments(model, WINDOWS, names, batch=5, missing=True)
    assert same(found, whole)
    assert same(calibrate(model, WINDOWS, wanted, batch=5), whole)
    assert same(load_calibration(tmp_path), whole)
    assert found.tokens == WINDOWS.numel()
    assert [m.training for m in model.modules()] == modes
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 0


def test_inputs_that_are_shared_are_held_once():
    found = calibrate(tiny("llama"), WINDOWS, recipe(LowRank(rank=2)))
    assert found["model.layers.0.self_attn.q_proj"] is found["model.layers.0.self_attn.v_proj"]
    assert "14 modules (8 distinct inputs)" in repr(found)


def test_a_calibration_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    model, wanted, done = tiny("llama"), recipe(LowRank(rank=2)), []
    module = importlib.import_module("tnlib.calibrate")  # tn.calibrate is the function
    write = module.write_atomic

    def stopped(path, content):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(path.name)
        write(path, content)

    monkeypatch.setattr(module, "write_atomic", stopped)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, WINDOWS, wanted, out=tmp_path)
    with pytest.raises(ValueError, match=r"calibration.json is missing.*goes on where it was stopped"):
        load_calibration(tmp_path)
    monkeypatch.setattr(module, "write_atomic", lambda path, content: (done.append(path.name), write(path, content)))
    found = calibrate(model, WINDOWS, wanted, out=tmp_path)
    assert done == ["block-000.safetensors", "block-001.safetensors", "calibration.json"]
    assert same(found, second_moments(model, WINDOWS, list(found)))
    with pytest.raises(ValueError, match="of another model, text or recipe"):
        calibrate(model, WINDOWS[:4], wanted, out=tmp_path)


def test_parts_of_a_text_join_to_the_whole(tmp_path):
    wanted = recipe(LowRank(rank=2), "mlp", "embedding")
    whole = calibrate(tiny("gpt2"), WINDOWS, wanted)
    parts = [calibrate(tiny("gpt2"), piece, wanted) for piece in WINDOWS.split(5)]
    joined = join_calibrations(parts)
    assert same(joined, whole)
    assert joined.tokens == whole.tokens
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = calibrate_parts(pool, partial(tiny, "gpt2"), WINDOWS, wanted, tmp_path, parts=2)
    assert same(found, whole)
    with pytest.raises(ValueError, match="not all the same ones"):
        join_calibrations([whole, calibrate(tiny("gpt2"), WINDOWS, recipe(LowRank(rank=2), "mlp"))])


def test_an_offloaded_model_is_calibrated_a_block_at_a_time(tmp_path):
    from accelerate import cpu_offload, disk_offload

    wanted = recipe(LowRank(rank=2))
    whole = calibrate(tiny("llama"), WINDOWS, wanted)
    cpu = cpu_offload(tiny("llama"), execution_device="cpu")
    assert same(calibrate(cpu, WINDOWS, wanted), whole)
    disk = disk_offload(tiny("llama"), tmp_path / "weights", execution_device="cpu")
    assert same(calibrate(disk, WINDOWS, wanted, out=tmp_path / "stats"), whole)


# --- what factorize_ makes of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", HALF, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_factorize_with_stats_is_factorize_and_fit_layers(family, form, tmp_path):
    teacher, wanted = tiny(family), recipe(form, "mlp")
    stats = calibrate(teacher, WINDOWS, wanted)
    plain, direct, kept = (copy.deepcopy(teacher) for _ in range(3))
    factorize_(plain, wanted)
    rows = fit_layers_(plain, teacher, stats)
    factorize_(direct, wanted, stats)
    for _ in range(2):
        again = copy.deepcopy(teacher)
        factorize_(again, wanted, stats, out=tmp_path)  # the second time all is read
        kept = again
    wished = plain.state_dict()
    for model in (direct, kept):
        assert all(torch.equal(tensor, wished[name]) for name, tensor in model.state_dict().items())
        assert sum(p.numel() for p in model.parameters()) == plan(teacher, wanted).total
    layer = direct.get_submodule(rows[0].module)
    assert layer.output_error == rows[0].after <= rows[0].before
    with pytest.raises(ValueError, match="another weight, rule, seed or calibration"):
        factorize_(copy.deepcopy(teacher), wanted, calibrate(teacher, WINDOWS[:6], wanted), out=tmp_path)


def test_a_tied_table_is_fitted_to_both_its_uses():
    teacher, wanted = tiny("gpt2"), recipe(LowRank(rank=6), "embedding")
    stats = calibrate(teacher, WINDOWS, wanted)
    plain, direct = copy.deepcopy(teacher), copy.deepcopy(teacher)
    factorize_(plain, wanted)
    fit_layers_(plain, teacher, stats)
    factorize_(direct, wanted, stats)
    assert torch.equal(logits(direct, WINDOWS), logits(plain, WINDOWS))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_every_use_of_a_table_is_calibrated_whatever_becomes_of_the_head(family):
    for head in ("tied", "dense"):
        model = tiny(family)
        wanted = Recipe(name="test", rules=(Rule(where="embedding", form=LowRank(rank=6), head=head),))
        factorize_(model, wanted, calibrate(model, WINDOWS, wanted))
        assert sum(p.numel() for p in model.parameters()) == plan(tiny(family), wanted).total


def test_gradients_ask_for_a_causal_model_and_finite_numbers():
    bert, model, wanted = tiny("bert"), tiny("llama"), recipe(LowRank(rank=2), "mlp")
    with pytest.raises(ValueError, match="got BertForMaskedLM; needed a causal language model"):
        with_gradients(calibrate(bert, WINDOWS, wanted), bert, WINDOWS)
    stats = calibrate(model, WINDOWS, wanted)
    with torch.no_grad():
        model.lm_head.weight[3] = float("inf")
    with pytest.raises(ValueError, match="are NaN or infinite"):
        with_gradients(stats, model, WINDOWS)


def test_stats_that_lack_a_module_are_refused_before_any_work():
    model = tiny("llama")
    stats = calibrate(model, WINDOWS, recipe(LowRank(rank=2), "mlp"))
    with pytest.raises(ValueError, match=r"without model.layers.0.self_attn.q_proj \(8 missing\)"):
        factorize_(model, recipe(LowRank(rank=2)), stats)


# --- in sequence ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aim", ["dense", "own"])
@pytest.mark.parametrize("family", STACKED)
def test_in_sequence_full_rank_changes_nothing(family, aim):
    model = tiny(family)
    before = logits(model, WINDOWS)
    factorize_in_sequence_(
        model, WINDOWS, recipe(LowRank(rank=10**6), "linear" if family != "bert" else "mlp"), aim=aim
    )
    assert torch.allclose(logits(model, WINDOWS), before, rtol=1e-6, atol=1e-7)


def test_in_sequence_own_aim_fits_each_layer_to_what_arrives():
    teacher, wanted = tiny("llama"), recipe(LowRank(rank=4), "mlp")
    student = copy.deepcopy(teacher)
    factorize_in_sequence_(student, WINDOWS, wanted, aim="own", fit={"shrink": 0.0})
    # by hand: the last down-projection, fitted to what enters it once all before it is compressed
    name = "model.layers.1.mlp.down_proj"
    arrives = second_moments(student, WINDOWS, [name])
    by_hand = copy.deepcopy(teacher)
    only = Recipe(name="one", rules=(Rule(where=name, form=LowRank(rank=4)),))
    factorize_(by_hand, only, arrives, fit={"shrink": 0.0})
    assert torch.allclose(student.get_submodule(name).weight, by_hand.get_submodule(name).weight, rtol=1e-6, atol=1e-8)


def test_in_sequence_outputs_of_the_blocks_come_nearer_than_one_by_one():
    teacher, wanted = tiny("gpt2"), recipe(LowRank(rank=6), "mlp")
    stats, missed = calibrate(teacher, WINDOWS, wanted), {}
    with torch.no_grad():
        target = teacher.transformer(WINDOWS).last_hidden_state
    for aim in ("at once", "own", "dense"):
        student = copy.deepcopy(teacher)
        if aim == "at once":
            factorize_(student, wanted, stats)
        else:
            factorize_in_sequence_(student, WINDOWS, wanted, aim=aim)
        with torch.no_grad():
            missed[aim] = float((student.transformer(WINDOWS).last_hidden_state - target).square().sum())
    assert missed["dense"] < missed["at once"]
    assert missed["dense"] < missed["own"]


def test_in_sequence_an_interruption_leaves_the_model_and_the_next_call_goes_on(tmp_path, monkeypatch):
    from tnlib import build

    wanted, plain = recipe(MPO(order=2, kept=0.5), "mlp"), tiny("gpt2")
    factorize_in_sequence_(plain, WINDOWS, wanted, aim="dense")
    fit, fitted = build.fit_job, []

    def stopped(job, *args, **kwargs):
        if len(fitted) == 2:
            fitted.append(None)
            raise KeyboardInterrupt
        fitted.append(job.name)
        return fit(job, *args, **kwargs)

    model = tiny("gpt2")
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(build, "fit_job", stopped)
    with pytest.raises(KeyboardInterrupt):
        factorize_in_sequence_(model, WINDOWS, wanted, aim="dense", out=tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    factorize_in_sequence_(model, WINDOWS, wanted, aim="dense", out=tmp_path)
    assert len([name for name in fitted if name]) == 4
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="of another model, text, recipe or setting"):
        factorize_in_sequence_(tiny("gpt2"), WINDOWS, wanted, aim="own", out=tmp_path)


def test_in_sequence_refuses_what_is_not_in_a_block():
    with pytest.raises(RecipeError, match=r"lm_head|wte.*not in one of the blocks"):
        factorize_in_sequence_(tiny("gpt2"), WINDOWS, recipe(LowRank(rank=2), "embedding"))
    with pytest.raises(ShapeError, match=r"factorize_in_sequence_: .*needed exactly one"):
        factorize_in_sequence_(tiny("t5"), WINDOWS, recipe(LowRank(rank=2), "mlp"))
    with pytest.raises(ValueError, match="needed 'dense' or 'own'"):
        factorize_in_sequence_(tiny("gpt2"), WINDOWS, recipe(LowRank(rank=2), "mlp"), aim="teacher")


# --- the other side ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_those_of_the_gathered_outputs(family):
    model, wanted = tiny(family), recipe(LowRank(rank=2), "mlp")
    stats = calibrate(model, WINDOWS, wanted)
    found = with_gradients(stats, model, WINDOWS, batch=5)
    name = next(iter(stats))
    outputs = []
    with model.get_submodule(name).register_forward_hook(lambda m, a, y: (y.retain_grad(), outputs.append(y))[0]):
        scores = model(WINDOWS).logits[:, :-1]
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), WINDOWS[:, 1:].flatten(), reduction="sum").backward()
    g = outputs[0].grad.flatten(0, 1)
    assert torch.allclose(found[name].gradients, g.T @ g / WINDOWS.numel(), rtol=1e-5, atol=1e-10)
    assert all(p.requires_grad for p in model.parameters())
    assert sum(len(m._forward_hooks) for m in model.modules()) == 0


@pytest.mark.parametrize("form", HALF, ids=str)
def test_weighing_both_sides_lowers_the_error_that_is_weighed(form):
    model, wanted, missed = tiny("llama"), recipe(form, "mlp"), []
    stats = calibrate(model, WINDOWS, wanted)
    both = with_gradients(stats, model, WINDOWS)
    name = "model.layers.1.mlp.up_proj"
    metric = Metric(both[name].second, outputs=both[name].gradients)
    for given in (stats, both):
        student = copy.deepcopy(model)
        factorize_(student, wanted, given, fit={"steps": 100})
        weight = model.get_submodule(name).weight.detach()
        missed.append(metric.error(weight - student.get_submodule(name).weight.detach(), weight))
    assert missed[1] < missed[0]


def test_in_sequence_gradients_are_weighed_along():
    teacher, wanted = tiny("llama"), recipe(LowRank(rank=4), "mlp")
    felt = with_gradients(calibrate(teacher, WINDOWS, wanted), teacher, WINDOWS)
    name, missed = "model.layers.0.mlp.up_proj", []
    metric = Metric(felt[name].second, outputs=felt[name].gradients)  # of the first matrices, which nothing precedes
    for given in (None, felt):
        student = copy.deepcopy(teacher)
        factorize_in_sequence_(student, WINDOWS, wanted, given, fit={"shrink": 0.0})
        weight = teacher.get_submodule(name).weight.detach()
        missed.append(metric.error(weight - student.get_submodule(name).weight.detach(), weight))
    assert missed[1] < 0.99 * missed[0]


@pytest.mark.parametrize("aim", ["dense", "own"])
def test_in_sequence_passes_through_blocks_without_claims(aim):
    model = tiny("qwen3")
    only = Recipe(name="one", rules=(Rule(where="mlp", form=LowRank(rank=3), blocks=(1,)),))
    by_hand = copy.deepcopy(model)
    factorize_(by_hand, only, calibrate(model, WINDOWS, only))
    factorize_in_sequence_(model, WINDOWS, only, aim=aim)
    name = "model.layers.1.mlp.up_proj"  # nothing before it is compressed
    assert torch.allclose(model.get_submodule(name).weight, by_hand.get_submodule(name).weight, rtol=1e-6, atol=1e-9)
