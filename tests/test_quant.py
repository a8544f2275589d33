"""Integer grids and how they are packed: what is kept, what is cut, every gradient against its definition, fake equal to real."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnlib import tt_matrix
from tnlib.packing import Packed, QuantizedEmbedding, pack, packed_bytes, unpack
from tnlib.quant import (
    PERCENTILE,
    PIECE,
    FakeQuantize,
    Quantize,
    QuantizeError,
    blocks,
    round_to_grid,
    start_scale,
    unblocks,
)

BITS = range(2, 9)
SCALES = ("tensor", "channel", 5)
SHAPES = [(6, 10), (3, 7, 4), (2, 3, 5, 2), (1, 1), (9,)]


def grid_of(tensor, **changes):
    """A FakeQuantize that starts from `tensor`."""
    return FakeQuantize(tensor, Quantize(**({"bits": 4} | changes)))


# ---- round_to_grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_of_the_grid_are_fixed(dtype):
    """k becomes k for every integer of the grid, whatever the scale."""
    scale = 10 ** torch.empty(500, 1, dtype=dtype).uniform_(-9, 9)
    codes = torch.arange(-128, 128, dtype=dtype)
    assert torch.equal(round_to_grid(scale * codes, scale, -128, 127), codes.expand(500, -1))


def test_ties_go_to_even_and_the_rest_is_clipped():
    x = torch.tensor([-9.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 9.0])
    assert round_to_grid(x, 1.0, -8, 7).tolist() == [-8, -2, -2, 0, 0, 2, 2, 6, 7]
    assert round_to_grid(x / 4, 0.25, -2, 1).tolist() == [-2, -2, -2, 0, 0, 1, 1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=2, max_size=40),
    st.floats(1e-3, 1e3),
    st.integers(2, 8),
)
def test_rounding_is_monotone_and_off_by_half_a_step_at_most(numbers, scale, bits):
    x = torch.tensor(sorted(numbers), dtype=torch.float64)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = round_to_grid(x, scale, low, high)
    assert bool((codes.diff() >= 0).all())
    assert codes.min() >= low
    assert codes.max() <= high
    inside = (x >= low * scale) & (x <= high * scale)
    assert bool(((codes * scale - x).abs()[inside] <= scale / 2 * (1 + 1e-12)).all())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.one_of(st.sampled_from(SCALES), st.integers(1, 40)))
def test_unblocks_is_the_inverse_of_blocks(shape, scales):
    x = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    rows = blocks(x, scales)
    assert rows.dim() == 2
    assert torch.equal(unblocks(rows, x.shape, scales), x)
    if isinstance(scales, int):
        assert rows.shape == (math.ceil(x.numel() / scales), scales)


@pytest.mark.parametrize(("shape", "axis"), [((6, 10), 0), ((3, 7, 4), 1), ((2, 3, 5, 2), 1)])
def test_a_channel_is_a_row_or_a_mode(shape, axis):
    """Axis 0 of a matrix; the mode of a core (r, mode, …, r'), the rows of a stack of terms."""
    x = torch.randn(shape)
    rows = blocks(x, "channel")
    assert len(rows) == shape[axis]
    for index, row in enumerate(rows):
        assert torch.equal(row, x.select(axis, index).flatten())


# ---- where a scale starts


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_max_keeps_what_lies_on_the_grid(shape, scales):
    rows = blocks(torch.randint(-7, 8, shape).double(), scales)
    rows[:, 0] = 7
    x = unblocks(rows * 2.0 ** torch.randint(-9, 9, (len(rows), 1)), shape, scales)
    assert torch.equal(grid_of(x, scales=scales)(x), x)


@pytest.mark.parametrize(("bits", "symmetric", "scales"), list(itertools.product(BITS, (True, False), SCALES)))
def test_mse_is_never_worse_than_max_block_by_block(bits, symmetric, scales):
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.float64) ** 3  # heavy tails
        errors = [
            (blocks(grid_of(x, bits=bits, symmetric=symmetric, scales=scales, start=start)(x) - x, scales) ** 2).sum(1)
            for start in ("mse", "max")
        ]
        assert bool((errors[0] <= errors[1]).all())


def test_percentile_clips_the_largest():
    x = torch.cat([torch.linspace(-1, 1, 9999), torch.tensor([100.0])])
    scale, low = start_scale(x[None], 8, start="percentile")
    wanted = x.abs().sort().values[math.ceil(PERCENTILE / 100 * 10_000) - 1]
    assert float(scale) == pytest.approx(float(wanted) / 127)
    assert float(low) == -128
    assert grid_of(x, bits=8, start="percentile")(x)[-1].item() == pytest.approx(float(wanted), rel=1e-6)


