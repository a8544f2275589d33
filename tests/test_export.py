"""torch.export, ONNX in onnxruntime, and torch.compile of compressed models: one graph for all token counts, nothing timed."""

import pytest
import torch
from tiny import tiny
from torch import nn
from torch._dynamo.testing import CompileCounter

from tnlib import choose, machine
from tnlib.depth import block_stack
from tnlib.factorized import materialize_
from tnlib.kronecker import Kronecker
from tnlib.layers import FactorizedLinear
from tnlib.low_rank import LowRank
from tnlib.quant import FakeQuantize, Quantize
from tnlib.quantize import Between, quantize_
from tnlib.recipe import Recipe, Rule
from tnlib.surgery import factorize_
from tnlib.tensor_train import TensorTrain
from tnlib.tt_matrix import MPO

LOW, KRON, PERMUTED = LowRank(rank=6), Kronecker(right=(2, 2), terms=2), Kronecker(right=(2, 3), terms=2, permute="both")
TRAIN, TTM = TensorTrain(order=2, max_rank=5), MPO(order=3, max_rank=6)
FORMS = [LOW, KRON, PERMUTED, TRAIN, TTM]
MIXED = {  # every form in one model; the head is tied to the embedding
    "llama": {"*.mlp.up_proj": LOW, "*.mlp.gate_proj": PERMUTED, "*.mlp.down_proj": TTM, "*.self_attn.q_proj": TRAIN, "*.self_attn.o_proj": KRON},
    "gpt2": {"*.mlp.c_fc": TTM, "*.mlp.c_proj": PERMUTED, "*.attn.c_proj": TRAIN},
}
TABLE = {"llama": MPO(out_modes=(5, 5, 4), in_modes=(2, 3, 4), max_rank=6, pad_rows=True), "gpt2": LOW}
SIZES = [(2, 9), (3, 17), (1, 1)]  # batch, tokens; a graph is captured with the first
ATOL = 1e-4  # what is promised for onnxruntime: other kernels, float32, logits of size 1
FOUR, EIGHT = Quantize(bits=4, scales="channel"), Quantize(bits=8)


@pytest.fixture
def untimed(monkeypatch):
    """A graph must come out alike on any machine, busy or not."""

    def refuse(*_):
        raise AssertionError("a plan was timed")

    with monkeypatch.context() as patch:
        patch.setattr(choose, "time_in_turns", refuse)
        patch.setattr(machine, "_measured", refuse)
        yield patch


def ids(size, seed=0):
    return torch.randint(2, 90, size, generator=torch.Generator().manual_seed(seed))


def mixed(family):
    """A model with every form, a factorized embedding and its head; of GPT-2 also q, k, v, three in one layer."""
    blocks, table = {"llama": ("model.layers.", "model.embed_tokens"), "gpt2": ("transformer.h.", "transformer.wte")}[family]
    rules = [Rule(where=blocks + where, form=form) for where, form in MIXED[family].items()]
    if family == "gpt2":
        rules.append(Rule(where=f"{blocks}*.attn.c_attn", form=KRON, split=3))
    return compressed(family, *rules, Rule(where=table, form=TABLE[family]))


def compressed(family, *rules):
    """A tiny float32 model of one block: what a graph makes of two is the same, and takes twice as long."""
    model = tiny(family, torch.float32)
    del block_stack(model, "test")[1][1]
    model.config.num_hidden_layers = 1
    if rules:
        factorize_(model, Recipe(name="t", rules=rules))
    model.config.use_cache = False
    return model.eval()


def exported(model):
    """torch.export's graph as a function ids -> logits, for any batch and number of tokens."""
    sizes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    module = torch.export.export(model, (), {"input_ids": ids(SIZES[0])}, dynamic_shapes=sizes).module()
    return lambda tokens: module(input_ids=tokens).logits


def in_onnxruntime(model, path, x, name="input_ids", given=True):
    """The same in onnxruntime, by the call that README shows. given: the input goes by name."""
    onnxruntime = pytest.importorskip("onnxruntime")
    how = {"kwargs": {name: x}, "dynamic_shapes": {name: {0: "batch", 1: "tokens"}}} if given else {"dynamic_shapes": ({0: "batch", 1: "tokens"},)}
    torch.onnx.export(model, () if given else (x,), path, dynamo=True, verbose=False, input_names=[name], output_names=["out"], **how)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["out"], {name: x.numpy()})[0])


def differ(run, model):
    """The largest difference between a graph's logits and the model's own, over SIZES."""
    with torch.no_grad():
        return max(float((run(ids(size, 1)) - model(input_ids=ids(size, 1)).logits).abs().max()) for size in SIZES)


