"""LoRA beside compressed layers: starts as the model was, trains adapters only, goes to disk and back, and says why it cannot merge."""

import sys

import pytest
import torch
from tiny import logits, tiny

from tnlib.kronecker import Kronecker
from tnlib.low_rank import LowRank
from tnlib.peft_lora import register_peft_
from tnlib.quant import Quantize
from tnlib.quantize import quantize_
from tnlib.recipe import Recipe, Rule
from tnlib.surgery import densify_, factorize_
from tnlib.tensor_train import TensorTrain
from tnlib.tt_matrix import MPO

IDS = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(0))
FORMS = [LowRank(rank=6), Kronecker(right=(2, 2), terms=2, permute="both"), TensorTrain(order=2, max_rank=5), MPO(order=3, max_rank=6)]
TARGETS = {"llama": ["up_proj", "down_proj", "q_proj"], "gpt2": ["c_fc", "c_attn"]}  # the last one dense, or split


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def compressed(family="llama", form=FORMS[0], quantize=None):
    """A tiny model whose MLPs are factors; of GPT-2 also q, k, v, three forms in one layer."""
    model = tiny(family, torch.float32)
    rules = [Rule(where="mlp", form=form)]
    if family == "gpt2":
        rules.append(Rule(where="transformer.h.*.attn.c_attn", form=form, split=3))
    factorize_(model, Recipe(name="t", rules=tuple(rules)))
    if quantize is not None:
        quantize_(model, quantize)
    return model.eval()


def adapted(peft, model, **options):
    family = "gpt2" if hasattr(model, "transformer") else "llama"
    config = peft.LoraConfig(r=2, target_modules=TARGETS[family], **options)
    register_peft_(config)
    return peft.get_peft_model(model, config)


def train(model, steps=3):
    """A few steps on one batch. Returns: the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(input_ids=IDS).logits.flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_starts_as_the_base_and_trains_adapters_alone(peft, family, form):
    model = compressed(family, form)
    before, frozen = logits(model, IDS), {name: p.clone() for name, p in model.named_parameters()}
    lora = adapted(peft, model)
    assert torch.equal(logits(lora, IDS), before)  # B = 0
    losses = train(lora)
    assert losses[-1] < losses[0]
    learned = {name for name, p in lora.named_parameters() if p.grad is not None}
    assert learned
    assert all("lora_" in name for name in learned)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in learned} == set(TARGETS[family])
    for name, p in lora.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, frozen[name.replace(".base_layer", "")])
    with lora.disable_adapter():
        assert torch.equal(logits(lora, IDS), before)
    assert not torch.equal(logits(lora, IDS), before)


@pytest.mark.parametrize("quantize", [Quantize(bits=4, scales="channel"), Quantize(bits=8, what="dense")], ids=["factors", "dense"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beside_packed_integers(peft, family, quantize):
    model = tiny(family, torch.float32) if quantize.what == "dense" else compressed(family)
    if quantize.what == "dense":
        quantize_(model, quantize)
    before = logits(model, IDS)
    lora = adapted(peft, model)
    assert torch.equal(logits(lora, IDS), before)
    losses = train(lora)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="needed a dense layer" if quantize.what == "factors" else r"codes of 8 bits"):
        lora.merge_and_unload()


def test_an_adapter_goes_to_disk_and_back(peft, tmp_path):
    lora = adapted(peft, compressed(form=MPO(order=3, max_rank=6)))
    train(lora)
    lora.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 60_000  # adapters, no factors
    config = peft.LoraConfig.from_pretrained(tmp_path)
    register_peft_(config)
    again = peft.PeftModel.from_pretrained(compressed(form=MPO(order=3, max_rank=6)), tmp_path, config=config)
    assert torch.equal(logits(again, IDS), logits(lora, IDS))


def test_merging_is_refused_and_what_the_error_advises_does_it(peft, tmp_path):
    lora = adapted(peft, compressed())
    train(lora)
    lora.save_pretrained(tmp_path)
    trained = logits(lora, IDS)
    with pytest.raises(ValueError, match=r"holds factors of LowRank\(rank=6\).*a dense layer, here of 1,152 numbers.*tn\.densify_"):
        lora.merge_and_unload()
    assert torch.allclose(logits(lora, IDS), trained, atol=1e-5)  # float32; dense layers are merged, none is lost
    dense = compressed()
    densify_(dense)
    merged = peft.PeftModel.from_pretrained(dense, tmp_path).merge_and_unload()
    assert torch.allclose(logits(merged, IDS), trained, atol=1e-5)


def test_dense_layers_are_left_to_peft(peft):
    lora = adapted(peft, compressed())
    query = lora.get_base_model().model.layers[0].self_attn.q_proj
    assert type(query) is peft.tuners.lora.Linear


def test_embeddings_and_variants_are_refused(peft):
    model = tiny("llama", torch.float32)
    factorize_(model, Recipe(name="t", rules=(Rule(where="embedding", form=LowRank(rank=6)),)))
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    register_peft_(config)
    with pytest.raises(ValueError, match="got a FactorizedEmbedding as target; needed a linear layer"):
        peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="use_dora"):
        adapted(peft, compressed(), use_dora=True)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    from tnlib.peft_lora import _lora_class

    _lora_class.cache_clear()
    monkeypatch.setitem(sys.modules, "peft.tuners.lora", None)
    with pytest.raises(ImportError, match=r"peft cannot be imported.*pip install 'tnlib\[peft\]'"):
        register_peft_(None)
