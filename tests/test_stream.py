"""A checkpoint factorized on disk is the model factorized in memory, bit for bit, however often the work was cut short."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_surgery import IDS, recipe
from tiny import AUTO, LLAMA, tiny

import tnlib.stream
from tnlib.block_low_rank import BlockLowRank
from tnlib.calibrate import calibrate
from tnlib.checkpoint_files import stored_config
from tnlib.kronecker import Kronecker
from tnlib.low_rank import LowRank
from tnlib.plan import report
from tnlib.recipe import Recipe
from tnlib.resume import weights
from tnlib.saving import load
from tnlib.shapes import ShapeError
from tnlib.stream import factorize_folder
from tnlib.surgery import factorize_
from tnlib.tensor_train import TensorTrain
from tnlib.tt_matrix import MPO

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = recipe(MPO(order=2, kept=0.5), "linear")
CASES = {
    "llama": [
        HALF,
        recipe(LowRank(rank=4), "mlp", "embedding"),
        recipe(Kronecker(right=(1, 4), permute="both"), "embedding"),
        recipe(BlockLowRank(bands=3, rank=4), "mlp", "embedding"),
    ],
    "gpt2": [
        recipe(LowRank(rank=5), "qkv", split=3),
        recipe(Kronecker(right=(1, 4)), "embedding", head="dense"),
        recipe(MPO(order=2, max_rank=3), "mlp", init="random"),
        recipe(TensorTrain(order=2, max_rank=5), "mlp", init="als"),
    ],
    "bert": [recipe(LowRank(rank=4), "linear", "embedding")],
    "t5": [recipe(LowRank(rank=4), "attention", "embedding")],
}


def folder_of(path, family, dtype=torch.float32, shards="20KB"):
    """A checkpoint of a tiny model, in several shards, as a folder."""
    tiny(family, dtype).save_pretrained(path / "dense", max_shard_size=shards)
    return path / "dense"


def in_memory(folder, family, recipe, seed=0):
    model = AUTO.get(family, transformers.AutoModelForCausalLM).from_pretrained(folder).eval()
    factorize_(model, recipe, seed=seed)
    return model


def assert_same(one, other):
    a, b = weights(one), weights(other)
    assert list(a) == list(b)
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    extra = {"decoder_input_ids": IDS} if one.config.is_encoder_decoder else {}
    with torch.no_grad():
        assert torch.equal(one(input_ids=IDS, **extra).logits, other(input_ids=IDS, **extra).logits)
    assert report(one) == report(other)


@pytest.mark.parametrize(
    ("family", "case"), [(family, k) for family, cases in CASES.items() for k in range(len(cases))]
)
def test_equals_factorize_in_memory(tmp_path, family, case):
    folder, chosen = folder_of(tmp_path, family), CASES[family][case]
    factorize_folder(folder, chosen, tmp_path / "out", seed=3, shard_mb=0.01)
    found = load(tmp_path / "out")
    assert_same(in_memory(folder, family, chosen, seed=3), found)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert not found.training


@pytest.mark.parametrize("shards", ["20KB", "1GB"])
def test_half_precision_is_decomposed_in_float32_and_stored_as_it_was(tmp_path, shards):
    folder = folder_of(tmp_path, "llama", torch.bfloat16, shards)
    factorize_folder(folder, HALF, tmp_path / "out")
    found = load(tmp_path / "out")
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    assert_same(in_memory(folder, "llama", HALF), found)


def test_tied_weights_are_stored_once_and_shared_again(tmp_path):
    folder = folder_of(tmp_path, "llama")
    factorize_folder(folder, recipe(LowRank(rank=4), "embedding"), tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.lm_head.left is model.model.embed_tokens.left
    assert model.lm_head.error == model.model.embed_tokens.error > 0
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.lm_head.left.grad is not None


def test_the_names_of_a_bare_model_are_found_and_what_the_model_lacks_is_left_out(tmp_path):
    folder = folder_of(tmp_path, "gpt2", shards="1GB")
    stored = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()} | {
        "h.0.attn.bias": torch.ones(2)
    }
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    factorize_folder(folder, recipe(LowRank(rank=3), "mlp"), tmp_path / "out")
    assert_same(in_memory(folder, "gpt2", recipe(LowRank(rank=3), "mlp")), load(tmp_path / "out"))


def test_what_lies_beside_the_weights_is_copied_and_a_finished_folder_is_left_alone(tmp_path):
    folder, out = folder_of(tmp_path, "llama"), tmp_path / "out"
    chosen = recipe(
        MPO(out_modes=(6, 8), in_modes=(4, 6), max_rank=3), "gate", blocks=(0, 1)
    )  # tuples, which JSON has not
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("no")
    factorize_folder(folder, chosen, out)
    assert {"tokenizer.json", "config.json", "model.safetensors.index.json", "README.md"} <= set(os.listdir(out))
    assert "pytorch_model.bin" not in os.listdir(out)
    assert Recipe.from_dict(stored_config(out)["recipe"]) == chosen
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    factorize_folder(folder, chosen, out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(ValueError, match=r"is of another run \(another seed\)"):
        factorize_folder(folder, chosen, out, seed=1)


def test_an_interrupted_run_goes_on_and_finished_shards_are_not_done_again(tmp_path, monkeypatch):
    folder, out, made = folder_of(tmp_path, "llama"), tmp_path / "out", []
    build = tnlib.stream.build

    def counted(*args):
        made.append(args[-1])
        if len(made) == 6:
            raise KeyboardInterrupt
        return build(*args)

    monkeypatch.setattr(tnlib.stream, "build", counted)
    with pytest.raises(KeyboardInterrupt):
        factorize_folder(folder, HALF, out, shard_mb=0.004)
    assert not out.exists()
    finished = len(list((tmp_path / "out.part").glob("*.safetensors")))
    assert finished > 0
    (tmp_path / "out.part" / "model-00009-of-00009.safetensors.new").write_bytes(b"half")
    factorize_folder(folder, HALF, out, shard_mb=0.004)
    assert len(made) < 6 + 14  # of 14 matrices
    assert_same(in_memory(folder, "llama", HALF), load(out))
    assert not (tmp_path / "out.part").exists()
    assert not list(out.glob("*.new"))


KILLED = """
import sys, time, tnlib.stream as stream
from tnlib.low_rank import LowRank
from tnlib.recipe import Recipe, Rule
build = stream.build
def slow(*args):
    print("layer", flush=True)
    time.sleep(0.2)
    return build(*args)
