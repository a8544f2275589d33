"""Rivals: equal to what they should equal, and no more zeros than asked for."""

import copy

import pytest
import torch
from tiny import logits, tiny

from tnlib.baselines import asvd, factorize_by_, prune_, svd_llm
from tnlib.calibrate import calibrate
from tnlib.kronecker import Kronecker
from tnlib.low_rank import LowRank, low_rank
from tnlib.moments import Moments
from tnlib.recipe import Recipe, RecipeError, Rule
from tnlib.shapes import ShapeError
from tnlib.surgery import factorize_

WINDOWS = torch.randint(2, 90, (12, 16), generator=torch.Generator().manual_seed(0))


def recipe(form):
    return Recipe(name="test", rules=(Rule(where="mlp", form=form),))


def moments(width=24, tokens=400):
    x = torch.randn(tokens, width, dtype=torch.float64) * torch.logspace(0, -2, width, dtype=torch.float64)
    return Moments(tokens, x.mean(0), x.T @ x / tokens)


def test_scaling_by_nothing_is_the_plain_truncated_svd():
    weight = torch.randn(16, 24, dtype=torch.float64)
    found, plain = asvd(weight, moments(), 5, alpha=0.0), low_rank(weight, 5)
    assert torch.allclose(found["left"] @ found["right"], plain.left @ plain.right)


def test_scaling_lowers_the_error_of_outputs():
    weight, seen = torch.randn(16, 24, dtype=torch.float64), moments()
    errors = []
    for alpha in (0.0, 0.5):
        found = asvd(weight, seen, 5, alpha)
        gap = weight - found["left"] @ found["right"]
        errors.append(float((gap @ seen.second * gap).sum()))
    assert errors[1] < errors[0]


def test_our_whitened_low_rank_is_svd_llms():
    model, wanted = tiny("llama"), recipe(LowRank(rank=5))
    stats = calibrate(model, WINDOWS, wanted)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    factorize_(ours, wanted, stats, fit={"shrink": 0.0})
    factorize_by_(theirs, wanted, stats, svd_llm)
    assert torch.allclose(logits(ours, WINDOWS), logits(theirs, WINDOWS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kept", "pattern", "wanted"), [(0.5, None, 12), (0.8, None, 19), (None, (2, 4), 12), (None, (1, 3), 8)])
@pytest.mark.parametrize("wanda", [False, True])
def test_every_row_keeps_what_was_asked_for(kept, pattern, wanted, wanda):
    model = tiny("gpt2")
    name = "transformer.h.0.mlp.c_fc"
    stats = calibrate(model, WINDOWS, recipe(LowRank(rank=2))) if wanda else None
    before = model.get_submodule(name).weight.T.clone()
    prune_(model, [name], kept, stats, pattern)
    after = model.get_submodule(name).weight.T
    assert set((after != 0).sum(1).tolist()) == {wanted}
    assert torch.equal(after[after != 0], before[after != 0])
    if pattern:
        assert set((after.reshape(len(after), -1, pattern[1]) != 0).sum(-1).flatten().tolist()) == {pattern[0]}


def test_wanda_spares_the_loud_channels():
    model = tiny("llama")
    name = "model.layers.0.mlp.down_proj"
    second = torch.eye(48, dtype=torch.float64)
    second[7, 7] = 1e12
    prune_(model, [name], 0.25, {name: Moments(10, torch.zeros(48), second)})
    assert bool((model.get_submodule(name).weight[:, 7] != 0).all())


def test_what_does_not_fit_is_refused():
    model = tiny("llama")
    stats = calibrate(model, WINDOWS, recipe(LowRank(rank=2)))
    with pytest.raises(RecipeError, match="needed LowRank rules"):
        factorize_by_(model, recipe(Kronecker(right=(2, 2))), stats, asvd)
    with pytest.raises(ShapeError, match="needed a multiple of 5"):
        prune_(model, ["model.layers.0.mlp.up_proj"], pattern=(2, 5))
    for given in ({}, {"kept": 0.5, "pattern": (2, 4)}, {"kept": 1.5}):
        with pytest.raises(ShapeError, match=r"needed (one of the two|a share)"):
            prune_(model, ["model.layers.0.mlp.up_proj"], **given)
    embedding = Recipe(name="test", rules=(Rule(where="embedding", form=LowRank(rank=2)),))
    with pytest.raises(RecipeError, match="for Embedding; needed LowRank rules for linear layers"):
        factorize_by_(model, embedding, stats, asvd)
