"""Factorize a checkpoint on disk, one matrix after the other, on a machine that could not hold the model.

    tn.factorize_folder("llama-2-7b", tn.papers["compactifai"], "llama-2-7b-mpo")
    model = AutoModelForCausalLM.from_pretrained("llama-2-7b-mpo")

The model is built without weights, factorized so, and says which tensors the result has; each is then read, or decomposed from
the one matrix that it comes from, and written. Memory: one matrix while it is decomposed, and one shard of the result.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from tnlib.assets import fetch
from tnlib.build import Fit, build
from tnlib.checkpoint import GUARD
from tnlib.checkpoint_files import CONFIG, INDEX, identity, skeleton_of, stored_config, stored_tensors
from tnlib.fit_store import digest, moment_tensors
from tnlib.layer_data import replaced
from tnlib.model_card import CARD, model_card
from tnlib.rebuild import describe
from tnlib.recipe import match
from tnlib.records import write_atomic
from tnlib.resume import own_tensors
from tnlib.shapes import check_weight, weight_of
from tnlib.surgery import check_stats, factorize_, partners

BESIDE = (".json", ".jinja", ".model", ".tiktoken", ".txt")  # configuration and tokenizer


def factorize_folder(folder, recipe, out, stats=None, *, fit=None, seed=0, shard_mb=256, progress=None):
    """Write to `out` what factorize_(model, recipe, stats, fit=fit, seed=seed) makes of the checkpoint in `folder`; returns None.

    folder: a transformers checkpoint in safetensors, one file or shards (or an asset's or hub name, as in fetch). It is only read
    out: a new folder, a checkpoint that from_pretrained reads: shards of at most `shard_mb` MB (more where one matrix is
        larger), their index, tokenizer files, a model card, and a config.json that has recipe, layers and their errors
    shard_mb: also the unit of resuming: a call that was killed goes on, in `out`.part, with the first shard that is missing
    progress: a bar over tensors (default: only on a terminal)
    Tensors are decomposed in float32 and stored in the type that they had. What the model does not know is left out.
    Raises: RecipeError and ShapeError as factorize_, naming recipe and module; ValueError for a damaged or incomplete
        checkpoint, and for an `out` that is another one; OSError where it cannot be written
    Exact: from_pretrained(out) has bit for bit the tensors that factorize_ leaves in memory.
    """
    source, out = fetch(folder), Path(out)
    if method := stored_config(source).get("quant_method"):
        raise ValueError(
            f"factorize_folder: {source} is compressed already, by {method}; needed a dense checkpoint. Load it, call "
            "model.dequantize() and save that."
        )
    files = stored_tensors(source)
    facts = {"recipe": recipe.to_dict(), "seed": seed, "shard_mb": shard_mb, "source": identity(files)}
    if stats is not None:
        facts |= {"calibration": digest(moment_tensors(stats), fit or {})}
    facts = json.loads(json.dumps(facts))  # as it will be read again
    work = out.with_name(f"{out.name}.part")
    if _is_there(source, out, work, facts):
        return
    model = skeleton_of(source)
    units = _units(model, recipe, files, seed, stats, fit)
    shards = _shards(units, shard_mb * 1e6)
    names = [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    hide = not (sys.stderr.isatty() if progress is None else progress)
    with tqdm(total=len(units), desc=f"factorize {recipe.name}", disable=hide) as bar:
        for name, shard in zip(names, shards):
            if not (work / name).exists():
                _write_shard(work / name, shard, bar)
            else:
                bar.update(len(shard))
    base = source.name if Path(folder).is_dir() else str(folder)  # not the cache's name for it
    _finish(source, work, names, model, facts, base)
    if out.exists():
        out.rmdir()  # it was empty
    work.rename(out)


def _is_there(source, out, work, facts):
    """Whether `out` is finished already; else the facts are in `work`, ready to go on. Raises: ValueError for other work."""
    if out.resolve() == source.resolve():
        raise ValueError(
            f"factorize_folder: got out={out}, the checkpoint itself; needed another folder. Choose a new one."
        )
    for folder in (out, work):
        there = stored_config(folder).get("run")
        if there is None and any(not path.name.startswith(".") for path in folder.glob("*")):
            raise ValueError(f"factorize_folder: {folder} holds other files; needed a new folder. Choose another out=.")
        if there is not None and there != facts:
            odd = ", ".join(key for key in {**facts, **there} if there.get(key) != facts.get(key))
            raise ValueError(
                f"factorize_folder: {folder} is of another run (another {odd}); needed the same one to go on. Choose another out=, "
                "or delete it."
            )
    if stored_config(out):
        return True
    write_atomic(work / CONFIG, json.dumps({"quantization_config": {"run": facts}}))
    return False


@dataclass(frozen=True)
class _Unit:
    """What is made at once: a tensor that stays as it is, or all tensors of a layer."""

    names: dict  # {name in the module: name in the result}
    parts: dict  # {name in the module: Stored}
    size: int  # bytes of the result
    make: Callable  # parts that were read -> {name in the module: tensor}, {module: error}


def _units(model, recipe, files, seed, stats, fit):
    """All tensors of the result, in the model's order, by what they are made from; `model` is factorized, without weights."""
    stored, claims = _stored(model, files), match(model, recipe)
    uses = {claim.name: [claim.name, *partners(model, recipe, *claim)] for claim in claims}
    check_stats(stats, uses)
    factorize_(model, recipe, progress=False)
    names = {id(tensor): name for name, tensor in own_tensors(model).items()}
    units, order = [], {name: place for place, name in enumerate(names.values())}
    for number, claim in enumerate(claims):
        parts = {part: stored[id(tensor)] for part, tensor in claim.module.named_parameters()}
        layer = model.get_submodule(claim.name).state_dict(keep_vars=True)
        size = sum(t.numel() * (4 if t.dtype == torch.int32 else parts["weight"].wide) for t in layer.values())
        own = {part: names.pop(id(tensor)) for part, tensor in layer.items()} | {GUARD: f"{claim.name}.{GUARD}"}
        units.append(_Unit(own, parts, size, partial(_layer, claim, recipe.name, seed, number, (uses[claim.name], stats, fit))))
    for tensor in own_tensors(model).values():
        if id(tensor) in names and id(tensor) in stored:
            part = stored[id(tensor)]
            units.append(_Unit({"": names[id(tensor)]}, {"": part}, tensor.numel() * part.wide, _as_it_is))
    return sorted(units, key=lambda unit: min(order.get(name, len(order)) for name in unit.names.values()))


def _as_it_is(parts):
    return parts, {}


def _stored(model, files):
    """{id of a parameter or buffer of the model: Stored}; names may lack, or have, the base model's prefix.

    Raises: ValueError for parameters that the checkpoint does not have, or has in another shape
    """
    found, prefix = {}, f"{model.base_model_prefix}."
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = next((k for k in (name, name.removeprefix(prefix), prefix + name) if k in files), None)
        if key is not None and files[key].shape != tuple(tensor.shape):
            raise ValueError(
                f"factorize_folder: {files[key].path} has {key} {files[key].shape}; needed {tuple(tensor.shape)}, as config.json says. "
                "Config and weights are of two models: fetch them again."
            )
        if key is not None:
            found.setdefault(id(tensor), files[key])
    if lost := [name for name, parameter in model.named_parameters() if id(parameter) not in found]:
        raise ValueError(
            f"factorize_folder: the checkpoint lacks {len(lost)} parameters of {type(model).__name__}, {lost[0]} among them; needed "
            "all. Save it again with save_pretrained."
        )
    return found


def _layer(claim, recipe, seed, number, fit, parts):
    """All tensors of the layer that replaces a dense one, by their name in it, and {module: error}."""
    for part, tensor in parts.items():
        setattr(claim.module, part, torch.nn.Parameter(tensor, requires_grad=False))
    try:
        check_weight(weight_of(claim.module), f"recipe {recipe!r}, module {claim.name}")
        built = build(claim.name, claim.module, claim.rule, seed, number, Fit.of(*fit))
        built.write_bias()
    finally:
        claim.module.to("meta")
    made = {name: tensor.contiguous() for name, tensor in built.layer.state_dict().items()}
    return made | {GUARD: torch.zeros(1, dtype=parts["weight"].dtype)}, {claim.name: built.layer.error}


def _shards(units, limit):
    """Units in order, in groups of at most `limit` bytes; a single one may be larger."""
    shards, size = [[]], 0
    for unit in units:
        if shards[-1] and size + unit.size > limit:
            shards, size = [*shards, []], 0
        shards[-1].append(unit)
        size += unit.size
    return shards


def _write_shard(path, shard, bar):
    """Make a shard's tensors and write them under another name, then rename. Raises: OSError when it cannot be written."""
    tensors, errors = {}, {}
    for unit in shard:
        made, missed = unit.make({name: part.read() for name, part in unit.parts.items()})
        tensors |= {unit.names[name]: tensor for name, tensor in made.items()}
        errors |= missed
        bar.update()
    part = path.with_name(f"{path.name}.new")
    try:
        save_file(tensors, part, metadata={"format": "pt", "errors": json.dumps(errors)})
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OSError(
            f"factorize_folder: {path} could not be written ({error}); needed room and leave to write. Make room and call again: "
            "finished shards are not done again."
        ) from error


def _finish(source, work, names, model, facts, base):
    """Index, configuration, model card and tokenizer files beside the shards; the errors of all layers are in the shards."""
    where, size = {}, 0
    for name in names:
        with safe_open(work / name, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), name)
            _note_errors(model, json.loads(file.metadata()["errors"]))
        size += (work / name).stat().st_size
    for part in work.glob("*.new"):  # of runs that were killed
        part.unlink()
    for path in source.iterdir():
        if path.suffix in BESIDE and not path.name.endswith(".index.json") and path.name != CONFIG:
            shutil.copyfile(path, work / path.name)
    write_atomic(work / INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=1))
    ours = model.hf_quantizer.quantization_config
    describe(model, ours)
    config = json.loads((source / CONFIG).read_text("utf-8")) | {"quantization_config": ours.to_dict() | {"run": facts}}
    write_atomic(work / CARD, model_card(model, base=base, size_mb=size / 1e6))
    write_atomic(work / CONFIG, json.dumps(config, indent=2) + "\n")


def _note_errors(model, errors):
    """Give layers on the meta device the errors that were measured; a tied head has its embedding's factors, and so its error."""
    for name, error in errors.items():
        layer = model.get_submodule(name)
        first = next(layer.parameters())
        for other in replaced(model).values():
            if other is layer or next(other.parameters()) is first:
                other.error = error
