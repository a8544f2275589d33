"""Native checkpoints: what factorize_, quantize_, fake_quantize_ and heal leave is saved and loaded without a changed bit."""

import copy
import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_surgery import IDS
from tiny import AUTO, CONFIGS, LLAMA, logits, recipe, tiny

from tnlib.baselines import factorize_by_, prune_, svd_llm
from tnlib.block_low_rank import BlockLowRank
from tnlib.calibrate import calibrate
from tnlib.checkpoint import FORMAT, TNConfig
from tnlib.checkpoint_files import stored_config
from tnlib.depth import drop_blocks
from tnlib.heal import heal
from tnlib.kronecker import Kronecker
from tnlib.layer_data import layer_from_dict, layer_to_dict, replaced
from tnlib.layers import FactorizedEmbedding, FactorizedLinear
from tnlib.low_rank import LowRank
from tnlib.native import is_ours
from tnlib.plan import report
from tnlib.quant import Quantize
from tnlib.quantize import fake_quantize_, quantize_
from tnlib.recipe import Recipe
from tnlib.resume import weights
from tnlib.sequential import factorize_in_sequence_
from tnlib.shapes import is_conv1d
from tnlib.stages import compress_and_heal
from tnlib.surgery import densify_, factorize_
from tnlib.tensor_ring import TensorRing
from tnlib.tensor_train import TensorTrain
from tnlib.treatment import Budget, Heal
from tnlib.tt_matrix import MPO

pytestmark = pytest.mark.usefixtures("one_thread", "quiet")
FAMILIES = [family for family in CONFIGS if family != "qwen2"]  # Llama's layers, as Qwen3's are
FOUR = Quantize(bits=4, scales="channel")
HALF = recipe(MPO(order=2, kept=0.5), "linear")
TIED = recipe(LowRank(rank=4), "linear", "embedding")
BANDS = recipe(BlockLowRank(bands=2, rank=3), "linear", "embedding")
RINGS = recipe(TensorRing(order=3, rank=3), "linear", "embedding")
PERMUTED = recipe(Kronecker(right=(1, 4), permute="both"), "embedding")
KINDS = {
    "compressed": lambda model: factorize_(model, HALF),
    "tied": lambda model: factorize_(model, TIED),
    "permuted": lambda model: factorize_(model, PERMUTED),
    "quantized": lambda model: (factorize_(model, TIED), quantize_(model, FOUR)),
    "quantized bands": lambda model: (factorize_(model, BANDS), quantize_(model, FOUR)),
    "quantized permuted": lambda model: (factorize_(model, PERMUTED), quantize_(model, Quantize(bits=8, symmetric=False))),
    "quantized rings": lambda model: (factorize_(model, RINGS), quantize_(model, FOUR)),
    "dense in 8 bits": lambda model: quantize_(model, Quantize(bits=8, what="dense", scales="channel")),
    "both": lambda model: (factorize_(model, HALF), quantize_(model, FOUR), quantize_(model, Quantize(bits=8, what="dense"))),
    "trained grids": lambda model: (factorize_(model, TIED), fake_quantize_(model, Quantize(bits=3, learn="lsq"))),
    "trained dense": lambda model: fake_quantize_(model, Quantize(bits=4, what="dense", learn="frozen")),
}


@pytest.fixture
def quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def loaded(model, folder, **options):
    """The model after a save and a load by its Auto class, in which nothing was missing or too much."""
    model.save_pretrained(folder, **options)
    return read(folder, model.config.model_type)


def read(folder, family, **options):
    auto = AUTO.get(family, transformers.AutoModelForCausalLM)
    found, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return found


def assert_same(one, other):
    """Names, types, bits, ties, logits, layers and their errors."""
    assert_same_tensors(one, other)
    assert torch.equal(logits(one, IDS), logits(other, IDS))
    assert {n: layer_to_dict(layer) for n, layer in replaced(one).items()} == {
        n: layer_to_dict(layer) for n, layer in replaced(other).items()
    }
    assert report(one) == report(other)


