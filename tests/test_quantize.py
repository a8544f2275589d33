"""fake_quantize_ and quantize_ on models: fake equals real bit for bit, bytes as predicted, ties kept, nothing half-done."""

import copy
from dataclasses import replace

import pytest
import torch
from test_assets import need
from tiny import CONFIGS, logits, tiny
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForSequenceClassification, BertConfig

from tnlib import (
    MPO,
    BlockLowRank,
    Budget,
    FactorizedEmbedding,
    FactorizedLinear,
    FakeQuantize,
    Group,
    Heal,
    Kronecker,
    LowRank,
    Packed,
    Quantize,
    QuantizedEmbedding,
    QuantizeError,
    Recipe,
    Rule,
    TensorRing,
    TensorTrain,
    densify_,
    factorize_,
    fake_quantize_,
    flops_per_token,
    heal,
    load_model,
    load_weights_,
    quantize_,
    quantized_size,
    save_weights,
    size,
    skeleton,
)
from tnlib.between import Between
from tnlib.quantize import targets
from tnlib.resume import load_file, weights
from tnlib.schedule import kinds, parameter_groups
from tnlib.trainer import HealTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


IDS = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(0))
FACTORS, DENSE = Quantize(bits=4), Quantize(bits=8, what="dense", scales="channel")
ACTIVATIONS = Quantize(bits=4, activation_bits=8)
FORMS = [
    LowRank(rank=8),
    Kronecker(right=(2, 2), terms=2, scaled=True, permute="both"),
    TensorTrain(order=2, max_rank=6),
    MPO(order=2, max_rank=6),
    BlockLowRank(rank=8),
    TensorRing(order=2, rank=4),
]


def factorized(family, form=FORMS[0], where=("linear", "embedding"), dtype=torch.float32):
    """A tiny model whose matrices, its embedding and the tied head are factors."""
    model = tiny(family, dtype)
    factorize_(model, Recipe(name="t", rules=(Rule(where=where, form=form),)))
    return model


def dense_and_factors(family, form=FORMS[0]):
    """A tiny model with something for both kinds of Quantize: the embedding stays dense, and so does its tied head."""
    return factorized(family, form, "mlp")


def state(model):
    """Everything that a failed call must leave alone."""
    kinds_of = [(name, type(module).__name__, module.training) for name, module in model.named_modules()]
    return kinds_of, {name: tensor.clone().nan_to_num(1e9) for name, tensor in model.state_dict().items()}


def same_state(one, other):
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(map(torch.equal, one[1].values(), other[1].values()))
    )


def file_bytes(model, path):
    save_weights(model, path)
    return sum(tensor.nbytes for tensor in load_file(path).values())


# ---- fake and real


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_from_fake_to_real_no_logit_changes(family, form, tmp_path):
    """Predicted bytes, saving and loading, ties, copies and densify_ too, on one model."""
    model = factorized(family, form)
    before = size(model), flops_per_token(model, 9)
    predicted = quantized_size(model, FACTORS)
    fake_quantize_(model, FACTORS)
    assert quantized_size(model, FACTORS) == predicted
    seen, fake = logits(model, IDS), copy.deepcopy(model)
    quantize_(model, FACTORS)
    assert torch.equal(logits(model, IDS), seen)
    assert torch.equal(logits(fake, IDS), seen)  # the copy is not touched
    assert torch.equal(logits(copy.deepcopy(model), IDS), seen)
    assert file_bytes(model, tmp_path / "x.safetensors") == predicted.bytes == quantized_size(model).bytes
    assert quantized_size(model) == predicted
    assert predicted.parameters == before[0].parameters == size(model).parameters
    assert replace(size(model), bytes_by_dtype={}) == replace(before[0], bytes_by_dtype={})
    assert flops_per_token(model, 9) == before[1] == flops_per_token(fake, 9)
    again = factorized(family, form)
    quantize_(again, FACTORS)
    load_weights_(again, tmp_path / "x.safetensors")
    assert torch.equal(logits(again, IDS), seen)
    densify_(model)
    assert torch.allclose(logits(model, IDS), seen, atol=1e-5)  # another order of float32 sums
    assert not any(isinstance(module, (Packed, QuantizedEmbedding, FactorizedLinear)) for module in model.modules())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_both_kinds_in_one_model(family, tmp_path):
    """Dense matrices beside factors: nn.Linear, Conv1D, and the table that the head shares."""
    model = dense_and_factors(family)
    before = size(model)
    predicted = quantized_size(model, FACTORS, DENSE)
    for quantize in (FACTORS, DENSE):
        fake_quantize_(model, quantize)
    seen = logits(model, IDS)
    for quantize in (DENSE, FACTORS):
        quantize_(model, quantize)
    assert torch.equal(logits(model, IDS), seen)
    assert file_bytes(model, tmp_path / "x.safetensors") == predicted.bytes == quantized_size(model).bytes
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    assert model.get_input_embeddings().packed is model.get_output_embeddings().parametrizations.weight[0]
    assert size(model).parameters == before.parameters
    assert all(parameter.dim() < 2 for parameter in model.parameters())
    densify_(model)
    assert torch.allclose(logits(model, IDS), seen, atol=1e-5)
    assert size(model) == replace(size(factorized_back(family)), parameters=size(model).parameters)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def factorized_back(family):
    model = dense_and_factors(family)
    densify_(model)
    return model