# ---- torch.export


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_exported_model_serves_all_token_counts(form, untimed):
    model = compressed("llama", *(Rule(where=where, form=form) for where in ("mlp", "attention", "embedding")))
    run = exported(model)
    untimed.undo()
    assert differ(run, model) < 1e-5


@pytest.mark.parametrize("policy", ["never", "always"])
def test_an_exported_gpt2_with_split_attention(policy):
    model = mixed("gpt2")
    materialize_(model, policy)
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=ids((2, 9)))  # what evaluation keeps is not what a graph holds
    assert differ(exported(model), model) < 1e-5


@pytest.mark.parametrize("grid", [FOUR, EIGHT, Quantize(bits=4, what="dense", scales=12)], ids=["4", "8", "dense 4"])
def test_an_exported_model_of_packed_integers(grid):
    model = compressed("llama") if grid.what == "dense" else mixed("llama")
    quantize_(model, grid)
    assert differ(exported(model), model) < 1e-5


def test_grids_between_the_cores_are_exported_for_all_token_counts():
    layer = nn.Sequential(FactorizedLinear(TTM, (48, 24))).double().eval()
    layer[0].between = Between(Quantize(bits=8, activation_bits=4))
    with torch.no_grad():
        layer(torch.randn(9, 24, dtype=torch.float64))
    layer[0].between.observing = False
    graph = torch.export.export(layer, (torch.randn(9, 24, dtype=torch.float64),), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    for tokens in (9, 40, 1):
        x = torch.randn(tokens, 24, dtype=torch.float64)
        assert torch.equal(graph.module()(x), layer(x))  # float64: no number changes its side of a step


# ---- ONNX


@pytest.mark.parametrize(("family", "grid"), [("llama", None), ("gpt2", FOUR)], ids=["llama", "gpt2, 4 bits"])
def test_a_compressed_model_in_onnxruntime(family, grid, tmp_path):
    model = mixed(family)
    if grid is not None:
        quantize_(model, grid)
    run = in_onnxruntime(model, tmp_path / "model.onnx", ids(SIZES[0]))
    assert differ(run, model) < ATOL


@pytest.mark.parametrize(("form", "grid", "share"), [(MPO(order=3, kept=0.5), None, 0.55), (LowRank(kept=0.5), FOUR, 0.1)], ids=["MPO", "low rank, 4 bits"])
def test_a_real_layer_in_onnxruntime_stays_small_on_disk(form, grid, share, tmp_path):
    """SmolLM2-135M's up-projection; share: of the dense layer's bytes, weights and graph."""
    layer = nn.Sequential(FactorizedLinear(form, (1536, 576), bias=False)).eval()
    if grid is not None:
        quantize_(layer, grid)
    run = in_onnxruntime(layer, tmp_path / "layer.onnx", torch.randn(1, 7, 576), "x", given=False)
    for size in [(1, 7), (2, 33)]:
        x = torch.randn(*size, 576)
        with torch.no_grad():
            assert torch.allclose(run(x), layer(x), atol=ATOL)
    assert sum(path.stat().st_size for path in tmp_path.glob("layer.onnx*")) < share * 4 * 1536 * 576


# ---- torch.compile


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_whole_model_compiles_to_one_graph(family):
    torch._dynamo.reset()  # its limit of graphs is one for all models of a process
    model, counter = mixed(family), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    sizes = SIZES[:2]  # torch makes a graph of its own for a size of 1
    with torch.no_grad():
        for size in sizes:
            assert torch.allclose(compiled(input_ids=ids(size)).logits, model(input_ids=ids(size)).logits, atol=1e-5)
    assert counter.frame_count == 1


def test_compiled_training_has_the_gradients_of_eager():
    torch._dynamo.reset()
    model = mixed("llama").double().train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for run in (model, compiled):
        model.zero_grad()
        run(input_ids=ids((2, 9)), labels=ids((2, 9))).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    eager, graph = found
    assert len(eager) > 15
    assert set(graph) == set(eager)
    assert all(torch.allclose(graph[name], eager[name], rtol=1e-6, atol=1e-9) for name in eager)


@pytest.mark.parametrize("learn", ["plain", "lsq"])
def test_a_compiled_grid_rounds_to_the_bit_and_learns_as_eager_does(learn):
    torch._dynamo.reset()
    x = torch.randn(12, 9, dtype=torch.float64, requires_grad=True)
    grid = FakeQuantize(x, Quantize(bits=3, learn=learn, start="percentile", scales=5))  # some numbers are outside
    with torch.no_grad():
        grid.scale.mul_(0.7)[0] *= -1  # as a step of training may
    compiled = torch.compile(grid, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), grid(x))
    slopes = torch.randn(12, 9, dtype=torch.float64)
    found = [torch.autograd.grad((run(x) * slopes).sum(), (x, grid.scale)) for run in (grid, compiled)]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found))
