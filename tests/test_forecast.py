"""Forecasts against what a training step really holds."""

import pytest
import torch
from tiny import tiny

import tnlib as tn
from tnlib.forecast import forecast, from_parameters

AMOUNTS = {"tokens": 10_000, "batch": 2, "context": 16, "tokens_per_second": 100.0}


def recipe_of(**heal):
    rule = tn.Rule(where="mlp", form=tn.LowRank(kept=0.5))
    return tn.Recipe(name="half", rules=(rule,), heal=tn.Heal(**heal))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_weights_gradients_and_moments_are_what_a_step_holds(family):
    model = tiny(family, torch.float32)
    predicted = forecast(model, recipe_of(), **AMOUNTS).memory
    tn.factorize_(model, recipe_of())
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 96, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    parameters = list(model.parameters())
    assert predicted["weights"] == sum(p.nbytes for p in parameters)
    assert predicted["gradients"] == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    moments = [v for state in optimizer.state.values() for v in state.values() if v.numel() > 1 or v.dim() > 0]
    assert predicted["AdamW"] == sum(v.nbytes for v in moments)
    assert predicted["teacher"] == 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_activations_and_logits_are_of_the_measured_size(family):
    model, kept, own = tiny(family, torch.float32), {}, set()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 96, (2, 16))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    predicted = forecast(model, recipe_of(), **AMOUNTS).memory
    assert 0.5 < (predicted["activations"] + predicted["logits"]) / sum(kept.values()) < 2


def test_hours_steps_and_flops():
    model = tiny("gpt2")
    found = forecast(model, recipe_of(), accumulate=4, **AMOUNTS)
    assert found.hours == pytest.approx(100 / 3600)
    assert found.steps == 79  # 10,000 tokens in steps of 128
    assert found.flops == 6 * 10_000 * tn.plan(model, recipe_of()).total
    taught = forecast(model, recipe_of(losses=(("logits", 1.0),)), accumulate=4, **AMOUNTS)
    dense = sum(p.numel() for p in model.parameters())
    assert taught.flops - found.flops == 2 * 10_000 * dense
    assert taught.memory["teacher"] == 4 * dense
    assert "10,000 tokens in 79 steps (about 43 kB of text); 1.7 minutes" in str(found)


def test_a_papers_run_is_known_without_weights():
    """Krony-PT: 3 epochs of OpenWebText at 122,880 tokens a step."""
    found = forecast(
        tn.skeleton("gpt2"), tn.papers["krony-81m"], tokens=27_120_000_000, batch=24, accumulate=5, context=1024,
        tokens_per_second=150_000, precision="bf16",
    )  # fmt: skip
    assert found.parameters == 81_972_576
    assert found.steps == 220_704
    assert found.hours == pytest.approx(50.2, rel=1e-2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 0}, "tokens=0"),
        ({"tokens_per_second": 0.0}, "tokens_per_second"),
        ({"precision": "fp8"}, "fp32, bf16"),
    ],
)
def test_what_forecast_refuses(change, words):
    with pytest.raises(ValueError, match=words):
        forecast(tiny("gpt2"), recipe_of(), **(AMOUNTS | change))


def test_from_parameters_reads_what_the_notebooks_declare():
    given = {"MODEL": "gpt2", "RECIPE": "krony-81m", "HEAL_TOKENS": 122_880_000, "HEAL_BATCH": 24, "HEAL_ACCUMULATE": 5}
    given |= {"CONTEXT": 1024, "TOKENS_PER_SECOND": 100_000.0, "PRECISION": "bf16", "SEED": 0}
    found = from_parameters(given)
    assert (found.steps, found.plan.recipe) == (1000, "krony-81m")
    scaled = from_parameters(given | {"MODEL": "smollm2-135m"})
    assert scaled.parameters < 134_515_008
    assert from_parameters({"SEED": 0}) is None