GRIDS = [
    Quantize(bits=2, scales="channel"),
    Quantize(bits=8, symmetric=False),
    Quantize(bits=4, scales=8, symmetric=False, start="mse"),
    Quantize(bits=4, learn="follow", start="percentile"),
    Quantize(bits=8, learn="frozen", start="lsq"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("quantize", GRIDS, ids=str)
def test_every_grid_and_type_of_model(quantize, dtype, tmp_path):
    model = factorized("llama", FORMS[0], dtype=dtype)
    predicted = quantized_size(model, quantize)
    fake_quantize_(model, quantize)
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.scale.data.mul_(1.1)  # as training would
    seen = logits(model, IDS)
    quantize_(model, quantize)
    assert torch.equal(logits(model, IDS), seen)
    assert seen.dtype == dtype
    assert file_bytes(model, tmp_path / "x.safetensors") == predicted.bytes


def test_from_float_without_training():
    one, other = factorized("gpt2"), factorized("gpt2")
    quantize_(one, FACTORS)
    fake_quantize_(other, FACTORS)
    assert torch.equal(logits(one, IDS), logits(other, IDS))


def test_a_model_may_change_its_type_afterwards():
    model = factorized("llama")
    quantize_(model, FACTORS)
    seen = logits(model, IDS)
    assert torch.equal(logits(model.double().float(), IDS), seen)
    assert logits(model.bfloat16(), IDS).dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_was_tied_shares_one_grid(form):
    """One FakeQuantize, then one Packed, for table and head; on another device as well."""
    model = factorized("gpt2", form)
    fake_quantize_(model, FACTORS)
    own = [target for target in targets(model, FACTORS) if target.name in ("transformer.wte", "lm_head")]
    assert (
        len({id(target.parametrization) for target in own})
        == len({id(target.original) for target in own})
        == len(own) / 2
    )
    grids = sum(isinstance(module, FakeQuantize) for module in model.modules())
    quantize_(model, FACTORS)
    assert sum(isinstance(module, Packed) for module in model.modules()) == grids
    own = [name for name in weights(model) if ".0." in name]
    assert [name for name in weights(model.to("meta")) if ".0." in name] == own


def test_on_the_meta_device():
    model = skeleton(CONFIGS["llama"]())
    factorize_(model, Recipe(name="t", rules=(Rule(where="mlp", form=FORMS[2]),)))
    predicted = quantized_size(model, FACTORS, DENSE)
    fake_quantize_(model, ACTIVATIONS, IDS.to("meta"))
    quantize_(model, ACTIVATIONS)
    quantize_(model, DENSE)
    assert quantized_size(model) == predicted
    grids = sum(isinstance(module, FakeQuantize) for module in model.modules())
    assert sum(tensor.nbytes for tensor in weights(model).values()) == predicted.bytes + 8 * grids
    assert "parameters, " in str(predicted)
    assert 4 < predicted.bits_each < 16


@pytest.mark.asset
def test_size_of_minilm_on_disk(tmp_path):
    need("minilm-l6")
    model = load_model("minilm-l6", task="base")
    factorize_(model, Recipe(name="t", rules=(Rule(where="linear", form=TensorTrain(order=2, max_rank=30)),)))
    predicted = quantized_size(model, FACTORS, DENSE)
    ids = torch.randint(0, 30_522, (2, 12))
    with torch.no_grad():
        fake_quantize_(model, FACTORS)
        fake_quantize_(model, DENSE)
        seen = model(ids).last_hidden_state
        quantize_(model, FACTORS)
        quantize_(model, DENSE)
        assert torch.equal(model(ids).last_hidden_state, seen)
    assert file_bytes(model, tmp_path / "x.safetensors") == predicted.bytes
    assert (tmp_path / "x.safetensors").stat().st_size == pytest.approx(predicted.file_bytes, rel=0.02)


# ---- what is refused


def broken(model):
    with torch.no_grad():
        next(module for module in model.modules() if isinstance(module, FactorizedLinear)).left[0, 0] = float("nan")
    return model


def faked(quantize, model=None):
    model = model or factorized("llama")
    fake_quantize_(model, quantize)
    return model


def stored(quantize, model=None):
    model = model or factorized("llama")
    quantize_(model, quantize)
    return model


ODD = LowRank(rank=7)  # rows of 7 numbers, 3.5 bytes
GROUPS = Quantize(bits=4, scales=4)
REFUSED = [
    (lambda: tiny("llama"), fake_quantize_, FACTORS, {}, "no such tensors that are still float.*Factorize it first"),
    (lambda: tiny("llama"), quantize_, FACTORS, {}, "no such tensors that are still float"),
    (lambda: factorized("llama"), quantize_, DENSE, {}, "choose the other of 'factors' and 'dense'"),
    (lambda: faked(FACTORS), fake_quantize_, FACTORS, {}, "embed_tokens.left has a FakeQuantize already; needed a float tensor"),
    (lambda: stored(FACTORS), fake_quantize_, FACTORS, {}, "has a Packed already"),
    (lambda: stored(FACTORS), quantize_, FACTORS, {}, r"quantize_: .* has a Packed already"),
    (lambda: stored(FACTORS), quantized_size, FACTORS, {}, r"quantized_size: .* has a Packed already"),
    (lambda: faked(FACTORS), quantize_, Quantize(bits=8), {}, "was trained on the grid .*bits=4.*needed the same, got .*bits=8"),
    (lambda: faked(Quantize(bits=3)), quantize_, Quantize(bits=3), {}, "bits=3; needed 2, 4, 8. Train with other widths"),
    (lambda: factorized("llama"), fake_quantize_, ACTIVATIONS, {}, "activation_bits=8 and no data; needed examples.*Give data="),
    (lambda: factorized("llama"), fake_quantize_, ACTIVATIONS, {"data": IDS + 96}, "got ids"),
    (lambda: broken(factorized("llama")), fake_quantize_, FACTORS, {}, r"layers\.0\..*left: .*1 of .* numbers are NaN"),
    (lambda: broken(factorized("llama")), quantize_, FACTORS, {}, r"quantize_, .*layers\.0\..*left: .*NaN"),
    (lambda: factorized("llama", ODD), quantize_, GROUPS, {}, "model.embed_tokens.left: .*rows of 7 numbers, scales=4"),
    (lambda: faked(GROUPS, factorized("llama", ODD)), quantize_, GROUPS, {}, "needed rows of whole groups"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "verb", "quantize", "more", "words"), REFUSED, ids=[r[-1][:45] for r in REFUSED])
def test_what_is_refused_leaves_the_model_as_it_was(make, verb, quantize, more, words):
    model = make().train()
    before = state(model)
    with pytest.raises((QuantizeError, IndexError), match=words):
        verb(model, quantize, **more)
    assert same_state(state(model), before)


# ---- activations


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_places_do_not_depend_on_how_many_tokens(form):
    """One token or thousands: the same grids, at the input and where the contraction has a result in between."""
    model = factorized("gpt2", form)
    fake_quantize_(model, ACTIVATIONS, IDS)
    places = {}
    for name, module in model.named_modules():
        if isinstance(module, Between):
            places[name] = set(module.grids)
            seen = []
            module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1]))
            layer = model.get_submodule(name.removesuffix(".between"))
            for tokens in (1, 3, 4000):
                layer(torch.randn(tokens, layer.shape[1]))
            assert len(seen) == 3 * len(places[name])
            assert set(seen) == places[name]
    assert len(places) == 2 * 4 + 1  # and the head
    between = 0 if isinstance(form, TensorRing) else 1  # a ring has no result in between: its weight is rebuilt
    assert all("input" in grids and len(grids) == 1 + between for grids in places.values())


