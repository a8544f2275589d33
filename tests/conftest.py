"""Shared by all tests: fixed seeds, and the forms that most tables run over."""

import signal

import pytest
import torch

from tnlib.block_low_rank import BlockLowRank
from tnlib.kronecker import Kronecker
from tnlib.low_rank import LowRank
from tnlib.tensor_ring import TensorRing
from tnlib.tensor_train import TensorTrain
from tnlib.tt_matrix import TTMatrix

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHAPE = (24, 36)  # (out, in): small, not square, many divisors
FORMS = [
    LowRank(rank=5),
    LowRank(kept=0.5),
    BlockLowRank(rank=5),
    BlockLowRank(bands=3, kept=0.6),
    BlockLowRank(bands=1, rank=4),
    Kronecker(right=(2, 3), terms=2),
    Kronecker(left=(4, 3), terms=3, scaled=True),
    Kronecker(right=(2, 1)),
    Kronecker(right=(24, 1)),
    Kronecker(right=(2, 2), kept=0.6),
    Kronecker(right=(2, 3), terms=2, permute="both"),
    Kronecker(left=(2, 3), terms=2, scaled=True, permute="rows"),
    Kronecker(right=(1, 4), permute="columns", search="damped"),
    TensorTrain(order=2, max_rank=5),
    TensorTrain(order=3, kept=0.5),
    TensorTrain(in_modes=(6, 6), out_modes=(4, 3, 2), ranks=(1, 3, 7, 5, 2, 1)),
    TensorTrain(order=2, ranks=(1, 9, 9, 9, 1), redundant=True),
    TTMatrix(order=3, max_rank=6),
    TTMatrix(order=2, kept=0.5),
    TTMatrix(order=1),
    TensorRing(order=3, rank=3),
    TensorRing(order=2, kept=0.6),
    TTMatrix(out_modes=(5, 5, 1), in_modes=(3, 3, 4), max_rank=4, pad_rows=True),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Tiny models gain nothing from threads, and on busy cores threads that wait for each other spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=FORMS, ids=str)
def form(request):
    return request.param.resolve(SHAPE)


@pytest.fixture
def weight():
    return torch.randn(SHAPE, dtype=torch.float64)
