"""Layers: drop-in for Linear, Conv1D and Embedding, in every dtype and batch shape, trainable, compilable, copyable."""

import copy

import pytest
import torch
from conftest import SHAPE
from torch import nn
from transformers.pytorch_utils import Conv1D

from tnlib import lookup
from tnlib.block_low_rank import BlockLowRank
from tnlib.kronecker import Kronecker
from tnlib.layers import FactorizedEmbedding, FactorizedLinear, SplitLinear
from tnlib.low_rank import LowRank
from tnlib.shapes import ShapeError
from tnlib.tensor_ring import TensorRing
from tnlib.tt_matrix import MPO

OUT, IN = SHAPE


def linear(bias=True, dtype=torch.float64):
    layer = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (2, 1, 4), (0,), (2, 0)])
def test_equals_the_dense_layer_of_its_own_weight(form, bias, batch):
    layer = FactorizedLinear.from_dense(linear(bias), form)
    x = torch.randn(*batch, IN, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    assert layer(x).shape == (*batch, OUT)
    assert torch.allclose(layer(x), expected, atol=1e-10)
    assert (layer.bias is not None) == bias


def test_full_rank_equals_the_layer_it_replaced():
    for dense in (linear(), linear(False)):
        layer = FactorizedLinear.from_dense(dense, MPO(order=3))
        x = torch.randn(5, IN, dtype=torch.float64)
        assert torch.allclose(layer(x), dense(x), atol=1e-10)


def test_conv1d_equals_linear_of_its_transpose():
    conv, dense = Conv1D(OUT, IN).double(), linear()
    with torch.no_grad():
        dense.weight.copy_(conv.weight.T)
        dense.bias.copy_(conv.bias.normal_())
    form, x = LowRank(rank=9), torch.randn(3, IN, dtype=torch.float64)
    layer = FactorizedLinear.from_dense(conv, form)
    assert torch.allclose(layer(x), FactorizedLinear.from_dense(dense, form)(x), atol=1e-12)
    back = layer.to_dense()
    assert type(back) is Conv1D
    assert torch.allclose(back(x), layer(x), atol=1e-10)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.1), (torch.float16, 1e-2), (torch.float32, 1e-5)])
def test_dtypes_are_kept(form, dtype, atol):  # atol: a few units of each format's own rounding, on outputs of size 1
    layer = FactorizedLinear.from_dense(linear(dtype=dtype), form)
    x = torch.randn(6, IN, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert torch.allclose(y.double(), x.double() @ layer.weight.double().T + layer.bias.double(), atol=atol)


def test_gradients_reach_every_factor_and_agree_with_the_dense_weight(form):
    layer = FactorizedLinear.from_dense(linear(), form)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
    x_grad, x.grad = x.grad.clone(), None
    layer.zero_grad()
    nn.functional.linear(x, layer.weight, layer.bias).square().sum().backward()  # the slow way, by the rebuilt weight
    assert set(grads) == {*layer.factors, "bias"}
    assert all(torch.allclose(grads[name], p.grad, atol=1e-9) for name, p in layer.named_parameters())
    assert torch.allclose(x.grad, x_grad, atol=1e-9)


def test_predicted_params_repr_and_error(form):
    layer = FactorizedLinear.from_dense(linear(), form)
    assert layer.num_params() == sum(p.numel() for p in layer.parameters())
    assert str(form) in repr(layer)
    assert "kept=" in repr(layer)
    assert layer.flops(7) == form.flops(SHAPE, 7)


def test_copy_and_state_dict_round_trip(form):
    layer, x = FactorizedLinear.from_dense(linear(), form), torch.randn(3, IN, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    fresh = FactorizedLinear(form, SHAPE, dtype=torch.float64)
    assert not torch.allclose(fresh(x), layer(x))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(twin(x), layer(x))  # a copy owns its factors


def test_the_decomposition_leaves_the_random_stream_alone():
    dense = linear()
    before = torch.get_rng_state()
    FactorizedLinear.from_dense(dense, LowRank(rank=3))
    assert torch.equal(before, torch.get_rng_state())


def test_random_initialization_has_the_variance_of_the_weight():
    dense = nn.Linear(96, 64)
    layer = FactorizedLinear.from_dense(dense, MPO(order=2, max_rank=16), "random", torch.Generator().manual_seed(3))
    assert abs(layer.weight.std() / dense.weight.std() - 1) < 0.15
    assert 1.2 < layer.error < 1.6  # two independent matrices of equal norm are sqrt(2) apart


@pytest.mark.parametrize("form", [LowRank(rank=5), Kronecker(right=(2, 3), terms=2), MPO(order=3, max_rank=6), BlockLowRank(rank=5), TensorRing(order=3, rank=3)], ids=str)
def test_compiles_and_serves_other_token_counts(form):
    torch._dynamo.reset()  # its limit of graphs is one for all layers of a process
    layer = FactorizedLinear.from_dense(linear(dtype=torch.float32), form)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for tokens in (1, 5, 64):
        x = torch.randn(tokens, IN)
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)  # float32


def test_autocast_runs_in_bfloat16():
    layer = FactorizedLinear.from_dense(linear(dtype=torch.float32), MPO(order=3, max_rank=6))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, IN)).dtype == torch.bfloat16