stream.build = slow
recipe = Recipe(name="test", rules=(Rule(where="mlp", form=LowRank(rank=4)),))
stream.factorize_folder(sys.argv[1], recipe, sys.argv[2], shard_mb=0.004)
"""


def test_a_killed_process_leaves_no_half_written_shard(tmp_path):
    folder, out, chosen = folder_of(tmp_path, "llama"), tmp_path / "out", recipe(LowRank(rank=4), "mlp")
    process = subprocess.Popen([sys.executable, "-c", KILLED, folder, out], stdout=subprocess.PIPE, text=True)
    for _ in range(4):
        assert process.stdout.readline() == "layer\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert stored_config(tmp_path / "out.part")["run"]
    factorize_folder(folder, chosen, out, shard_mb=0.004)
    assert_same(in_memory(folder, "llama", chosen), load(out))


def live_bytes():
    """Bytes of all tensors that are alive in this process, each storage once."""
    found = [
        x.untyped_storage() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path, monkeypatch):
    chosen = recipe(LowRank(rank=4), "linear", "embedding")
    build, save, peaks = tnlib.stream.build, tnlib.stream.save_file, {2: [], 5: []}
    for layers, seen in peaks.items():
        before = live_bytes()

        def measured(function, *args, seen=seen, before=before, **options):
            result = function(*args, **options)
            seen.append(live_bytes() - before)
            return result

        monkeypatch.setattr(tnlib.stream, "build", partial(measured, build))
        monkeypatch.setattr(tnlib.stream, "save_file", partial(measured, save))
        config = transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": layers})
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / f"dense{layers}")
        factorize_folder(tmp_path / f"dense{layers}", chosen, tmp_path / f"{layers}", shard_mb=0.02)
    small, large = (max(seen) for seen in peaks.values())
    added = 3 * 4 * (24 * 48 * 3 + 24 * 24 * 2)  # bytes of less than the matrices of the three blocks that were added
    assert large - small < added / 6
    assert small > 4 * 24 * 48  # the measure sees the matrix that is being decomposed


def _truncate(folder):
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])


def _nan(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def _config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = [
    ("20KB", _truncate, r"safetensors cannot be read .*needed a whole safetensors file"),
    ("20KB", lambda folder: sorted(folder.glob("*.safetensors"))[0].unlink(), "cannot be read"),
    ("1GB", _nan, r"recipe 'test', module model.layers.1.mlp.up_proj: .* 1 of 1152 entries NaN or infinite"),
    (
        "1GB",
        lambda folder: _config(folder, num_hidden_layers=3),
        "lacks 9 parameters of LlamaForCausalLM, model.layers.2.",
    ),
    (
        "1GB",
        lambda folder: _config(folder, intermediate_size=40),
        r"has model.layers.0.mlp.* \(48, 24\); needed \(40, 24\)",
    ),
    ("1GB", lambda folder: _config(folder, architectures=["Nothing"]), "needed a model class of transformers"),
]


@pytest.mark.parametrize(("shards", "damage", "words"), DAMAGE)
def test_damage_is_named_and_nothing_is_left_under_the_folder_s_name(tmp_path, shards, damage, words):
    folder = folder_of(tmp_path, "llama", shards=shards)
    damage(folder)
    with pytest.raises((ValueError, ShapeError), match=words):
        factorize_folder(folder, recipe(MPO(order=2, max_rank=2), "mlp"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_and_the_work_goes_on_afterwards(tmp_path, monkeypatch):
    folder, out, save = folder_of(tmp_path, "llama"), tmp_path / "out", tnlib.stream.save_file
    written = []

    def full(tensors, path, **options):
        written.append(path)
        if len(written) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, **options)

    monkeypatch.setattr(tnlib.stream, "save_file", full)
    with pytest.raises(
        OSError, match=r"model-00003-of-\d+.safetensors could not be written .*No space left.* Make room"
    ):
        factorize_folder(folder, HALF, out, shard_mb=0.01)
    assert len(list((tmp_path / "out.part").glob("model-*"))) == 2
    factorize_folder(folder, HALF, out, shard_mb=0.01)
    assert_same(in_memory(folder, "llama", HALF), load(out))


def test_folders_that_are_not_ours_are_refused(tmp_path):
    folder = folder_of(tmp_path, "llama")
    with pytest.raises(ValueError, match="the checkpoint itself; needed another folder"):
        factorize_folder(folder, HALF, folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"full holds other files; needed a new folder"):
        factorize_folder(folder, HALF, tmp_path / "full")
    factorize_folder(folder, HALF, tmp_path / "done")
    with pytest.raises(ValueError, match="is compressed already, by tnlib; needed a dense checkpoint"):
        factorize_folder(tmp_path / "done", HALF, tmp_path / "twice")
    (tmp_path / "empty").mkdir()
    factorize_folder(folder, HALF, tmp_path / "empty")
    shutil.rmtree(folder)
    assert load(tmp_path / "empty").config.num_hidden_layers == 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_calibration_is_used_on_disk_as_in_memory(family, tmp_path):
    folder, wanted = folder_of(tmp_path, family), recipe(MPO(order=2, kept=0.5), "mlp")
    dense = AUTO.get(family, transformers.AutoModelForCausalLM).from_pretrained(folder).eval()
    stats = calibrate(dense, IDS, wanted, out=tmp_path / "stats")
    factorize_(dense, wanted, stats, fit={"shrink": 0.5})
    factorize_folder(folder, wanted, tmp_path / "out", stats, fit={"shrink": 0.5})
    assert_same(load(tmp_path / "out"), dense)
    with pytest.raises(ValueError, match="another calibration"):
        factorize_folder(folder, wanted, tmp_path / "out", stats)
    with pytest.raises(ValueError, match=r"stats of [46] modules"):
        factorize_folder(folder, recipe(LowRank(rank=2), "linear"), tmp_path / "other", stats)
