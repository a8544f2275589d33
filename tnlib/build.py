"""One factorized layer out of a dense module, by a rule of a recipe; and the folder in which finished ones are kept."""

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from tnlib.layers import FactorizedEmbedding, FactorizedLinear, SplitLinear, dense_layer
from tnlib.records import write_atomic
from tnlib.shapes import is_conv1d, weight_of


def build_layer(module, rule, seed, number):
    """The layer that replaces a dense module; `number` is its place among the modules claimed, part of the random seed."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    kind = FactorizedEmbedding if isinstance(module, nn.Embedding) else FactorizedLinear
    if rule.split > 1:
        return SplitLinear.from_dense(module, rule.form, rule.init, generator, rule.split)
    return keep_bias(module, kind.from_dense(module, rule.form, rule.init, generator))


def keep_bias(old, new):
    """Let the new layer hold the old one's very bias: BERT ties its decoder's to another name."""
    if (
        isinstance(new, (nn.Linear, FactorizedLinear))
        and isinstance(old, nn.Module)
        and not isinstance(old, SplitLinear)
    ):
        new.bias = old.bias
    return new


def kept_layer(folder, name, module, rule, seed, number):
    """build_layer, or what an earlier call with the same arguments left in `folder`.

    Raises: ValueError if the file there is of another weight, rule or seed, or damaged
    Exact: the layer read back equals the one built, bit for bit.
    """
    path = Path(folder) / f"{name}.safetensors"
    mark = _fingerprint(weight_of(module), rule, seed, number)
    if path.exists():
        return _read(path, mark, module, rule, seed, number)
    from safetensors.torch import save

    layer = build_layer(module, rule, seed, number)
    tensors = {key: value.detach().cpu().contiguous() for key, value in layer.state_dict().items() if _own(key)}
    path.parent.mkdir(parents=True, exist_ok=True)
    errors = json.dumps([part.error for part in _with_errors(layer)])
    write_atomic(path, save(tensors, metadata={"fingerprint": mark, "errors": errors}))
    return layer


def _read(path, mark, module, rule, seed, number):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            kept, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"factorize_: {path} is damaged ({error}); needed a whole file. Delete it.") from error
    if (kept or {}).get("fingerprint") != mark:
        raise ValueError(
            f"factorize_: {path} is of another weight, rule or seed; needed the same ones to go on with it. Give out= another "
            "folder, or delete this one."
        )
    weight = weight_of(module)
    empty = build_layer(_without_values(module, weight), rule, seed, number)  # on the meta device: nothing is decomposed
    layer = empty.to_empty(device=weight.device)
    layer.load_state_dict(tensors, strict=False)
    for part, error in zip(_with_errors(layer), json.loads(kept["errors"])):
        part.error = error
    if isinstance(layer, SplitLinear) and module.bias is not None:
        for part, bias in zip(layer.parts, module.bias.detach().chunk(rule.split)):
            part.bias = nn.Parameter(bias.clone())
    return keep_bias(module, layer)


def _own(key):
    """Whether a tensor of a layer's state is its own: the bias stays the dense module's."""
    return key.rpartition(".")[2] != "bias"


def _with_errors(layer):
    return [layer, *(layer.parts if isinstance(layer, SplitLinear) else ())]


def _without_values(module, weight):
    """The dense module on the meta device."""
    if isinstance(module, nn.Embedding):
        return nn.Embedding(*weight.shape, module.padding_idx, device="meta", dtype=weight.dtype).train(module.training)
    bias = None if module.bias is None else nn.Parameter(module.bias.detach().to("meta"))
    return dense_layer(weight.detach().to("meta"), bias, "Conv1D" if is_conv1d(module) else "Linear", module.training)


def _fingerprint(weight, rule, seed, number):
    """Of the weight, bit for bit, and of what is made of it."""
    facts = [str(rule.form), rule.init, rule.split, seed, number, str(weight.dtype), tuple(weight.shape)]
    total = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
    total.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