def test_lsq_starts_from_the_mean_size():
    x = torch.randn(3, 50, dtype=torch.float64)
    scale, _ = start_scale(x, 4, start="lsq")
    assert torch.allclose(scale[:, 0], 2 * x.abs().mean(1) / math.sqrt(7))


@pytest.mark.parametrize("shift", [-3.0, -0.2, 0.0, 0.7, 30.0])
@pytest.mark.parametrize("bits", BITS)
def test_a_grid_that_is_not_symmetric_covers_the_range_and_holds_zero(bits, shift):
    x = torch.randn(40, 30, dtype=torch.float64) + shift
    scale, low = start_scale(x, bits, symmetric=False)
    high = low + 2**bits - 1
    assert torch.equal(low, low.round())
    assert bool(((low <= 0) & (high >= 0)).all())
    assert bool((x.amin(1, True) >= (low - 0.5) * scale * (1 + 1e-12)).all())  # to half a step, for 0's sake
    assert bool((x.amax(1, True) <= (high + 0.5) * scale * (1 + 1e-12)).all())
    zero = torch.zeros(40, 30, dtype=torch.float64)
    assert torch.equal(round_to_grid(zero, scale, low, high) * scale, zero)


@pytest.mark.parametrize(
    "changes", [{"symmetric": False}, {"start": "mse"}, {"start": "percentile"}, {"start": "lsq"}, {}]
)
def test_zeros_stay_zeros(changes):
    x = torch.zeros(4, 6)
    x[1] = torch.linspace(-1, 1, 6)
    seen = grid_of(x, scales="channel", **changes)(x)
    assert torch.equal(seen[[0, 2, 3]], torch.zeros(3, 6))
    assert seen.isfinite().all()
    assert seen[1].abs().max() > 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_stay(dtype):
    x = torch.randn(6, 10).to(dtype)
    fake = grid_of(x, scales="channel")
    assert fake(x).dtype == dtype
    assert fake.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinite_are_refused(bad):
    x = torch.ones(4, 5)
    x[2, :3] = bad
    with pytest.raises(QuantizeError, match="3 of 20 numbers are NaN or infinite; needed finite"):
        grid_of(x)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 1}, "bits=1; needed a whole number from 2 to 8"),
        ({"bits": 9}, "bits=9; needed a whole number from 2 to 8"),
        ({"bits": True}, "bits=True; needed a whole"),
        ({"bits": 4, "activation_bits": 16}, "activation_bits=16; needed a whole"),
        ({"bits": 4, "what": "all"}, "what='all'; needed one of factors, dense"),
        ({"bits": 4, "when": "before"}, "needed one of during, after"),
        ({"bits": 4, "start": "min"}, "needed one of max, percentile, mse, lsq"),
        ({"bits": 4, "learn": "yes"}, "needed one of plain, lsq, frozen, follow"),
        ({"bits": 4, "scales": 0}, "scales=0; needed 'tensor', 'channel' or a group's size"),
        ({"bits": 4, "scales": "row"}, "scales='row'; needed 'tensor'"),
        ({"bits": 4, "what": "dense", "activation_bits": 8}, "needed what='factors', whose layers have places"),
    ],
)
def test_bad_grids_say_what_would_do(fields, words):
    with pytest.raises(QuantizeError, match=words):
        Quantize(**fields)


# ---- gradients


def by_definition(x, grad, scale, low, steps, scales):
    """Equations 3 and 5 of Esser et al., number by number: gradients of x and of each block's scale."""
    rows, slope, to_x = blocks(x, scales), blocks(grad, scales), torch.zeros_like(blocks(x, scales))
    to_scale = torch.zeros_like(scale)
    for i, j in itertools.product(*map(range, rows.shape)):
        least, most = float(low[i]), float(low[i]) + steps
        ratio = float(rows[i, j]) / float(scale[i])
        if least <= ratio <= most:
            to_x[i, j] = slope[i, j]
            to_scale[i] += slope[i, j] * (round(ratio) - ratio)
        else:
            to_scale[i] += slope[i, j] * (least if ratio < least else most)
    return unblocks(to_x, x.shape, scales), to_scale


@pytest.mark.parametrize(("bits", "scales", "symmetric"), list(itertools.product(BITS, SCALES, (True, False))))
def test_gradients_are_those_of_the_definition(bits, scales, symmetric):
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        fake = grid_of(x.detach(), bits=bits, scales=scales, symmetric=symmetric)
        with torch.no_grad():
            fake.scale.mul_(0.6)  # so that some numbers are outside
        grad = torch.randn(shape, dtype=torch.float64)
        fake(x).backward(grad)
        to_x, to_scale = by_definition(x.detach(), grad, fake.scale.detach(), fake.low, 2**bits - 1, scales)
        assert torch.equal(x.grad, to_x)
        assert torch.allclose(fake.scale.grad, to_scale, atol=1e-12)