def test_an_unknown_place_is_an_error_after_observing():
    between = Between(ACTIVATIONS)
    between(torch.randn(4), "input")
    between.observing = False
    assert between(torch.randn(3, 2), "input").shape == (3, 2)
    with pytest.raises(KeyError, match="elsewhere"):
        between(torch.randn(4), "elsewhere")


def test_scales_start_from_what_passes():
    layer = FactorizedLinear(LowRank(rank=4), (6, 8))
    layer.between = Between(Quantize(bits=4, activation_bits=8, learn="frozen"))
    x = torch.randn(5, 8)
    layer(x)
    assert float(layer.between.grids["input"].scale) == pytest.approx(float(x.abs().max()) / 127)
    assert set(layer.between.grids) == {"input", "rank"}


def test_a_layer_that_no_data_reach_has_no_grids():
    model = factorized("gpt2")
    model.unused = FactorizedLinear(LowRank(rank=2), (4, 4))
    modes = [module.training for module in model.train().modules()]
    fake_quantize_(model, ACTIVATIONS, {"input_ids": IDS.int(), "attention_mask": torch.ones_like(IDS), "labels": IDS})
    assert model.unused.between is None
    assert isinstance(model.transformer.h[0].mlp.c_fc.between, Between)
    assert all(module.training for module in model.modules())
    assert all(modes)
    densify_(model)


