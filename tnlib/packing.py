"""Quantized tensors as they are stored: codes of 2, 4 or 8 bits side by side in bytes, and their scales.

A code is an integer of the grid minus the grid's smallest one, so it is never negative. The numbers that come back are those
that fake quantization computes, bit for bit: both multiply the same integers by the same scale.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tnlib.quant import QuantizeError, _wide, blocks, round_to_grid, unblocks

STORED_BITS = (2, 4, 8)


def pack(codes, bits):
    """Codes 0..2^bits-1 of any shape, in order, 8/bits of them a byte, the first in the lowest bits: (bytes,) uint8.

    Raises: QuantizeError for bits other than 2, 4, 8. Exact: unpack(pack(codes, bits), bits, codes.numel()) is codes.flatten().
    """
    _check_stored(bits)
    each = 8 // bits
    flat = codes.reshape(-1).to(torch.uint8)
    columns = F.pad(flat, (0, -len(flat) % each)).reshape(-1, each)  # (bytes, codes in each)
    packed = columns[:, 0].clone()
    for k in range(1, each):
        packed |= columns[:, k] << (bits * k)
    return packed


def unpack(packed, bits, count=None):
    """Codes of packed bytes (…, bytes): (…, count), uint8; count: None for all that there are."""
    each = 8 // bits
    if each == 1:
        return packed if count is None else packed[..., :count]
    mask = 2**bits - 1
    codes = torch.stack([(packed >> (bits * k)) & mask for k in range(each)], -1).flatten(-2)
    return codes if count is None else codes[..., :count]


def packed_bytes(count, bits):
    """Bytes that `count` codes take."""
    _check_stored(bits)
    return math.ceil(count * bits / 8)


def _check_stored(bits):
    if bits not in STORED_BITS:
        raise QuantizeError(
            f"pack: got bits={bits}; needed {', '.join(map(str, STORED_BITS))}. Train with other widths, store with these."
        )


class Packed(nn.Module):
    """A parametrization that stores codes and scales, and gives the tensor that they stand for when it is read.

    tensor: to be stored; fake: the FakeQuantize that has its grid
    Stored: codes (bytes,) uint8; scale (blocks, 1), float32; low (blocks, 1) int16 where the grid is not symmetric
    Exact: reading gives what `fake` gives, bit for bit.
    """

    def __init__(self, tensor, fake):
        super().__init__()
        _check_stored(fake.bits)
        self.bits, self.scales, self.symmetric = fake.bits, fake.quantize.scales, fake.quantize.symmetric
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        rows = blocks(_wide(tensor.detach()), self.scales)
        scale, low = (part.detach() for part in fake.eval().grid(rows))
        codes = unblocks(round_to_grid(rows, scale, low, low + (2**self.bits - 1)) - low, self.shape, self.scales)
        self.stored = [pack(codes, self.bits), scale.clone()]  # until whoever holds this Packed has taken them
        self.stored += [] if self.symmetric else [low.to(torch.int16)]

    @property
    def quantized_elements(self):
        """How many numbers the codes stand for."""
        return math.prod(self.shape)

    def right_inverse(self, tensor):
        """What register_parametrization asks: the tensors to hold in place of the one that there was."""
        return list(self.stored)

    def forward(self, packed, scale, low=None):
        """What is stored -> the tensor."""
        codes = unpack(packed, self.bits, self.quantized_elements).to(scale.dtype)
        rows = blocks(codes.reshape(self.shape), self.scales)  # (blocks, numbers)
        return unblocks(_values(rows, scale, low, self.bits), self.shape, self.scales).to(self.dtype)

    def extra_repr(self):
        return f"bits={self.bits}, scales={self.scales}, shape={self.shape}"


def _values(codes, scale, low, bits):
    """scale * (code + low); low None where symmetric."""
    return codes.add_(-(2 ** (bits - 1)) if low is None else low).mul_(scale)


class QuantizedEmbedding(nn.Module):
    """An embedding whose table is packed: only the rows that are looked up are unpacked. ids (…) -> (…, dim).

    packed: the Packed of a (rows, width) table; right: (width, dim), the second factor of a low-rank table, or None
    Raises: QuantizeError where a row does not begin at a byte, or a scale covers parts of two rows
    Exact: equals F.embedding(ids, layer.weight), bit for bit where there is no second factor.
    """

    def __init__(self, packed, right=None, padding_idx=None):
        super().__init__()
        rows, width = packed.shape
        if width * packed.bits % 8 or (isinstance(packed.scales, int) and width % packed.scales):
            raise QuantizeError(
                f"QuantizedEmbedding: rows of {width} numbers of {packed.bits} bits, scales={packed.scales!r}; needed rows of whole bytes "
                "and whole groups. Use scales='channel', one a row, or a group that divides the width."
            )
        self.packed, self.padding_idx = packed, padding_idx
        self.num_embeddings, self.embedding_dim = rows, width if right is None else right.shape[1]
        for name, tensor in zip(("codes", "scale", "low"), packed.stored):
            self.register_buffer(name, tensor)
        self.right = None if right is None else nn.Parameter(right.detach().clone())

    def _stored(self):
        return [getattr(self, name) for name in ("codes", "scale", "low") if hasattr(self, name)]

    @property
    def weight(self):
        """The whole table (rows, dim), unpacked at every access."""
        table = self.packed(*self._stored())
        return table if self.right is None else table @ self.right

    def to_dense(self):
        """An nn.Embedding with the table that the codes stand for."""
        return nn.Embedding(*self.weight.shape, self.padding_idx, _weight=self.weight.detach().clone()).train(
            self.training
        )

    def _rows(self, tensor, ids):
        """Entries of scale or low that belong to rows `ids`: (n, scales a row, 1)."""
        return tensor if self.packed.scales == "tensor" else tensor.reshape(self.num_embeddings, -1, 1)[ids]

    def forward(self, ids):
        """ids: integers (…). Returns: (…, dim)."""
        flat, grid = ids.reshape(-1), self.packed
        codes = unpack(self.codes.reshape(self.num_embeddings, -1)[flat], grid.bits)  # (n, width)
        low = None if grid.symmetric else self._rows(self.low, flat)
        groups = grid.shape[1] if not isinstance(grid.scales, int) else grid.scales
        values = _values(
            codes.to(self.scale.dtype).reshape(len(flat), -1, groups), self._rows(self.scale, flat), low, grid.bits
        )
        values = values.reshape(len(flat), -1).to(grid.dtype)
        values = values if self.right is None else values @ self.right
        return values.reshape(*ids.shape, self.embedding_dim)
