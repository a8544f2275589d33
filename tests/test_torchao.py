"""use_torchao_: what it replaces, how far the outputs move, and what it says where torchao does not help."""

import sys

import pytest
import torch
from tiny import logits, tiny
from torch import nn

from tnlib.low_rank import LowRank
from tnlib.quant import QuantizeError
from tnlib.recipe import Recipe, Rule
from tnlib.surgery import factorize_
from tnlib.torchao_kernels import use_torchao_

IDS = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def factorized(form, where="mlp"):
    model = tiny("llama", torch.float32)
    factorize_(model, Recipe(name="t", rules=(Rule(where=where, form=form),)))
    return model


@pytest.mark.parametrize("dynamic", [False, True])
def test_two_thin_products_in_eight_bits(dynamic):
    pytest.importorskip("torchao")
    model = factorized(LowRank(rank=16))
    before, table = logits(model, IDS), model.model.embed_tokens.weight
    use_torchao_(model, dynamic=dynamic)
    after = logits(model, IDS)
    assert 0 < (after - before).norm() / before.norm() < 0.1  # 8 bits, several layers deep
    up, query = model.model.layers[0].mlp.up_proj, model.model.layers[0].self_attn.q_proj
    assert [tuple(part.weight.shape) for part in up] == [(16, 24), (48, 16)]
    assert type(query.weight).__name__ == "Int8Tensor"
    assert model.lm_head.weight is model.model.embed_tokens.weight is table  # tied, left alone


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    model = factorized(LowRank(rank=16))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(QuantizeError, match=r"torchao cannot be imported.*pip install .tnlib\[quant\]"):
        use_torchao_(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 4, "dynamic": True}])
def test_other_widths_are_refused(options):
    with pytest.raises(QuantizeError, match="needed bits=8, or bits=4 with dynamic=False"):
        use_torchao_(factorized(LowRank(rank=16)), **options)


def test_no_kernel_leaves_the_model_as_it_was():
    pytest.importorskip("torchao")
    model = factorized(LowRank(rank=16))
    before = logits(model, IDS)
    with pytest.raises(QuantizeError, match=r"no kernel for 4 bits on cpu in torch\.float32.*Use bits=8, or quantize_"):
        use_torchao_(model, bits=4)
    assert torch.equal(logits(model, IDS), before)


def test_nothing_to_cover():
    pytest.importorskip("torchao")
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(QuantizeError, match=r"neither LowRank layers nor nn\.Linear"):
        use_torchao_(model)
