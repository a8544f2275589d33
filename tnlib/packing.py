"""Quantized tensors as they are stored: codes of 2, 4 or 8 bits side by side in bytes, and their scales.

A code is an integer of the grid minus the grid's smallest one, so it is never negative. The numbers that come back are those
that fake quantization computes, bit for bit: both multiply the same integers by the same scale.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from tnlib.links import Apart, apply_link
from tnlib.quant import QuantizeError, blocks, round_to_grid, unblocks, wide

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
    if torch.compiler.is_exporting():
        packed = packed.int()  # the shift of bytes that ONNX gets from torch gives signed ones
    mask = 2**bits - 1
    codes = torch.stack([(packed >> (bits * k)) & mask for k in range(each)], -1).flatten(-2)
    return codes if count is None else codes[..., :count]


def packed_bytes(shape, bits):
    """Bytes that the codes of a tensor take; each row of a matrix begins at a byte, so that rows can be looked up."""
    _check_stored(bits)
    rows, width = _rows_and_width(shape)
    return rows * math.ceil(width * bits / 8)


def _rows_and_width(shape):
    return tuple(shape) if len(shape) == 2 else (1, math.prod(shape))


def _check_stored(bits):
    if bits not in STORED_BITS:
        raise QuantizeError(
            f"pack: got bits={bits}; needed {', '.join(map(str, STORED_BITS))}. Train with other widths, store with these."
        )


class Packed(nn.Module):
    """A parametrization that stores codes and scales, and gives the tensor that they stand for when it is read.

    tensor: to be stored; fake: the FakeQuantize that has its grid
    Stored: codes (bytes,) uint8; scale (blocks, 1), float32, or float64 for float64; low (blocks, 1) int16 where the grid is
        not symmetric. They are this module's own buffers, so tied layers that share it stay tied on any device
    Exact: reading gives what `fake` gives, bit for bit.
    """

    def __init__(self, tensor, fake):
        super().__init__()
        _check_stored(fake.bits)
        self.bits, self.scales, self.symmetric = fake.bits, fake.quantize.scales, fake.quantize.symmetric
        self.shape = tuple(tensor.shape)
        rows = blocks(wide(tensor.detach()), self.scales)
        scale, low = fake.grid()
        codes = unblocks(round_to_grid(rows, scale, low, low + (2**self.bits - 1)) - low, self.shape, self.scales)
        rows, width = _rows_and_width(self.shape)
        whole = F.pad(codes.reshape(rows, width), (0, -width % (8 // self.bits)))  # rows of whole bytes
        self.register_buffer("codes", pack(whole, self.bits))
        self.register_buffer("scale", scale)
        self.register_buffer("low", None if self.symmetric else low.to(torch.int16))
        self.register_buffer("like", tensor.new_empty(0), persistent=False)  # its type is that of the tensors given

    @property
    def quantized_elements(self):
        """How many numbers the codes stand for."""
        return math.prod(self.shape)

    def right_inverse(self, tensor):
        """What register_parametrization asks: the tensors to hold in place of the one that there was. None, all are here."""
        return []

    def forward(self):
        """The tensor."""
        count, width = _rows_and_width(self.shape)
        codes = unpack(self.codes.reshape(count, -1), self.bits, width).to(self.scale.dtype)  # (rows of a matrix, width)
        rows = blocks(codes.reshape(self.shape), self.scales)  # (blocks, numbers)
        return unblocks(self._values(rows, self.scale, self.low), self.shape, self.scales)

    def rows(self, ids):
        """Rows `ids` (n,) of a matrix whose rows are whole groups: (n, width); no other row is unpacked."""
        rows, width = self.shape
        codes = unpack(self.codes.reshape(rows, -1).index_select(0, ids), self.bits, width).to(self.scale.dtype)  # (n, width)
        codes = codes.unflatten(1, (-1, self.scales if isinstance(self.scales, int) else width))
        scale, low = (
            part if self.scales == "tensor" or part is None else part.reshape(rows, -1, 1).index_select(0, ids)
            for part in (self.scale, self.low)
        )  # (n, scales a row, 1)
        return self._values(codes, scale, low).flatten(1)

    def _values(self, codes, scale, low):
        """scale * (code + low), in the type asked for; `codes` are overwritten."""
        return codes.add_(-(2 ** (self.bits - 1)) if low is None else low).mul_(scale).to(self.like.dtype)

    def extra_repr(self):
        return f"bits={self.bits}, scales={self.scales}, shape={self.shape}"


def is_packed(layer):
    """Whether a dense layer's weight is stored as a Packed."""
    grids = getattr(layer, "parametrizations", {})
    return "weight" in grids and isinstance(grids["weight"][0], Packed)


def put_packed(module, attribute, packed):
    """Let reading module.attribute give what `packed` stores, in place of the tensor, float or fake-quantized, that was there."""
    if attribute in getattr(module, "parametrizations", {}):  # torch's removal would break a copy of the model
        module.parametrizations[attribute] = ParametrizationList([packed], packed.like, unsafe=True)
    else:
        delattr(module, attribute)
        module.register_buffer(attribute, packed.like)
        parametrize.register_parametrization(module, attribute, packed, unsafe=True)


class QuantizedEmbedding(nn.Module):
    """An embedding whose table is packed: only the rows that are looked up are unpacked. ids (…) -> (…, dim).

    packed: the Packed of a (rows, width) table; right: the second factor of a low-rank table, (width, dim), or in bands
        (bands, width/bands, dim/bands); or None
    Raises: QuantizeError where a scale covers parts of two rows
    Exact: equals F.embedding(ids, layer.weight), bit for bit where there is no second factor.
    """

    def __init__(self, packed, right=None, padding_idx=None):
        super().__init__()
        rows, width = packed.shape
        if isinstance(packed.scales, int) and width % packed.scales:
            raise QuantizeError(
                f"QuantizedEmbedding: rows of {width} numbers, scales={packed.scales!r}; needed rows of whole groups. "
                "Use scales='channel', one a row, or a group that divides the width."
            )
        self.packed, self.padding_idx = packed, padding_idx
        self.num_embeddings, self.embedding_dim = rows, width if right is None else right.numel() // right.shape[-2]
        self.right = None if right is None else nn.Parameter(right.detach().clone())

    @property
    def weight(self):
        """The whole table (rows, dim), unpacked at every access."""
        return self._turned(self.packed())

    def to_dense(self):
        """An nn.Embedding with the table that the codes stand for."""
        table = self.weight.detach().clone(memory_format=torch.contiguous_format)
        return nn.Embedding(*table.shape, self.padding_idx, _weight=table).train(self.training)

    def forward(self, ids):
        """ids: integers (…). Returns: (…, dim). Raises: IndexError (CPU)"""
        return self._turned(self.packed.rows(ids.reshape(-1))).reshape(*ids.shape, self.embedding_dim)

    def _turned(self, rows):
        """Rows (n, width) of the table through the second factor: (n, dim)."""
        right = self.right
        if right is None:
            return rows
        return rows @ right if right.dim() == 2 else apply_link(Apart(right.mT), rows, plain=True)
