"""Models on disk, dense or compressed, behind one name; the only place that knows how a compressed one is kept."""

import json
import shutil
from pathlib import Path

import torch

from tnlib.assets import fetch
from tnlib.quant import Quantize
from tnlib.quantize import quantize_
from tnlib.recipe import Recipe
from tnlib.records import write_atomic
from tnlib.resume import load_weights_, save_weights
from tnlib.stream import BESIDE
from tnlib.streamed import FACTS, load_factorized, skeleton_of
from tnlib.surgery import factorize_


def compressed(name):
    """Whether `name` is a folder that a compressed model was written to."""
    return (Path(name) / FACTS).is_file()


def facts_of(folder):
    """What a compressed folder says of itself: recipe, seed, source, errors."""
    return json.loads((Path(folder) / FACTS).read_text("utf-8"))


def open_model(name, device=None):
    """The model in a folder, compressed or dense, or of an asset's or hub name; in eval mode, ready to run.

    device: None leaves it on the CPU
    Raises: ValueError for a compressed folder whose tensors do not fit its recipe; AssetError as load_model
    Exact: a model that keep_model wrote has the same tensors again, bit for bit.
    """
    if not compressed(name):
        model = _dense(fetch(name))
    else:
        facts = facts_of(name)
        model = _quantized(name, facts) if facts.get("quantize") else load_factorized(name)
    return model if device is None else model.to(device)


def require_causal(name, model):
    """The model again. Raises: ValueError for one that does not predict next tokens, as encoders do not"""
    if not model.can_generate():
        raise ValueError(
            f"{name}: is a {type(model).__name__}, which predicts no next token; needed a causal language model. Judge others by a "
            "task: tn.load_task, tn.predict, tn.score."
        )
    return model


def keep_model(model, source, out, **more):
    """Write a model that was made from the compressed folder `source` to folder `out`, for open_model; returns None.

    more: facts to add, such as quantize=[…]; the file with the facts comes last, so that half a folder is none
    """
    source, out = Path(source), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_weights(model, out / "model.safetensors")
    for path in source.iterdir():
        if path.suffix in BESIDE and path.name != FACTS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)
    write_atomic(out / FACTS, json.dumps(facts_of(source) | more, indent=1))


def bytes_of(name):
    """Bytes of a folder's weights on disk; None where `name` is no folder."""
    files = list(Path(name).glob("*.safetensors"))
    return sum(path.stat().st_size for path in files) if files else None


def _dense(folder):
    """Of the class that config.json names: AutoModelForCausalLM would give an encoder an untrained use."""
    import transformers

    kind = getattr(transformers, type(skeleton_of(folder)).__name__)
    return kind.from_pretrained(folder, use_safetensors=True).eval()


def _quantized(folder, facts):
    """The structure again, quantized from any numbers, then the stored ones in their place."""
    model, real = skeleton_of(folder), {}
    factorize_(model, Recipe.from_dict(facts["recipe"]), progress=False)
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    one = torch.ones(tensor.shape, dtype=tensor.dtype)
                    held[name] = real.setdefault(id(tensor), torch.nn.Parameter(one) if held is module._parameters else one)
    for quantize in facts["quantize"]:
        quantize_(model, Quantize(**quantize))
    load_weights_(model, Path(folder) / "model.safetensors")
    for name, error in facts["errors"].items():
        model.get_submodule(name).error = error
    return model
