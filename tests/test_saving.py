"""save, load and model cards: whole folders, numbers that are counted, formats that are read or refused with a way out."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from test_checkpoint import FOUR, KINDS, TIED, assert_same, quiet  # noqa: F401, a fixture
from test_stream import folder_of
from test_surgery import IDS, recipe
from tiny import CONFIGS, tiny

import tnlib.checkpoint
from tnlib.assets import load_model, load_tokenizer
from tnlib.checkpoint import FORMAT, TNConfig
from tnlib.checkpoint_files import stored_config
from tnlib.cost import size
from tnlib.evaluate import perplexity
from tnlib.low_rank import LowRank
from tnlib.model_card import model_card
from tnlib.plan import plan
from tnlib.quant import Quantize
from tnlib.quantize import quantize_
from tnlib.rebuild import rebuild
from tnlib.recipe import Recipe
from tnlib.saving import load, save
from tnlib.shapes import ShapeError
from tnlib.stream import factorize_folder
from tnlib.surgery import factorize_

pytestmark = pytest.mark.usefixtures("one_thread", "quiet")


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "bert", "opt", "t5"])
def test_load_takes_the_class_that_config_json_names(family, tmp_path):
    model = tiny(family, torch.float32)
    KINDS["quantized"](model)
    save(model, tmp_path / "small", max_shard_size="20KB")
    found = load(tmp_path / "small", dtype=torch.float32)
    assert type(found) is type(model)
    assert not found.training
    assert_same(model, found)


def numbers(text):
    return [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*\.?\d*", text)]


def row(card, start):
    return next(line for line in card.splitlines() if line.startswith(f"| {start}"))


def test_a_card_counts_what_there_is(tmp_path):
    dense = tiny("llama", torch.float32)
    model, predicted = tiny("llama", torch.float32), plan(dense, TIED)
    factorize_(model, TIED)
    save(model, tmp_path / "small", base="someone/tiny", measured={"perplexity": perplexity(model, IDS), "dense perplexity": 12.3456})
    card = (tmp_path / "small" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: someone/tiny\n" in card
    kept = predicted.total / predicted.dense_total
    assert numbers(row(card, "parameters")) == [predicted.dense_total, predicted.total, round(kept, 3)]
    replaced = [sum(getattr(r, key) for r in predicted.rows) for key in ("dense", "params")]
    assert numbers(row(card, "of these"))[:2] == replaced
    disk = (tmp_path / "small" / "model.safetensors").stat().st_size / 1e6
    assert numbers(row(card, "MB on disk"))[1:3] == [round(predicted.dense_total * 4 / 1e6, 1), round(disk, 1)]
    errors = [model.model.layers[k].mlp.up_proj.error for k in (0, 1)]
    assert numbers(row(card, "2 x model.layers.*.mlp.up_proj"))[-2:] == [round(sum(errors) / 2, 3), round(max(errors), 3)]
    assert row(card, "1 x lm_head (shared)").count(" 0 |") == 2
    assert row(card, "perplexity") == f"| perplexity | {perplexity(model, IDS)} |"
    assert row(card, "dense perplexity") == "| dense perplexity | 12.35 |"
    assert "AutoModelForCausalLM.from_pretrained" in card
    written = json.loads(card.partition("```json\n")[2].partition("```")[0])
    assert Recipe.from_dict(written).rules == TIED.rules


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_of_a_folder_is_that_of_its_model(kind, tmp_path):
    model = tiny("gpt2", torch.float32)
    KINDS[kind](model)
    save(model, tmp_path / "small")
    assert model_card(tmp_path / "small") == (tmp_path / "small" / "README.md").read_text()
    assert f"{size(model).parameters:,}" in row(model_card(model), "parameters")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factorize_folder_writes_the_card_that_save_writes(tmp_path, dtype):
    folder = folder_of(tmp_path, "llama", dtype)
    factorize_folder(folder, TIED, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    save(load(tmp_path / "out"), tmp_path / "again", base="dense")
    other = (tmp_path / "again" / "README.md").read_text()
    assert [line for line in card.splitlines() if "MB on disk" not in line] == [line for line in other.splitlines() if "MB on disk" not in line]
    assert card == model_card(tmp_path / "out", base="dense")
    assert f"dense at {8 * dtype.itemsize} bits" in card


def test_the_card_names_the_dense_model_as_it_was_asked_for(tmp_path, monkeypatch):
    """And not the cache's folder for it."""
    dense = folder_of(tmp_path, "llama")
    monkeypatch.setattr("tnlib.stream.fetch", lambda name: dense)
    factorize_folder("someone/tiny", TIED, tmp_path / "out")
    assert "base_model: someone/tiny\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = tiny("llama", torch.float32)
    factorize_(model, TIED)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="full is there already; needed a new folder"):
        save(model, tmp_path / "full")
    monkeypatch.setattr(tnlib.saving, "model_card", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(model, tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# ---- formats


def test_a_checkpoint_of_another_format_is_brought_up_to_date_or_refused_with_a_way_out(tmp_path, monkeypatch):
    model = tiny("llama", torch.float32)
    factorize_(model, TIED)
    save(model, tmp_path / "small")
    path = tmp_path / "small" / "config.json"
    config = json.loads(path.read_text())

    def written(version):
        config["quantization_config"]["format_version"] = version
        path.write_text(json.dumps(config))
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")

    with pytest.raises(ValueError, match=rf"got format_version={FORMAT + 1}; this tnlib reads \[{FORMAT}\]. Update tnlib"):
        written(FORMAT + 1)
    for other in (FORMAT - 1, None):
        with pytest.raises(ValueError, match=rf"got format_version={other}; .* call model.dequantize\(\) and save"):
            written(other)
    # what a later version will do for this one
    monkeypatch.setattr(tnlib.checkpoint, "FORMAT", FORMAT + 1)
    with pytest.raises(ValueError, match="Load it with the tnlib that wrote it"):
        written(FORMAT)
    old, new = config["quantization_config"].pop("modules"), config["quantization_config"]
    new["layers"] = old
    monkeypatch.setitem(
        tnlib.checkpoint.UPGRADES, FORMAT, lambda data: {**{k: v for k, v in data.items() if k != "layers"}, "modules": data["layers"]}
    )
    assert_same(written(FORMAT), model)


def test_a_checkpoint_that_format_1_wrote_still_loads():
    """format_1/ is never written again: a one-block GPT-2 with every kind of layer, its logits beside it."""
    folder = Path(__file__).with_name("format_1")
    assert stored_config(folder)["format_version"] == 1
    model, wanted = load(folder), torch.tensor(json.loads((folder / "logits.json").read_text()))
    with torch.no_grad():
        assert torch.allclose(model(torch.arange(8)[None]).logits, wanted, atol=1e-6)
    kinds = {data["layer"] for data in stored_config(folder)["modules"].values()}
    assert kinds == {"SplitLinear", "FactorizedEmbedding", "FactorizedLinear", "Conv1D", "Embedding"}


def test_a_folder_of_the_time_before_says_how_to_convert_it(tmp_path):
    folder = folder_of(tmp_path, "llama")
    (folder / "tnlib.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the format before the native one .* Run factorize_folder again"):
        load(folder)


def test_sizes_of_another_model_are_refused_by_name(tmp_path):
    model = tiny("llama", torch.float32)
    factorize_(model, TIED)
    save(model, tmp_path / "small")
    path = tmp_path / "small" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 40}))
    with pytest.raises(ShapeError, match=r"module model.layers.0.mlp.down_proj: got a dense Linear \(24, 40\) .* needed \(24, 48\)"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_an_unknown_layer_is_refused():
    data = {"modules": {"lm_head": {"layer": "Tucker", "shape": [96, 24]}}, "format_version": FORMAT}
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    with pytest.raises(ValueError, match=r"unknown layer 'Tucker'; needed one that this tnlib knows. Update tnlib"):
        rebuild(model, TNConfig.from_dict(data))


# ---- a real model


@pytest.mark.asset
def test_smollm2_comes_back_bit_for_bit(tmp_path):
    """Up-projections as low-rank factors in 4 bits and a tied table in 8, bfloat16, with its tokenizer; and dense again."""
    model, tokenizer = load_model("smollm2-135m", dtype=torch.bfloat16), load_tokenizer("smollm2-135m")
    ids = tokenizer("The film is a", return_tensors="pt").input_ids
    chosen = recipe(LowRank(rank=64), "up", blocks=tuple(range(20, 30)))
    factorize_(model, chosen)
    quantize_(model, FOUR)
    quantize_(model, Quantize(bits=8, what="dense", scales="channel"))
    save(model, tmp_path / "small", tokenizer, base="SmolLM2-135M", max_shard_size="50MB")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        seen, wanted = found(ids).logits, model(ids).logits
    assert torch.equal(seen, wanted)
    assert {n: t.dtype for n, t in found.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "small")("The film is a").input_ids == ids[0].tolist()
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    assert Recipe.from_dict(stored_config(tmp_path / "small")["recipe"]).rules == chosen.rules
    assert numbers(row(model_card(tmp_path / "small"), "parameters"))[0] == 134_515_008
    dense = found.dequantize()
    with torch.no_grad():
        assert (dense(ids).logits - wanted).abs().max() <= 0.05 * wanted.abs().max()
    assert replace(size(dense), bytes_by_dtype={}).parameters == 134_515_008
