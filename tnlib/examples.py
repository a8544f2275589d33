"""The data of a healing: tensors with one example a row, and the order in which a run meets them."""

import torch
from torch.utils.data import Dataset

from tnlib.losses import IGNORE


class Examples(Dataset):
    """All examples of a run in order: permutation after permutation of the data, each from its own seed.

    tensors: by name, first axis the example; length: examples in all; skip: of the order, read by an earlier run
    Exact: item i depends on seed and skip + i only, so any grouping into batches, processes or restarts sees the same order.
    """

    def __init__(self, tensors, length, seed, skip=0):
        self.tensors, self.length, self.seed, self.skip = tensors, length, seed, skip
        self.size, self.epoch, self.order = len(next(iter(tensors.values()))), None, None

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        epoch, place = divmod(self.skip + index, self.size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.size, generator=generator)
        window = int(self.order[place])
        return {name: _wide(tensor[window]) for name, tensor in self.tensors.items()} | {"window": torch.tensor(window)}


def _wide(values):
    """int32 ids, as files hold them, as the int64 that losses need."""
    return values.long() if values.dtype == torch.int32 else values


def stack(items):
    """One batch of examples: each column stacked."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def stack_trimmed(items):
    """`stack` without the columns at the end that are padding in every example: short texts cost what they are long."""
    return trim(stack(items))


def trim(tensors):
    """Leave out the last columns that no attention_mask of the batch covers, of every tensor that has such columns."""
    if (mask := tensors.get("attention_mask")) is None:
        return tensors
    longest = max(2, int(mask.any(0).nonzero().max()) + 1) if bool(mask.any()) else 2
    return {n: t[:, :longest] if t.dim() > 1 and t.shape[1] == mask.shape[1] else t for n, t in tensors.items()}


def split(data):
    """Training and validation data as dictionaries of tensors, labels included; validation None where there is none.

    data: windows (n, context) int64 or int32, or a dictionary with input_ids and perhaps attention_mask and labels; or a pair
    Raises: ValueError
    """
    train, validation = data if isinstance(data, (tuple, list)) else (data, None)
    held_out = None if validation is None else _tensors(validation, "validation data")
    return _tensors(train, "data"), held_out and {name: _wide(tensor) for name, tensor in held_out.items()}


def _tensors(data, where):
    tensors = dict(data) if isinstance(data, dict) else {"input_ids": data}
    ids = tensors.get("input_ids")
    if (
        not isinstance(ids, torch.Tensor)
        or ids.dim() != 2
        or ids.dtype not in (torch.int64, torch.int32)
        or ids.shape[1] < 2
        or not len(ids)
    ):
        got = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(f"heal: {where} is {got}; needed windows (n, context) int64 or int32. Make them with token_windows or load_windows.")
    if odd := [f"{name} {tuple(t.shape)}" for name, t in tensors.items() if len(t) != len(ids)]:
        raise ValueError(
            f"heal: {where} has {len(ids)} input_ids and {', '.join(odd)}; needed one row an example in each."
        )
    if "labels" not in tensors:
        masked = "attention_mask" in tensors
        tensors["labels"] = ids.masked_fill(tensors["attention_mask"] == 0, IGNORE) if masked else ids
    return tensors
