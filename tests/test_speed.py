"""compare_speed: whose turn it is, what a step does, and that the models are as they were. No claim on time itself."""

import pytest
import torch
from tiny import tiny

from tnlib import speed
from tnlib.cost import Latency
from tnlib.speed import compare_speed

pytestmark = pytest.mark.usefixtures("one_thread")


def state(model):
    """Weights, gradients and modes."""
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [p.detach().clone() for p in model.parameters()], grads, [module.training for module in model.modules()]


def test_models_are_as_before_and_the_first_is_the_measure():
    models = {"dense": tiny("llama"), "other": tiny("gpt2")}
    models["other"].train().transformer.h[0].eval()  # frozen by the user
    models["other"](torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    before = {name: state(model) for name, model in models.items()}
    found = compare_speed(models, context=16, new_tokens=4, repeats=3, batch=2)
    for name, model in models.items():
        for was, now in zip(before[name][:2], state(model)[:2]):
            assert all(b is None if a is None else torch.equal(a, b) for a, b in zip(was, now))
        assert before[name][2] == state(model)[2]
    for own in found.values():
        assert {measure: x.tokens for measure, x in own.items()} == {"train": 32, "prefill": 32, "decode": 8}
    for own in found["dense"].values():
        assert (own.ratio_low, own.ratio, own.ratio_high) == (1, 1, 1)
    for own in found["other"].values():
        assert own.time.repeats == 3
        assert own.tokens_per_second == pytest.approx(1e3 * own.tokens / own.time.median_ms)
        assert "the first model's speed" in str(own)


def test_what_a_step_runs():
    """Shapes that the model sees: training and prefill the context, decoding one token at a time on a growing cache."""
    model, seen = tiny("llama"), []
    model.model.register_forward_pre_hook(
        lambda _, args, given: seen.append((tuple(given["input_ids"].shape), torch.is_grad_enabled(), model.training)),
        with_kwargs=True,
    )
    compare_speed({"m": model}, context=10, new_tokens=3, repeats=2, warmup=1, measures=["train"])
    assert seen == [((1, 10), True, True)] * 3
    seen.clear()
    compare_speed({"m": model}, context=10, new_tokens=3, repeats=2, warmup=0, measures=["prefill", "decode"])
    step = [((1, 10), False, False)]
    assert seen == 2 * step + 2 * (step + 3 * [((1, 1), False, False)])


def test_turns_ratios_and_warmup(monkeypatch):
    """Times given: the machine is three times slower in the second round, and "b" always twice as fast."""
    log = []

    def steps(model, ids, new_tokens):
        def step():
            log.append(model)
            number = (len(log) - 1) // 2
            return (100 if number == 0 else 1 if number != 2 else 3) * (2.0 if model is a else 1.0)

        return step

    a, b = tiny("gpt2"), tiny("gpt2")
    monkeypatch.setitem(speed.STEPS, "prefill", steps)
    found = compare_speed({"a": a, "b": b}, context=8, repeats=4, warmup=1, measures=["prefill"])
    assert [model is a for model in log] == [True, False, False, True] * 2 + [True, False]
    assert found["a"]["prefill"].time == Latency.of([2.0, 6.0, 2.0, 2.0])  # without the warm-up
    fast = found["b"]["prefill"]
    assert (fast.ratio_low, fast.ratio, fast.ratio_high) == (2, 2, 2)
    assert fast.tokens_per_second == 8e3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"models": {}}, "0 models"),
        ({"repeats": 1}, "two repeats"),
        ({"measures": ["training"]}, "needed a model.*among train, prefill, decode"),
        ({"context": 60, "new_tokens": 8}, "model 'm'.*context 68, but the model has 64 positions"),
    ],
)
def test_what_it_refuses(more, said):
    with pytest.raises(ValueError, match=said):
        compare_speed(**{"models": {"m": tiny("gpt2")}, "context": 8, **more})
