"""The plainest competitor: a model with whole blocks removed, as DistilGPT-2 is GPT-2 with every second one."""

import copy
import math

import torch
from torch import nn

from tnlib.shapes import ShapeError


def drop_blocks(model, parameters):
    """A copy of `model` without as many blocks, spread evenly, as it takes to store at most `parameters` numbers.

    model: a transformers model with one stack of equal blocks (GPT-2, Llama, Qwen, OPT, BERT); the first and last are kept
    Returns: the smaller model; its config says how many blocks it has, and each block knows its place in the cache
    Raises: ShapeError when there is no such stack, or two blocks are too many already
    Source: Sanh et al. 2019, DistilBERT, initialized from every second layer. Exact: with all parameters it is the model.
    """
    student = copy.deepcopy(model)
    name, blocks = block_stack(student, "drop_blocks")
    each = sum(p.numel() for p in blocks[0].parameters())
    kept = len(blocks) - max(0, math.ceil((sum(p.numel() for p in model.parameters()) - parameters) / each))
    if kept < 2:
        raise ShapeError(
            f"drop_blocks: {parameters:,} parameters leave {kept} of {len(blocks)} blocks of {each:,}; needed at least two. "
            "Ask for a larger size."
        )
    chosen = nn.ModuleList(blocks[k] for k in torch.linspace(0, len(blocks) - 1, kept).round().long().tolist())
    parent, _, child = name.rpartition(".")
    setattr(student.get_submodule(parent), child, chosen)
    student.config.num_hidden_layers = kept
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = student.config.layer_types[:kept]
    for number, block in enumerate(chosen):
        for part in block.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = number
    return student


def block_stack(model, where):
    """Name and modules of the one nn.ModuleList that holds as many equal blocks as the config says.

    Raises: ShapeError, with `where`, for a model that has none or several, as an encoder and a decoder are
    """
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if len(found) != 1 or getattr(model.config, "is_encoder_decoder", False):
        raise ShapeError(
            f"{where}: {type(model).__name__} has {len(found)} stacks of {layers} blocks; needed exactly one. "
            "Take a model of one stack, such as GPT-2 or Llama, or treat its blocks by hand."
        )
    return found[0]