def test_activations_stay_on_their_grids_when_factors_are_stored(tmp_path):
    model = factorized("llama")
    predicted = quantized_size(model, ACTIVATIONS)
    fake_quantize_(model, ACTIVATIONS, IDS)
    assert quantized_size(model, ACTIVATIONS) == predicted
    seen = logits(model, IDS)
    quantize_(model, ACTIVATIONS)
    assert torch.equal(logits(model, IDS), seen)
    grids = sum(isinstance(module, FakeQuantize) for module in model.modules())
    assert grids == 2 * (2 * 7 + 1)
    assert file_bytes(model, tmp_path / "x.safetensors") == predicted.bytes + 8 * grids


# ---- training


def classifiers(quantize=None, form=FORMS[2]):
    """A factorized, fake-quantized tiny BERT with three classes, its dense teacher, and labeled texts."""
    config = BertConfig(vocab_size=96, hidden_size=24, num_attention_heads=2, intermediate_size=48, num_hidden_layers=2)
    config.num_labels = 3
    torch.manual_seed(0)
    teacher = AutoModelForSequenceClassification.from_config(config)
    student = copy.deepcopy(teacher)
    factorize_(student, Recipe(name="t", rules=(Rule(where=("linear", "embedding"), form=form),)))
    ids = torch.randint(2, 96, (24, 12), generator=torch.Generator().manual_seed(0))
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(24) % 3}
    if quantize:
        fake_quantize_(student, quantize, data)
    return student, teacher, data


HEAL = Heal(
    losses=(("task", 1.0), ("hidden", 1.0), ("logits", 1.0)),
    learning_rate=3e-3,
    schedule="constant",
    curriculum_steps=2,
    weight_decay=0.1,
)


def hooks(model):
    kinds_of = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds_of)


@pytest.mark.parametrize("form", FORMS[2:], ids=str)
def test_healing_trains_through_the_grids(form):
    student, teacher, data = classifiers(ACTIVATIONS, form)
    before, kind = {name: p.detach().clone() for name, p in student.named_parameters()}, kinds(student)
    history = heal(student, teacher, data, replace(HEAL, learning_rate=1e-2), Budget(steps=16, batch=4))
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if kind[name] != "rest"} <= moved
    late = [row["loss"] for row in history.rows[4:]]  # after the curriculum, all terms are in
    assert sum(late[-4:]) < 0.95 * sum(late[:4])
    student.eval()
    with torch.no_grad():
        seen = student(**data).logits
        quantize_(student, ACTIVATIONS)
        assert torch.equal(student(**data).logits, seen)


