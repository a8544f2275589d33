"""shapes: unfolding inverts, modes multiply, weights turn at the border, bad input is refused with a remedy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from tnlib.shapes import ShapeError, balanced_modes, check_weight, fold, prime_factors, unfold, weight_of


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_fold_inverts_unfold(shape, data):
    mode = data.draw(st.integers(0, len(shape) - 1))
    x = torch.arange(float(math.prod(shape))).reshape(shape)
    assert unfold(x, mode).shape == (shape[mode], math.prod(shape) // shape[mode])
    assert torch.equal(fold(unfold(x, mode), mode, shape), x)


@given(st.integers(2, 5000), st.integers(1, 4))
def test_balanced_modes_multiply_or_say_why(size, order):
    if len(prime_factors(size)) < order:
        with pytest.raises(ShapeError, match="pad the axis"):
            balanced_modes(size, order)
    else:
        modes = balanced_modes(size, order)
        assert math.prod(modes) == size
        assert len(modes) == order
        assert list(modes) == sorted(modes)


@pytest.mark.parametrize(
    ("size", "order", "modes"),
    [(576, 3, (8, 8, 9)), (1536, 3, (8, 12, 16)), (768, 3, (8, 8, 12)), (4096, 3, (16, 16, 16)), (768, 2, (24, 32))],
)
def test_balanced_modes_of_real_sizes(size, order, modes):
    assert balanced_modes(size, order) == modes


def test_prime_size_names_its_factors_and_a_padded_size():
    with pytest.raises(
        ShapeError, match=r"size 50257 has no 3 modes.*\(29, 1733\).*Use order <= 2.*pad the axis to \d+"
    ):
        balanced_modes(50257, 3)


def test_weight_of_turns_conv1d():
    layer = Conv1D(6, 4)  # stored (in, out) = (4, 6)
    assert weight_of(layer).shape == (6, 4)
    assert torch.equal(weight_of(layer), layer.weight.T)
    with pytest.raises(ShapeError, match="LayerNorm"):
        weight_of(torch.nn.LayerNorm(3))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.tensor([[1.0, float("nan")]]), "1 of 2 entries NaN or infinite"),
        (torch.tensor([[1.0, float("inf")]]), "reload it"),
        (torch.zeros(3), "needed a non-empty"),
        (torch.zeros(0, 3), "needed a non-empty"),
        (torch.ones(2, 2, dtype=torch.int8), "floating-point"),
    ],
)
def test_bad_weights_are_refused(bad, words):
    with pytest.raises(ShapeError, match=words):
        check_weight(bad, "module transformer.h.0")