def assert_same_tensors(one, other):
    a, b = weights(one), weights(other)
    assert list(a) == list(b)
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_changes_no_bit(family, kind, tmp_path):
    model = tiny(family, torch.float32)
    KINDS[kind](model)
    assert_same(model, loaded(model, tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["tied", "quantized permuted", "trained grids"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_shards_and_in_another_type(family, kind, dtype, tmp_path):
    model = loaded(tiny(family, dtype), tmp_path / "dense")  # whose rotary frequencies are float32 in any type
    KINDS[kind](model)
    again = loaded(model, tmp_path / "small", max_shard_size="5KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    assert_same(model, again)
    assert {parameter.dtype for parameter in copy.deepcopy(again).half().parameters()} >= {torch.float16}
    wide = read(tmp_path / "small", family, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["tied", "quantized"])
@pytest.mark.parametrize("where", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_under_a_device_map(kind, where, tmp_path):
    model = tiny("llama", torch.float32)
    KINDS[kind](model)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert_same(model, read(tmp_path, "llama", device_map=where))


def test_blocks_offloaded_to_disk_compute_the_same(tmp_path):
    model = tiny("llama", torch.float32)
    factorize_(model, TIED)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    found = read(tmp_path / "model", "llama", device_map=places, offload_folder=str(tmp_path / "off"))
    assert torch.equal(logits(found, IDS), logits(model, IDS))
    assert found.lm_head.left is found.model.embed_tokens.left


def test_forms_splits_starts_and_errors_come_back(tmp_path):
    model = tiny("gpt2", torch.float32)
    factorize_(model, recipe(LowRank(rank=5), "qkv", split=3))
    factorize_(model, recipe(TensorTrain(order=2, max_rank=5), "up", init="als"))
    factorize_(model, recipe(Kronecker(right=(2, 2), terms=2, scaled=True), "down", init="random"))
    factorize_(model, recipe(Kronecker(right=(1, 4)), "embedding", head="dense"))
    again = loaded(model, tmp_path)
    assert_same(model, again)
    assert is_conv1d(again.transformer.h[0].attn.c_attn.to_dense())
    assert all(part.error > 0 for part in again.transformer.h[0].attn.c_attn.parts)
    assert {type(rule.form) for rule in Recipe.from_dict(stored_config(tmp_path)["recipe"]).rules} == {LowRank, TensorTrain, Kronecker}
    assert again.lm_head.weight is model.lm_head.weight or torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_activation_grids_come_back(tmp_path):
    model = tiny("llama", torch.float32)
    factorize_(model, HALF)
    fake_quantize_(model, Quantize(bits=4, activation_bits=8), data=IDS)
    assert_same(model, loaded(model, tmp_path / "trained"))
    quantize_(model, Quantize(bits=4, activation_bits=8))
    assert_same(model, loaded(model, tmp_path / "stored"))


def test_what_calibration_sequence_and_other_methods_leave(tmp_path):
    for number, method in enumerate((_calibrated, _in_sequence, _by_svd_llm)):
        model = tiny("llama", torch.float32)
        method(model)
        again = loaded(model, tmp_path / str(number))
        assert_same(model, again)
        if method is _calibrated:
            assert all(layer.output_error is not None for layer in replaced(again).values())


def _calibrated(model):
    factorize_(model, HALF, calibrate(model, IDS, HALF))


def _in_sequence(model):
    factorize_in_sequence_(model, IDS, recipe(LowRank(rank=4), "mlp"))


def _by_svd_llm(model):
    chosen = recipe(LowRank(rank=4), "mlp")
    factorize_by_(model, chosen, calibrate(model, IDS, chosen), svd_llm)


def test_pruned_and_shortened_models_are_plain_dense_ones(tmp_path):
    model = tiny("llama", torch.float32)
    prune_(model, ["model.layers.0.mlp.up_proj"], kept=0.5)
    assert_same(model, loaded(model, tmp_path / "pruned"))
    config = transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 4})
    deep = transformers.LlamaForCausalLM(config).eval()
    short = drop_blocks(deep, sum(p.numel() for p in deep.parameters()) - 1000)
    factorize_(short, HALF)
    assert_same(short, loaded(short, tmp_path / "short"))
    assert (short.config.num_hidden_layers, stored_config(tmp_path / "pruned")) == (3, {})


def test_a_healed_student_is_a_checkpoint_in_its_folder(tmp_path):
    teacher, how = tiny("llama", torch.float32), Heal(losses=(("logits", 1.0),))
    student = copy.deepcopy(teacher)
    factorize_(student, TIED)
    fake_quantize_(student, Quantize(bits=4))
    heal(student, teacher, IDS, how, Budget(steps=2, batch=2), tmp_path / "qat")
    assert_same(student, read(tmp_path / "qat", "llama"))
    chosen = Recipe(name="two", rules=(*HALF.rules, *PERMUTED.rules), stages=(HALF.rules, PERMUTED.rules), heal=how)
    student, _ = compress_and_heal(teacher, chosen, IDS, Budget(steps=2, batch=2), out=tmp_path / "staged")
    assert_same(student, read(tmp_path / "staged" / "stage-1", "llama"))
    assert Recipe.from_dict(stored_config(tmp_path / "staged" / "stage-1")["recipe"]) == chosen
    assert "| 2 x model.layers.*.mlp.up_proj |" in (tmp_path / "staged" / "stage-1" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["tied", "quantized"])
def test_other_auto_classes_take_the_layers_that_they_have(kind, tmp_path):
    model = tiny("llama", torch.float32)
    KINDS[kind](model)
    model.save_pretrained(tmp_path / "causal")
    bare = transformers.AutoModel.from_pretrained(tmp_path / "causal")
    assert torch.equal(bare(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    bare.save_pretrained(tmp_path / "bare")
    assert_same_tensors(bare, transformers.AutoModel.from_pretrained(tmp_path / "bare"))
    with pytest.raises(ValueError, match=r"no lm_head.weight, and the table that it was tied to is replaced"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    classes = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "causal", num_labels=3)
    assert torch.equal(classes.model(IDS).last_hidden_state, bare(IDS).last_hidden_state)


# ---- the loaded model at work


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["tied", "quantized"])
def test_generation_with_and_without_a_cache_is_that_of_the_model(family, kind, tmp_path):
    model = tiny(family, torch.float32)
    KINDS[kind](model)
    again, how = loaded(model, tmp_path), {"max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(IDS, **how)
    assert torch.equal(again.generate(IDS, **how), wanted)
    assert torch.equal(again.generate(IDS, use_cache=False, **how), wanted)


@pytest.mark.parametrize("kind", ["tied", "trained grids"])
def test_trainer_trains_what_was_loaded_and_saves_it_again(kind, tmp_path):
    """Trap: Trainer takes a model with a quantizer only if is_trainable and is_qat_trainable are both set."""
    model = tiny("llama", torch.float32)
    KINDS[kind](model)
    found = loaded(model, tmp_path / "first")
    found.is_quantized = True  # as transformers sets it; tnlib takes it back, so that the model may change its type
    settings = transformers.TrainingArguments(
        tmp_path / "out", max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, learning_rate=0.01, disable_tqdm=True
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    transformers.Trainer(found, settings, train_dataset=data).train()
    assert not torch.equal(found.lm_head.left, model.lm_head.left)
    assert found.lm_head.left is found.model.embed_tokens.left or kind == "trained grids"
    transformers.Trainer(found, settings).save_model(tmp_path / "second")
    found.eval()
    assert_same(found, read(tmp_path / "second", "llama"))


@pytest.mark.parametrize("kind", ["tied", "trained grids"])
def test_a_state_that_was_gathered_is_the_one_that_is_written(kind, tmp_path):
    """Trap: transformers asks the quantizer for the state of the model, which under FSDP one process alone has not."""
    model = tiny("llama", torch.float32)
    KINDS[kind](model)
    gathered = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    assert_same(wanted, read(tmp_path / "gathered", "llama"))
    lost = next(name for name in gathered if "up_proj" in name)
    with pytest.raises(ValueError, match=f"lacks {re.escape(lost)}; needed all"):
        model.save_pretrained(tmp_path / "lost", state_dict={name: tensor for name, tensor in gathered.items() if name != lost})
    assert not list((tmp_path / "lost").iterdir())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["compressed", "tied", "quantized", "trained dense"])
def test_dequantize_leaves_a_plain_dense_model(family, kind, tmp_path):
    """Trap: Conv1D, where it was, must come back as Conv1D."""
    dense = tiny(family, torch.float32)
    model = copy.deepcopy(dense)
    KINDS[kind](model)
    found = loaded(model, tmp_path / "small").dequantize()
    assert torch.allclose(logits(found, IDS), logits(model, IDS), atol=1e-3)
    kinds = {name: (type(m), tuple(p.shape for p in m.parameters(False))) for name, m in dense.named_modules()}
    assert {name: (type(m), tuple(p.shape for p in m.parameters(False))) for name, m in found.named_modules()} == kinds
    assert list(weights(found)) == list(weights(dense))
    found.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert load_file(tmp_path / "dense" / "model.safetensors").keys() == _stored(dense, tmp_path / "wanted").keys()
    assert torch.equal(logits(read(tmp_path / "dense", family), IDS), logits(found, IDS))


def _stored(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_densify_alone_gives_an_ordinary_model_back():
    model = tiny("llama", torch.float32)
    factorize_(model, HALF)
    assert is_ours(model.hf_quantizer)
    densify_(model)
    assert getattr(model, "hf_quantizer", None) is None
    assert not hasattr(model.config, "quantization_config")


# ---- traps


def test_models_of_the_same_config_do_not_become_compressed_ones(tmp_path):
    """Trap: from_config shares the config object, and so would its quantization_config be."""
    config = CONFIGS["llama"]()
    one, other = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    factorize_(one, HALF)
    one.save_pretrained(tmp_path / "one")
    assert not hasattr(config, "quantization_config")
    assert other.config is config
    assert one.model.config is one.config is one.model.layers[0].self_attn.config is not config
    other.save_pretrained(tmp_path / "other")
    assert stored_config(tmp_path / "other") == {}
    copied = copy.deepcopy(one)
    densify_(copied)
    assert stored_config(tmp_path / "one")["modules"].keys() == one.config.quantization_config.modules.keys()
    one.save_pretrained(tmp_path / "again")
    assert stored_config(tmp_path / "again") == stored_config(tmp_path / "one")


def test_the_guard_is_one_number_under_the_name_of_each_replaced_weight(tmp_path):
    """Trap: without it a process that knows nothing of tnlib draws random weights; test_fresh_process.py sees it fail."""
    model = tiny("gpt2", torch.bfloat16)
    factorize_(model, TIED)
    found = _stored(model, tmp_path)
    assert {name for name in found if name.endswith(".weight") and found[name].shape == (1,)} == {
        f"{name}.weight" for name in replaced(model)
    }
    assert found["lm_head.weight"].dtype == torch.bfloat16


def test_code_that_reads_the_weight_of_a_replaced_layer_finds_one():
    """Trap: GPT-2's _init_weights reads attn.c_proj.weight, T5's forward wo.weight.dtype."""
    for family in ("gpt2", "t5"):
        model = tiny(family, torch.float32)
        factorize_(model, HALF)
        before = weights(copy.deepcopy(model))
        model._is_hf_initialized = True
        for layer in replaced(model).values():
            assert layer.weight.dtype == torch.float32
        for module in model.modules():
            if module in replaced(model).values() or any(m in replaced(model).values() for m in module.children()):
                model._init_weights(module)
        after = weights(model)
        assert all(torch.equal(before[name], after[name]) for name in before if ".core" in name)


def test_lora_goes_beside_replaced_layers_and_is_refused_on_them(tmp_path):
    """Trap: PEFT knows none of tnlib's layers; it says so, and adapts the others."""
    peft = pytest.importorskip("peft")
    model = tiny("llama", torch.float32)
    factorize_(model, recipe(MPO(order=2, kept=0.5), "mlp"))
    found = loaded(model, tmp_path)
    with pytest.raises(ValueError, match=r"FactorizedLinear.* is not supported"):
        peft.get_peft_model(copy.deepcopy(found), peft.LoraConfig(target_modules=["up_proj"]))
    adapted = peft.get_peft_model(found, peft.LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(logits(adapted, IDS), logits(model, IDS))


def test_a_model_that_could_not_be_loaded_is_refused_before_anything_is_written(tmp_path):
    model = tiny("llama", torch.float32)
    factorize_(model, HALF)
    model.model.layers[0].mlp.act_fn = torch.nn.PReLU()
    with pytest.raises(ValueError, match=r"has other tensors than this model: model.layers.0.mlp.act_fn.weight \(1 in all\)"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model = tiny("llama", torch.float32)
    factorize_(model, HALF)
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj, "core0")
    with pytest.raises(ValueError, match=r"save: model.layers.0.mlp.up_proj.core0 has a parametrization that is none of tnlib's"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- what config.json carries


def test_config_json_carries_version_recipe_layers_and_ties(tmp_path):
    model = tiny("bert", torch.float32)
    KINDS["quantized"](model)
    model.save_pretrained(tmp_path)
    found = stored_config(tmp_path)
    assert (found["quant_method"], found["format_version"]) == ("tnlib", FORMAT)
    assert Recipe.from_dict(found["recipe"]).rules == TIED.rules
    assert Recipe.from_dict(found["recipe"]).quantize == FOUR
    grid = {"kind": "packed", "bits": 4, "scales": "channel", "symmetric": True}
    layer = found["modules"]["bert.encoder.layer.0.intermediate.dense"]
    error = model.bert.encoder.layer[0].intermediate.dense.error
    assert layer == {
        "layer": "FactorizedLinear",
        "form": {"kind": "LowRank", "rank": 4},
        "shape": [48, 24],
        "source": "Linear",
        "bias": True,
        "error": error,
        "output_error": None,
        "grids": {"left": grid, "right": grid},
    }
    assert error > 0
    head = "cls.predictions.decoder"
    assert found["tied"][f"{head}.parametrizations.left.0"] == "bert.embeddings.word_embeddings.packed"
    assert TNConfig(**found).to_dict() == found


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_made_from_its_data_has_that_data(kind):
    dense = tiny("gpt2", torch.float32)
    model = copy.deepcopy(dense)
    KINDS[kind](model)
    for name, layer in replaced(model).items():
        data = json.loads(json.dumps(layer_to_dict(layer)))
        empty = layer_from_dict(data, copy.deepcopy(dense.get_submodule(name)).to("meta"))
        assert json.loads(json.dumps(layer_to_dict(empty))) == data
        assert {type(layer).__name__} <= {type(empty).__name__, FactorizedLinear.__name__, FactorizedEmbedding.__name__}