def test_meta_layers_have_shapes_and_no_values():
    with torch.device("meta"):
        layer = FactorizedLinear.from_dense(nn.Linear(IN, OUT), LowRank(rank=3))
    assert layer.left.is_meta
    assert layer(torch.empty(2, IN, device="meta")).shape == (2, OUT)


def test_wrong_input_width_and_wrong_form_are_refused():
    layer = FactorizedLinear.from_dense(linear(), LowRank(rank=3))
    with pytest.raises(ShapeError, match=r"needed \(…, 36\)"):
        layer(torch.randn(2, IN + 1, dtype=torch.float64))
    with pytest.raises(ShapeError, match="needed a Form"):
        FactorizedLinear("kron", SHAPE)
    dense = linear()
    with torch.no_grad():
        dense.weight[0, 0] = float("nan")
    with pytest.raises(ShapeError, match="NaN"):
        FactorizedLinear.from_dense(dense, LowRank(rank=3))


@pytest.mark.parametrize(
    "ids", [torch.tensor(3), torch.tensor([0, 23]), torch.tensor([[1, 1], [2, 7]]), torch.zeros(0, dtype=torch.long)]
)
def test_embedding_looks_up_rows_of_its_own_table(form, ids):
    layer = FactorizedEmbedding.from_dense(nn.Embedding(OUT, IN, padding_idx=0).double(), form)
    assert torch.allclose(layer(ids), nn.functional.embedding(ids, layer.weight), atol=1e-10)
    assert layer(ids).shape == (*ids.shape, IN)
    layer(ids).square().sum().backward()
    assert layer.to_dense().weight.shape == (OUT, IN)


def test_embedding_refuses_what_it_cannot_do():
    with pytest.raises(ShapeError, match="max_norm"):
        FactorizedEmbedding.from_dense(nn.Embedding(8, 4, max_norm=1.0), LowRank(rank=2))
    layer = FactorizedEmbedding.from_dense(nn.Embedding(8, 4), LowRank(rank=2))
    with pytest.raises(IndexError, match=r"needed 0\.\.7"):
        layer(torch.tensor([8]))


def test_many_look_ups_merge_the_halves_and_agree():
    form = MPO(out_modes=(8, 8, 8), in_modes=(4, 4, 4), max_rank=6).resolve((512, 64))
    layer = FactorizedEmbedding(form, (512, 64), dtype=torch.float64)
    ids = torch.randint(512, (5000,))
    assert torch.allclose(layer(ids), layer.weight[ids], atol=1e-10)


@pytest.mark.parametrize("count", [1, 7, 300])
def test_look_ups_by_blocks_are_those_of_all_at_once(monkeypatch, count):
    form = MPO(out_modes=(8, 4, 4, 4), in_modes=(4, 2, 2, 4), max_rank=6).resolve((512, 64))
    layer, ids = FactorizedEmbedding(form, (512, 64)).eval(), torch.randint(512, (count,))
    with torch.no_grad():
        for _, groups in form.row_groups((512, 64)):
            found = lookup.tables(form.paired(layer.factors), groups)
            monkeypatch.setattr(lookup, "BLOCK", 1 << 40)
            whole = lookup.look_up(ids, found)
            monkeypatch.setattr(lookup, "BLOCK", 1 << 12)
            assert torch.equal(lookup.look_up(ids, found), whole)
        assert torch.allclose(layer(ids), layer.weight[ids], atol=1e-6)


def test_split_equals_the_bands_on_their_own():
    fused = Conv1D(3 * OUT, IN).double()
    with torch.no_grad():
        fused.bias.normal_()
    layer, x = SplitLinear.from_dense(fused, LowRank(rank=4), split=3), torch.randn(2, 5, IN, dtype=torch.float64)
    bands = [FactorizedLinear.from_dense(band, LowRank(rank=4)).weight for band in fused.weight.T.chunk(3)]
    assert torch.allclose(layer.weight, torch.cat(bands), atol=1e-10)
    assert torch.allclose(layer(x), x @ torch.cat(bands).T + fused.bias, atol=1e-10)
    assert torch.allclose(layer.to_dense()(x), layer(x), atol=1e-10)
    assert 0 < layer.error < 1
    with pytest.raises(ShapeError, match="multiple of split=5"):
        SplitLinear.from_dense(fused, LowRank(rank=4), split=5)