def test_a_number_on_the_bound_is_inside():
    fake = grid_of(torch.ones(8), bits=4)
    for scale in (0.1, 0.3, 1 / 3, 7e-5):
        with torch.no_grad():
            fake.scale.fill_(scale)
        s = fake.scale.detach().reshape(())
        x = torch.stack([-8 * s, 7 * s, -8.01 * s, 7.01 * s]).requires_grad_()
        fake(x).sum().backward()
        assert x.grad.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("scales", SCALES)
def test_lsq_is_plain_over_the_root_of_how_many(scales):
    x, grads = torch.randn(4, 15, dtype=torch.float64), []
    for learn in ("plain", "lsq"):
        fake = grid_of(x, scales=scales, learn=learn)
        (fake(x) ** 2).sum().backward()
        grads.append(fake.scale.grad)
    numbers = blocks(x, scales).shape[1]
    assert torch.allclose(grads[1], grads[0] / math.sqrt(numbers * 7))


def test_a_frozen_scale_is_no_parameter():
    fake = grid_of(torch.randn(8), learn="frozen")
    assert not list(fake.parameters())
    x = torch.randn(8, requires_grad=True)
    fake(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_following_scale_follows_in_training_only(symmetric):
    x = torch.randn(40)
    fake = grid_of(x, learn="follow", symmetric=symmetric)
    assert not list(fake.parameters())
    assert torch.equal(fake(3 * x), grid_of(3 * x, symmetric=symmetric)(3 * x))
    kept = fake.scale.clone()
    fake.eval()(100 * x)
    assert torch.equal(fake.scale, kept)
    twice = x.clone().requires_grad_()  # a tied weight is read twice before the backward pass
    fake.train()
    (fake(twice) * fake(twice)).sum().backward()
    assert twice.grad.isfinite().all()


def test_a_scale_that_crossed_zero_is_the_same_mirrored():
    x = torch.randn(50)
    fake = grid_of(x)
    wanted = fake(x)
    with torch.no_grad():
        fake.scale.neg_()
    assert torch.equal(fake(x), wanted)
    with torch.no_grad():
        fake.scale.zero_()
    assert fake(x).isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_piece_by_piece_is_the_whole(symmetric, monkeypatch):
    x, grad = torch.randn(2, 2 * PIECE + 17, dtype=torch.float64).unbind()
    found = []
    for piece in (PIECE, 10**9):
        monkeypatch.setattr("tnlib.quant.PIECE", piece)
        fake, own = grid_of(x, symmetric=symmetric, start="percentile"), x.clone().requires_grad_()
        seen = fake(own)
        seen.backward(grad)
        found.append((seen, own.grad, fake.scale.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.allclose(found[0][2], found[1][2], rtol=1e-10)


# ---- packing


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.data())
def test_unpack_is_the_inverse_of_pack(bits, data):
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), dtype=torch.float32)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes((len(codes),), bits) == math.ceil(len(codes) * bits / 8)
    assert torch.equal(unpack(packed, bits, len(codes)).float(), codes)


def test_the_first_code_is_in_the_lowest_bits():
    assert pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([1, 2, 3, 0, 2]), 2).tolist() == [0b00111001, 0b10]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_widths_that_do_not_fill_bytes_are_refused(bits):
    for call in (
        lambda: pack(torch.zeros(4), bits),
        lambda: packed_bytes((4,), bits),
        lambda: Packed(torch.ones(4), grid_of(torch.ones(4), bits=bits)),
    ):
        with pytest.raises(QuantizeError, match=f"bits={bits}; needed 2, 4, 8. Train with other widths"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("bits", "scales", "symmetric"), list(itertools.product((2, 4, 8), SCALES, (True, False))))
def test_fake_and_real_agree_bit_for_bit(bits, scales, symmetric, dtype):
    """1,000 random tensors and scales of 40 shapes for each grid in float32; 120 in the other types, which hold as well."""
    generator = torch.Generator().manual_seed(bits)
    for seed in range(40):
        shape = torch.randint(1, 7, (1 + seed % 4,), generator=generator).tolist()
        many = 25 if dtype == torch.float32 else 3
        xs = (torch.randn(many, *shape, generator=generator) * 10.0 ** (seed % 13 - 6)).to(dtype)
        fake = grid_of(xs[0], bits=bits, scales=scales, symmetric=symmetric)
        signs = torch.randn(many, *fake.scale.shape, generator=generator)  # as training may leave it
        for x, scale in zip(xs, fake.scale.detach() * signs):
            fake.scale.data = scale
            assert torch.equal(Packed(x, fake)(), fake(x)), (seed, shape)


