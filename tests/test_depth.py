"""Whole blocks removed: sizes, function, and what is refused."""

import pytest
import torch
from tiny import logits, tiny

from tnlib.depth import drop_blocks
from tnlib.shapes import ShapeError

IDS = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "opt", "bert"])
def test_nothing_to_drop_is_the_same_model(family):
    model = tiny(family)
    assert logits(drop_blocks(model, count(model)), IDS).equal(logits(model, IDS))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_smaller_model_runs_generates_and_shares_nothing(family):
    model = tiny(family)
    config = model.config.__class__(**{**model.config.to_dict(), "num_hidden_layers": 6})
    deep = type(model)(config).to(torch.float64).eval()
    wanted = count(deep) - 2 * sum(p.numel() for p in _blocks(deep)[0].parameters())
    small = drop_blocks(deep, wanted)
    assert count(small) == wanted
    assert (small.config.num_hidden_layers, deep.config.num_hidden_layers) == (4, 6)
    for here, there in zip((0, 1, 2, 3), (0, 2, 3, 5)):
        for ours, theirs in zip(_blocks(small)[here].parameters(), _blocks(deep)[there].parameters()):
            assert ours.equal(theirs)
            assert ours is not theirs
    cached = small.generate(IDS, max_new_tokens=4, do_sample=False)
    assert cached.equal(small.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False))


def _blocks(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


@pytest.mark.parametrize(("family", "words"), [("t5", "exactly one"), ("gpt2", "at least two")])
def test_what_is_refused(family, words):
    model = tiny(family)
    with pytest.raises(ShapeError, match=words):
        drop_blocks(model, 100)
