"""TNConfig(recipe=…) given to from_pretrained: a dense checkpoint ends as factorize_ would leave it, a matrix at a time."""

import gc
from functools import partial

import pytest
import torch
import transformers
from test_checkpoint import assert_same, quiet, read  # noqa: F401, a fixture
from test_stream import CASES, folder_of, live_bytes
from test_surgery import IDS
from tiny import AUTO, LLAMA, logits, recipe

import tnlib.on_load
from tnlib.checkpoint import TNConfig
from tnlib.checkpoint_files import stored_config
from tnlib.low_rank import LowRank
from tnlib.quant import Quantize, QuantizeError
from tnlib.quantize import fake_quantize_, quantize_
from tnlib.recipe import Recipe, RecipeError
from tnlib.shapes import ShapeError
from tnlib.surgery import factorize_
from tnlib.tt_matrix import MPO

pytestmark = pytest.mark.usefixtures("one_thread", "quiet")
HALF = recipe(MPO(order=2, kept=0.5), "linear")


def both(folder, family, chosen, seed=0, **options):
    """Compressed while it is loaded, and after it was."""
    auto = AUTO.get(family, transformers.AutoModelForCausalLM)
    small = read(folder, family, quantization_config=TNConfig(recipe=chosen, seed=seed), **options)
    wanted = auto.from_pretrained(folder, **options)
    factorize_(wanted, chosen, seed=seed)
    return small, wanted


@pytest.mark.parametrize(("family", "case"), [(family, k) for family, cases in CASES.items() for k in range(len(cases))])
def test_it_is_factorize_after_loading(tmp_path, family, case):
    chosen = CASES[family][case]
    small, wanted = both(folder_of(tmp_path, family), family, chosen, seed=3)
    assert_same(small, wanted)
    assert {p.requires_grad for p in small.parameters()} == {True}
    small.save_pretrained(tmp_path / "small")
    assert_same(read(tmp_path / "small", family), wanted)
    assert Recipe.from_dict(stored_config(tmp_path / "small")["recipe"]) == chosen


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"dtype": torch.float32}], ids=str)
def test_in_half_precision_under_a_device_map_and_in_another_type(tmp_path, options):
    folder = folder_of(tmp_path, "llama", torch.bfloat16)
    assert_same(*both(folder, "llama", recipe(LowRank(rank=4), "linear", "embedding"), **options))


def test_no_more_than_one_dense_matrix_is_held_at_a_time(tmp_path, monkeypatch):
    chosen = recipe(LowRank(rank=4), "linear")
    build, peaks = tnlib.on_load.build, {}
    for layers in (2, 5):
        config = transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": layers})
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / f"{layers}", max_shard_size="20KB")
        gc.collect()
        before, seen = live_bytes(), []

        def measured(*args, seen=seen, before=before, **options):
            built = build(*args, **options)
            seen.append(live_bytes() - before)
            return built

        monkeypatch.setattr(tnlib.on_load, "build", measured)
        small = read(tmp_path / f"{layers}", "llama", quantization_config=TNConfig(recipe=chosen))
        peaks[layers] = max(seen) - sum(p.nbytes for p in small.parameters())
        del small
    matrix = 4 * 24 * 48
    assert max(peaks.values()) < 3 * matrix  # of 21 matrices; what the layers themselves take is not counted


def test_mistakes_are_named_before_a_weight_is_read(tmp_path, monkeypatch):
    folder, auto = folder_of(tmp_path, "llama"), transformers.AutoModelForCausalLM
    monkeypatch.setattr(tnlib.on_load, "build", lambda *args: pytest.fail("a layer was built"))
    load = partial(auto.from_pretrained, folder)
    with pytest.raises(ValueError, match="TNConfig: got no recipe for a dense checkpoint; needed one"):
        load(quantization_config=TNConfig())
    with pytest.raises(RecipeError, match=r"rule 'pooler' .* claims no module of this llama model"):
        load(quantization_config=TNConfig(recipe=recipe(LowRank(rank=4), "pooler")))
    with pytest.raises(ShapeError, match=r"recipe 'test', module model.layers.0"):
        load(quantization_config=TNConfig(recipe=recipe(MPO(in_modes=(5, 5), out_modes=(6, 8), max_rank=2), "up")))
    with pytest.raises(RecipeError, match="Recipe: got unknown rulez"):
        TNConfig(recipe={"name": "x", "rulez": []})


# ---- mixtures of experts


def moe():
    sizes = {"vocab_size": 96, "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    qwen = transformers.Qwen3MoeConfig(**sizes, intermediate_size=48, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=12)
    return {"qwen3_moe": qwen, "mixtral": transformers.MixtralConfig(**sizes, intermediate_size=48, num_local_experts=4)}


ATTENTION = recipe(LowRank(rank=4), "model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.o_proj", "lm_head")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_fused_experts_are_refused_by_name_and_the_rest_is_compressed(family, tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(moe()[family]).eval()
    for where in ("mlp", "model.layers.*.mlp.experts", "model.layers.*.mlp.experts.*.up_proj"):
        with pytest.raises(RecipeError, match=r"fused into one 3-D parameter cannot be replaced: model.layers.\*.mlp.experts.gate_up_proj"):
            factorize_(model, recipe(LowRank(rank=4), where))
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    small, wanted = both(tmp_path / "dense", family, ATTENTION)
    assert_same(small, wanted)
    small.save_pretrained(tmp_path / "small", max_shard_size="20KB")
    found = read(tmp_path / "small", family)
    assert_same(found, wanted)
    found.dequantize().save_pretrained(tmp_path / "again")
    assert torch.allclose(logits(read(tmp_path / "again", family), IDS), logits(wanted, IDS), atol=1e-5)


def test_a_quantization_that_would_pass_experts_over_is_refused():
    model = transformers.AutoModelForCausalLM.from_config(moe()["mixtral"])
    for verb in (quantize_, fake_quantize_):
        with pytest.raises(QuantizeError, match=r"model.layers.0.mlp.experts.gate_up_proj \(4, 96, 24\) holds fused experts, 4 such"):
            verb(model, Quantize(bits=8, what="dense"))