def test_reading_a_packed_tensor_does_not_change_it():
    x = torch.randn(5, 8)
    packed = Packed(x, grid_of(x, bits=8))
    first = packed()
    first.zero_()
    assert torch.equal(packed(), grid_of(x, bits=8)(x))


# ---- embeddings


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scales", ["tensor", "channel", 4])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_embedding_looks_up_what_the_whole_table_says(bits, scales, symmetric):
    table, ids = torch.randn(50, 8), torch.randint(0, 50, (3, 5))
    layer = QuantizedEmbedding(
        Packed(table, grid_of(table, bits=bits, scales=scales, symmetric=symmetric)), padding_idx=1
    )
    dense = layer.to_dense()
    for asked in (ids, ids.int(), ids[:0], ids[0, 0]):
        assert torch.equal(layer(asked), torch.nn.functional.embedding(asked, layer.weight))
    assert torch.equal(dense(ids), layer(ids))
    assert (dense.padding_idx, dense.training) == (1, layer.training)
    right = torch.randn(8, 6)
    low_rank = QuantizedEmbedding(layer.packed, right)
    assert torch.allclose(low_rank(ids), layer(ids) @ right, atol=1e-5)  # another order of float32 sums
    in_bands = QuantizedEmbedding(layer.packed, torch.randn(2, 4, 3))
    left, right = layer(ids).split(4, -1), in_bands.right
    assert torch.allclose(in_bands(ids), torch.cat([left[0] @ right[0], left[1] @ right[1]], -1), atol=1e-5)
    assert torch.allclose(in_bands.to_dense()(ids), in_bands(ids), atol=1e-5)
    assert in_bands.embedding_dim == 6
    for bad in (50, -1):
        with pytest.raises(IndexError):
            layer(torch.tensor([bad]))


def test_only_the_rows_looked_up_are_unpacked(monkeypatch):
    table = torch.randn(1000, 16)
    layer = QuantizedEmbedding(Packed(table, grid_of(table, scales="channel")))
    seen = []
    monkeypatch.setattr(
        "tnlib.packing.unpack", lambda packed, *rest: seen.append(packed.nbytes) or unpack(packed, *rest)
    )
    layer(torch.tensor([[1, 7, 7]]))
    assert seen == [3 * 8]  # three rows of 16 numbers, half a byte each
    _ = layer.weight
    assert seen == [3 * 8, 1000 * 8]


@pytest.mark.parametrize(("width", "bits"), [(7, 4), (8, 4), (5, 2), (9, 8), (1, 2)])
def test_rows_of_any_width_begin_at_a_byte(width, bits):
    table, ids = torch.randn(12, width), torch.tensor([[11, 0], [3, 3]])
    packed = Packed(table, grid_of(table, bits=bits))
    layer = QuantizedEmbedding(packed)
    assert packed.codes.numel() == packed_bytes((12, width), bits) == 12 * math.ceil(width * bits / 8)
    assert torch.equal(layer(ids), torch.nn.functional.embedding(ids, layer.weight))
    assert torch.equal(layer.weight, grid_of(table, bits=bits)(table))


@pytest.mark.parametrize(("width", "scales"), [(7, 2), (8, 3), (8, 16)])
def test_rows_that_are_not_whole_are_refused(width, scales):
    table = torch.randn(12, width)
    with pytest.raises(
        QuantizeError, match=f"rows of {width} numbers, scales={scales}.* needed rows of whole groups"
    ):
        QuantizedEmbedding(Packed(table, grid_of(table, scales=scales)))


def test_modes_for_a_vocabulary_that_has_none():
    form = tt_matrix.TTMatrix(pad_rows=True, order=4, max_rank=8).resolve((30_522, 384))
    assert form.out_modes == (12, 13, 14, 14)
    assert math.prod(form.in_modes) == 384
    assert form.resolve((30_522, 384)) == form
    small = tt_matrix.TTMatrix(pad_rows=True, order=2).resolve((31, 6))  # a prime; exact at full rank
    weight = torch.randn(31, 6, dtype=torch.float64)
    factors, error = small.decompose(weight)
    assert torch.allclose(small.to_dense(factors, (31, 6)), weight, atol=1e-10)
    assert error < 1e-10
    assert tt_matrix.TTMatrix(pad_rows=True, order=2).resolve((36, 6)).out_modes == (6, 6)  # nothing to pad
