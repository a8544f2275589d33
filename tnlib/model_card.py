"""The model card of a compressed model: what was done to it, how large it is, what was measured, how to load it.

Every number in it is counted, or measured by whoever gives it; none is typed.
"""

import json
import math
import re
from pathlib import Path

import torch
import transformers

from tnlib import __version__
from tnlib.block_low_rank import BlockLowRank
from tnlib.checkpoint import TNConfig
from tnlib.checkpoint_files import skeleton_of, stored_config
from tnlib.cost import size
from tnlib.layer_data import grids_of, replaced
from tnlib.layers import SplitLinear
from tnlib.low_rank import LowRank
from tnlib.native import is_ours
from tnlib.packing import QuantizedEmbedding
from tnlib.rebuild import dense_twin, fill_ties, rebuild
from tnlib.recipe import Recipe
from tnlib.records import write_atomic
from tnlib.resume import own_tensors

CARD = "README.md"


def model_card(model, *, base=None, measured=None, size_mb=None):
    """A model card in Markdown, with the header that the hub reads.

    model: a transformers model, on any device, the meta device too; or the folder of a checkpoint, whose weights are not read
    base: name of the dense model, as a person or (owner/name) the hub would know it
    measured: {what: number or record}, such as {"perplexity, film reviews": tn.perplexity(model, windows)}; give the dense
        model's beside it
    size_mb: of the weights on disk, in MB (1e6 bytes); None: of the folder's files, or of the tensors that would be written
    Exact: parameters are those of size(model); the dense model's are those of its class and config.
    """
    if not isinstance(model, torch.nn.Module):
        folder, model = Path(model), _without_weights(Path(model))
        size_mb = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    if size_mb is None:
        size_mb = sum(tensor.nbytes for tensor in own_tensors(model).values()) / 1e6
    kind, rows = type(model).__name__, _rows(model)
    parts = [_header(base), f"# {base or kind}, compressed", _sizes(model, rows, size_mb, base)]
    parts += [_table("Layers", rows)] if rows else []
    if measured:
        parts.append(_measured(measured))
    parts.append(_how_to_load(kind))
    recipe = model.hf_quantizer.quantization_config.recipe if is_ours(getattr(model, "hf_quantizer", None)) else None
    if recipe:
        given = {key: value for key, value in Recipe.from_dict(recipe).to_dict().items() if value}
        parts.append(f"## Recipe\n\n```json\n{json.dumps(given, indent=1)}\n```")
    return "\n\n".join(parts) + "\n"


def read_card(folder):
    """What a checkpoint's model card says before its section Measured, or where that would be, and behind it.

    Raises: ValueError for a folder whose card is missing or none of model_card's
    """
    path = Path(folder) / CARD
    before, load, after = (path.read_text("utf-8") if path.exists() else "").partition("\n\n## Load\n")
    if not load:
        raise ValueError(f"{path}: got no model card of tnlib's; needed one, to add to. Write what model_card(folder) gives there.")
    return before.partition("\n\n## Measured\n")[0], load + after


def note_measured(folder, measured):
    """Put what was measured, as for model_card, into a checkpoint's card, in place of what stood there; returns None.

    Raises: ValueError as read_card
    Exact: all other sections stay as they are.
    """
    before, after = read_card(folder)
    write_atomic(Path(folder) / CARD, f"{before}\n\n{_measured(measured)}{after}")


def _measured(measured):
    return _table("Measured", [{"what": what, "value": _shown(value)} for what, value in measured.items()])


def _without_weights(folder):
    """The compressed model that a folder describes, on the meta device."""
    model, config = skeleton_of(folder), stored_config(folder)
    if config:
        ours = TNConfig.from_dict(config)
        fill_ties(model, rebuild(model, ours)[1])
        from_registry = transformers.quantizers.auto.AutoHfQuantizer.from_config(ours)
        model.hf_quantizer, model.config.quantization_config = from_registry, ours
    return model


def _header(base):
    lines = ["---", "library_name: transformers", "tags:", "- tnlib", "- compressed"]
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        lines.append(f"base_model: {base}")
    return "\n".join([*lines, "---"])


