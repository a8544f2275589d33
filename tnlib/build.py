"""One factorized layer out of a dense module, by a rule of a recipe; and the folder in which finished ones are kept."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from tnlib.fit_store import digest, moment_tensors
from tnlib.layer_fit import FIT, Job, fit_job, load_found, write_bias
from tnlib.layers import FactorizedEmbedding, FactorizedLinear, SplitLinear, dense_layer
from tnlib.records import write_atomic
from tnlib.shapes import is_conv1d, weight_of

FITTED = "fitted_bias"  # name in a kept file: a layer's own bias is never in one


class Built(NamedTuple):
    """A new layer, and the bias (out,) that was fitted along, to be written when the layer is put in its place."""

    layer: nn.Module
    bias: torch.Tensor | None = None

    def write_bias(self):
        """Write it, where there is one."""
        write_bias(getattr(self.layer, "parts", [self.layer]), self.bias)


class Fit(NamedTuple):
    """What a layer is fitted to: {module name: Moments} of its uses, and the settings of fit_job."""

    moments: dict
    settings: dict

    @classmethod
    def of(cls, names, stats, settings):
        """For a layer used under these names; None without stats."""
        return None if stats is None else cls({name: stats[name] for name in names}, FIT | (settings or {}))

    @property
    def mark(self):
        """Fingerprint of all of it."""
        return digest(moment_tensors(self.moments), self.settings)


def build(name, module, rule, seed, number, fit=None):
    """build_layer, fitted to the moments of its inputs if there is a `fit`."""
    layer = build_layer(module, rule, seed, number)
    if fit is None:
        return Built(layer)
    job = Job(name, tuple(fit.moments), layer, module)
    found = fit_job(job, fit.moments, {}, **fit.settings)
    load_found(job, found)
    return Built(layer, found.bias)


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


def take_bias(layer, bias):
    """Give each part of a SplitLinear its band of a fused layer's bias (out,)."""
    for part, own in zip(layer.parts, bias.detach().chunk(len(layer.parts))):
        part.bias = nn.Parameter(own.clone())


def kept_layer(folder, name, module, rule, seed, number, fit=None, mark=None):
    """`build`, or what an earlier call with the same arguments left in `folder`.

    mark: fingerprint of the whole run, where that says more than the arguments do
    Raises: ValueError if the file there is of another weight, rule, seed or calibration, or damaged
    Exact: the layer read back equals the one built, bit for bit.
    """
    path = Path(folder) / f"{name}.safetensors"
    mark = mark or _fingerprint(weight_of(module), rule, seed, number, fit)
    if path.exists():
        return _read(path, mark, module, rule, seed, number)
    from safetensors.torch import save

    built = build(name, module, rule, seed, number, fit)
    tensors = {key: value.detach().cpu().contiguous() for key, value in built.layer.state_dict().items() if _own(key)}
    if built.bias is not None:
        tensors[FITTED] = built.bias.cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    errors = json.dumps([(part.error, part.output_error) for part in _with_errors(built.layer)])
    write_atomic(path, save(tensors, metadata={"fingerprint": mark, "errors": errors}))
    return built


def _read(path, mark, module, rule, seed, number):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            kept, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"factorize_: {path} is damaged ({error}); needed a whole file. Delete it.") from error
    if (kept or {}).get("fingerprint") != mark:
        raise ValueError(
            f"factorize_: {path} is of another weight, rule, seed or calibration; needed the same ones to go on with it. Give out= "
            "another folder, or delete this one."
        )
    weight = weight_of(module)
    empty = build_layer(_without_values(module, weight), rule, seed, number)  # on the meta device: nothing is decomposed
    layer, bias = empty.to_empty(device=weight.device), tensors.pop(FITTED, None)
    layer.load_state_dict(tensors, strict=False)
    for part, errors in zip(_with_errors(layer), json.loads(kept["errors"])):
        part.error, part.output_error = errors
    if isinstance(layer, SplitLinear) and module.bias is not None:
        take_bias(layer, module.bias)
    return Built(keep_bias(module, layer), None if bias is None else bias.to(weight.device))


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


def _fingerprint(weight, rule, seed, number, fit):
    """Of the weight, bit for bit, of what is made of it and what it is fitted to."""
    facts = [str(rule.form), rule.init, rule.split, seed, number, str(weight.dtype), tuple(weight.shape)]
    facts += [] if fit is None else [fit.mark]
    return digest([weight], facts)
