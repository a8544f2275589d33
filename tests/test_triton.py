"""triton_kernels: every kernel against float64 in Triton's interpreter, on a CPU, in a process of its own; and what it refuses."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tnlib
from tnlib.kronecker import Kronecker
from tnlib.layers import FactorizedLinear
from tnlib.low_rank import LowRank
from tnlib.shapes import ShapeError
from tnlib.triton_kernels import kronecker_linear, low_rank_linear, use_triton_

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'tnlib[gpu]'"
)
# Rounding to 16 bits, of the intermediate result too; to bfloat16 the interpreter cuts bits off where a GPU rounds.
TOLERANCE = {"float32": 1e-6, "bfloat16": 1.2e-2, "float16": 8e-4}


@functools.cache
def interpreted():
    """What triton_worker.py found."""
    paths = [str(Path(tnlib.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "triton_worker.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_every_case_is_near_float64():
    table = interpreted()["table"]
    assert len(table) == 9 * (4 * 3 + 1)
    for name, (dtype, error, _) in table.items():
        assert name.endswith(dtype.removeprefix("torch."))
        assert 0 < error < TOLERANCE[dtype.removeprefix("torch.")], (name, error)


@needs_triton
def test_integers_come_out_exact():
    assert all(exact for _, _, exact in interpreted()["integers"].values())


@needs_triton
def test_a_second_call_gives_the_same_bits_and_leaves_no_counts():
    assert interpreted()["repeated"] == [True, 0]


@needs_triton
def test_layers_are_switched_and_back():
    found = interpreted()["switched"]
    assert found.pop("switched") == [True] * 4 + [False]  # the last one's right factor is 18 x 12
    assert 0 < found.pop("error") < 1e-5  # float32, sums in another order
    assert all(found.values()), found


def test_shapes_that_do_not_chain_are_refused():
    x = torch.randn(2, 12)
    with pytest.raises(ShapeError, match=r"left \(6, 3\), right \(4, 12\); needed \(out, rank\) and \(rank, in\)"):
        low_rank_linear(x, torch.randn(6, 3), torch.randn(4, 12))
    with pytest.raises(ShapeError, match=r"r0 and r1 at most 16.*Use FactorizedLinear"):
        kronecker_linear(x, torch.randn(1, 6, 4), torch.randn(1, 17, 3))
    with pytest.raises(ShapeError, match=r"got x \(2, 12\), bias \(5,\); needed \(…, 12\) and \(6,\)"):
        low_rank_linear(x, torch.randn(6, 3), torch.randn(3, 12), torch.randn(5))
    with pytest.raises(ValueError, match=r"got torch.float32 on cpu, torch.float64 on cpu; needed bfloat16"):
        low_rank_linear(x, torch.randn(6, 3).double(), torch.randn(3, 12))


def test_gradients_take_plain_products():
    x, bias = torch.randn(2, 3, 12), torch.randn(8)
    left, right = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 2, 2)
    dense = sum(torch.kron(a, b) for a, b in zip(left, right))  # (8, 12)
    torch.testing.assert_close(kronecker_linear(x, left, right, bias), x @ dense.T + bias)
    left, right = torch.randn(8, 3, requires_grad=True), torch.randn(3, 12)
    torch.testing.assert_close(low_rank_linear(x, left, right, bias), x @ (left @ right).T + bias)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    model = nn.Sequential(FactorizedLinear(LowRank(rank=3), (8, 12)))
    with pytest.raises(RuntimeError, match="use_triton_: torch finds no GPU; needed CUDA"):
        use_triton_(model)
    assert type(model[0]) is FactorizedLinear
    with torch.no_grad(), pytest.raises(RuntimeError, match="low_rank_linear: torch finds no GPU"):
        low_rank_linear(torch.randn(2, 12), torch.randn(8, 3), torch.randn(3, 12))


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("tnlib.triton_programs.tl", None)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"triton cannot be imported.*pip install 'tnlib\[gpu\]'"):
        use_triton_(nn.Sequential(FactorizedLinear(Kronecker(right=(2, 1)), (8, 12))))


def test_nothing_to_switch(monkeypatch):
    monkeypatch.setattr("tnlib.triton_kernels.load", lambda where: None)
    with pytest.raises(ShapeError, match="no LowRank or Kronecker layers, right factor at most 16 x 16"):
        use_triton_(nn.Sequential(nn.Linear(3, 3)))