def _sizes(model, rows, size_mb, base):
    after, dense = size(model).parameters, size(dense_twin(model))
    wide = _bytes_each(model)
    replaced_before, replaced_after = (sum(int(row[key].replace(",", "")) for row in rows) for key in ("dense", "stored"))
    before_mb = dense.parameters * wide / 1e6
    table = [
        {"": "parameters, tied ones once", "dense": f"{dense.parameters:,}", "here": f"{after:,}", "kept": _share(after, dense.parameters)},
        {"": "of these in replaced layers", "dense": f"{replaced_before:,}", "here": f"{replaced_after:,}", "kept": _share(replaced_after, replaced_before)},
        {"": f"MB on disk, dense at {8 * wide} bits", "dense": f"{before_mb:,.1f}", "here": f"{size_mb:,.1f}", "kept": _share(size_mb, before_mb)},
    ]
    said = f"{base or 'A dense model'} with {len(replaced(model))} layers replaced by tnlib {__version__}."
    return f"{said}\n\n{_table('Sizes', table)}"


def _bytes_each(model):
    """Bytes a number: of the type that a checkpoint's config names, where the model itself is only a skeleton."""
    first, named = next(model.parameters()), model.config.dtype
    if first.is_meta and named is not None:
        return (getattr(torch, named) if isinstance(named, str) else named).itemsize
    return first.element_size()


def _share(part, whole):
    return f"{part / whole:.3f}" if whole else ""


def _rows(model):
    """One dictionary for each kind of replaced layer, blocks folded into `*`; layers that share their tensors count once."""
    groups, seen = {}, set()
    for name, layer in replaced(model).items():
        own = {id(t) for t in (*layer.parameters(), *layer.buffers())}
        parts = layer.parts if isinstance(layer, SplitLinear) else [layer]
        forms = {str(getattr(part, "form", "dense")) for part in parts}
        table = isinstance(layer, QuantizedEmbedding) and layer.right is not None
        form = _form_of_table(layer.right) if table else " and ".join(sorted(forms))
        bits = sorted({grid.bits for part in parts for grid in grids_of(part)})
        key = (re.sub(r"\.\d+\.", ".*.", name), _shape(layer), form, ", ".join(map(str, bits)) or "float", bool(own & seen))
        groups.setdefault(key, []).append(layer)
        seen |= own
    return [_row(*key, layers) for key, layers in groups.items()]


def _form_of_table(right):
    """The form of a packed table whose second factor is `right`, see QuantizedEmbedding."""
    if right.dim() == 2:
        return str(LowRank(rank=right.shape[0]))
    return str(BlockLowRank(bands=right.shape[0], rank=right.shape[1]))


def _row(name, shape, form, bits, twin, layers):
    biases = sum(layer.bias.numel() for layer in layers if getattr(layer, "bias", None) is not None)
    before = 0 if twin else len(layers) * math.prod(shape)
    after = 0 if twin else sum(size(layer).parameters for layer in layers) - biases
    errors = [error for layer in layers if (error := getattr(layer, "error", None)) is not None]
    told = f"{sum(errors) / len(errors):.3f}, {max(errors):.3f}" if errors else ""
    numbers = {"dense": f"{before:,}", "stored": f"{after:,}", "kept": _share(after, before)}
    facts = {"layers": f"{len(layers)} x {name}" + (" (shared)" if twin else ""), "weight (out, in)": "x".join(map(str, shape))}
    return facts | {"form": form, "bits": bits, **numbers, "relative error, mean and worst": told}


def _shape(layer):
    if isinstance(layer, QuantizedEmbedding):
        return (layer.num_embeddings, layer.embedding_dim)
    return tuple(getattr(layer, "shape", None) or layer.weight.shape)


def _table(title, rows):
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[key] for key in head] for row in rows)]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value):
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _how_to_load(kind):
    auto = f"AutoModelFor{kind.partition('For')[2]}"
    name = auto if hasattr(transformers, auto) else kind
    return f"""## Load

```python
import tnlib  # first: without it loading fails
from transformers import {name}

model = {name}.from_pretrained("this folder")  # model.dequantize() makes it dense
```"""