@pytest.mark.parametrize("learn", ["plain", "follow"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(learn, tmp_path, monkeypatch):
    quantize, budget = replace(ACTIVATIONS, learn=learn), Budget(steps=6, batch=4, save_every=2)
    whole, teacher, data = classifiers(quantize)
    heal(whole, teacher, data, HEAL, budget)
    step, calls = HealTrainer.training_step, []

    def until_the_fourth(self, *args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("stopped")
        return step(self, *args, **options)

    monkeypatch.setattr(HealTrainer, "training_step", until_the_fourth)
    for expected in (RuntimeError, None):
        student, _, _ = classifiers(quantize)
        if expected:
            with pytest.raises(expected, match="stopped"):
                heal(student, teacher, data, HEAL, budget, tmp_path)
        else:
            heal(student, teacher, data, HEAL, budget, tmp_path)
    assert len(calls) == 4 + 4  # steps 3 to 6 after the checkpoint of step 2
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(student)[name], tensor), name


def test_scales_are_scalars_and_never_decay():
    student, _, _ = classifiers(replace(ACTIVATIONS, scales="channel"), FORMS[1])
    kind = kinds(student)
    for name in kind:
        if name.endswith(".original"):
            assert kind[name] == "factors"
        if ".grids." in name or name.endswith(("left.0.scale", "right.0.scale", "dense.scale")):
            assert kind[name] == "scalars"
        if name.endswith((".bias", "LayerNorm.weight")):
            assert kind[name] == "rest"
    how = replace(HEAL, groups=(Group(where="scalars", learning_rate=1e-4, weight_decay=0.5),))
    groups = {id(p): group for group in parameter_groups(student, how) for p in group["params"]}
    for name, parameter in student.named_parameters():
        assert groups[id(parameter)]["weight_decay"] == (0.1 if parameter.dim() > 1 and kind[name] != "scalars" else 0)
        assert groups[id(parameter)]["lr"] == (1e-4 if kind[name] == "scalars" else 3e-3)


def test_training_factors_only_leaves_frozen_scales_alone():
    student, teacher, data = classifiers(replace(ACTIVATIONS, learn="frozen"))
    grids = [module.scale.clone() for module in student.modules() if isinstance(module, FakeQuantize)]
    heal(student, teacher, data, replace(HEAL, train="factors"), Budget(steps=3, batch=4))
    assert all(map(torch.equal, grids, [m.scale for m in student.modules() if isinstance(m, FakeQuantize)]))


def test_no_hooks_are_left_and_none_pile_up(monkeypatch):
    """The paper's repository adds 13 at every step and removes none."""
    student, teacher, data = classifiers(ACTIVATIONS)
    counts, step = [], HealTrainer.training_step

    def counted(self, *args, **options):
        loss = step(self, *args, **options)
        counts.append((hooks(self.model), hooks(teacher)))
        return loss

    monkeypatch.setattr(HealTrainer, "training_step", counted)
    heal(student, teacher, data, HEAL, Budget(steps=5, batch=4))
    assert len(counts) == 5
    assert len(set(counts)) == 1
    clean = classifiers()[1]
    clean(input_ids=data["input_ids"], output_hidden_states=True)  # transformers leaves its own, once
    assert hooks(student) == hooks(teacher) == hooks(clean)


def test_a_tied_weight_that_its_grid_follows_trains():
    """Table and head read one grid twice in a forward pass; see FakeQuantize.grid."""
    model = factorized("gpt2").train()
    fake_quantize_(model, replace(FACTORS, learn="follow", symmetric=False))
    model(input_ids=IDS, labels=IDS).loss.backward()
    originals = [p for name, p in model.named_parameters() if name.endswith(".original")]
    assert all(p.grad.isfinite().all() and p.grad.any() for p in originals)


def test_layers_know_nothing_of_it():
    """Reading a factor gives what its grid leaves of it; state and class are torch's parametrize."""
    model = factorized("llama")
    fake_quantize_(model, FACTORS)
    layer = model.model.layers[0].mlp.up_proj
    assert parametrize.is_parametrized(layer, "left")
    assert isinstance(layer, FactorizedLinear)
    assert len(layer.left.unique()) <= 16
    assert isinstance(model.model.embed_tokens, FactorizedEmbedding)
    assert not isinstance(layer.left, nn.Parameter)
