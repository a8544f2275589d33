"""Sequential correction: each block is fitted on what the blocks before it, compressed already, really send it.

A layer that was fitted to the dense model's activations meets others once the blocks before it are compressed. Here the text is
taken through the model twice, side by side: dense, and compressed as far as it has come. A matrix W that should read x and now
reads x' is replaced by the W' for which W' x' is nearest to W x, so it also undoes what it can of the errors before it:

    min |W X - W' X'|^2 = min |(W* - W') C'^(1/2)|^2 + what no W' reaches,  W* = W E[x x'.T] C'^(-1),  C' = E[x' x'.T]
"""

import copy
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from tnlib.build import Fit, build, keep_bias, kept_layer
from tnlib.fit_store import digest, moment_tensors
from tnlib.layer_fit import FIT, with_noise
from tnlib.layers import SplitLinear, dense_layer
from tnlib.moments import Sums
from tnlib.native import tell_transformers
from tnlib.plan import plan, tied_names
from tnlib.recipe import RecipeError, match
from tnlib.records import write_atomic
from tnlib.shapes import check_weight, is_conv1d, weight_of
from tnlib.surgery import all_built, swap
from tnlib.walk import Walk

DENSE, NOW = 0, 1  # tracks of the walk


def factorize_in_sequence_(
    model, windows, recipe, stats=None, *, aim="own", fit=None, batch=4, seed=0, out=None, progress=None
):
    """factorize_, block by block, each layer fitted to the inputs that it gets from what is compressed before it; in place.

    windows: (windows, context) int64 or int32, the calibration text
    stats: from with_gradients: what it knows of gradients at the outputs is weighed along (of the dense model's)
    aim: "own": outputs come near those that the dense matrix would give on the inputs that arrive; "dense": near those of the dense
        model, errors of earlier layers undone where they can be. The latter is nearer block by block and lost more of SmolLM2's
        perplexity (notebook 21)
    fit: settings as in fit_layers_; batch: windows a forward pass; seed, progress: as in factorize_
    out: folder in which every finished layer is kept; a killed call that is started again goes on from there
    Memory: the text's hidden states (tokens * width numbers; twice with aim="dense"), and what factorize_ needs. Matrices that read the same input
        (q, k and v; gate and up) are fitted together, then what comes behind them sees their errors
    Returns: None. An error or an interruption leaves the model as it was
    Raises: as factorize_; RecipeError for claims outside the model's one stack of blocks; ValueError for activations that are not
        finite, for another aim, and for a folder of another run
    Source: SVD-LLM (2403.07378) updates activations block by block; the aim at dense outputs is GPTAQ's (2504.02692).
    Exact: at full rank the model is unchanged, whatever the aim.
    """
    if aim not in ("dense", "own"):
        raise ValueError(f"factorize_in_sequence_: got aim={aim!r}; needed 'dense' or 'own'.")
    plan(model, recipe)
    claims = match(model, recipe)
    walk = Walk(model, windows, batch, tracks=2, where="factorize_in_sequence_")
    for name, module, _ in claims:
        check_weight(weight_of(module), f"recipe {recipe.name!r}, module {name}")
        if not name.startswith(f"{walk.stack}.") or len(tied_names(model, name)) > 1:
            raise RecipeError(
                f"recipe {recipe.name!r}: module {name} is not in one of the blocks {walk.stack}.*, or is tied; needed matrices of "
                "blocks, each for itself. Give the others to factorize_, with stats from calibrate."
            )
    settings = FIT | (fit or {})
    mark = None
    if out is not None:
        tensors = [*model.state_dict().values(), windows, *moment_tensors(stats)]
        mark = digest(tensors, [recipe.to_dict(), settings, aim, seed])
        _same_run(Path(out), mark)
    run = _Run(walk, claims, stats, settings, aim, seed, out, mark)
    last = max(int(claim.name.removeprefix(f"{walk.stack}.").split(".")[0]) for claim in claims)
    hide = not (sys.stderr.isatty() if progress is None else progress)
    with tqdm(total=len(claims), desc=f"factorize {recipe.name} in sequence", disable=hide) as bar:
        for number in range(last + 1):
            now = run.block(number, bar)
            if number < last:
                walk.through(number, partial(run.advance, now))
    for claim in claims:
        _keep_value(claim.module, run.layers[claim.name])
        swap(model, claim.name, run.layers[claim.name])
    tell_transformers(model, recipe)


def _keep_value(module, layer):
    """Let the model's own bias, which other names may share, take the value that was fitted."""
    value = None if layer.bias is None else layer.bias.detach().clone()
    keep_bias(module, layer)
    if value is not None and not isinstance(layer, SplitLinear):
        with torch.no_grad():
            layer.bias.copy_(value)


def _same_run(folder, mark):
    """Write what run a folder is of, or compare. Raises: ValueError for another one."""
    path = folder / "run.json"
    if not path.exists():
        write_atomic(path, json.dumps({"fingerprint": mark}))
    elif json.loads(path.read_text("utf-8")).get("fingerprint") != mark:
        raise ValueError(
            f"factorize_in_sequence_: {folder} is of another model, text, recipe or setting; needed the same ones to go on with it. "
            "Give out= another folder, or delete this one."
        )


class _Run:
    """One call at work: `layers` by name, as far as they are made."""

    def __init__(self, walk, claims, stats, settings, aim, seed, out, mark):
        self.walk, self.stats, self.settings, self.aim, self.seed, self.out, self.mark = walk, stats, settings, aim, seed, out, mark
        self.claims = {claim.name: (number, claim) for number, claim in enumerate(claims)}
        self.layers = {}

    def block(self, number, bar):
        """Factorize the claimed modules of a block, group by group; returns the block with its new layers."""
        dense, prefix = self.walk.blocks[number], f"{self.walk.stack}.{number}."
        left = [name for name in self.claims if name.startswith(prefix)]
        if not left:
            return dense
        now = copy.deepcopy(dense)
        for name in [name for name in left if self._kept(name)]:
            self._place(now, name, prefix, self._made(name, None), bar)
            left.remove(name)
        while left:
            seen = self._first_group(number, dense, now, [name.removeprefix(prefix) for name in left])
            group = [prefix + name for name in seen.group]
            claims = [self.claims[name][1] for name in group]
            made = all_built(claims, lambda numbered, seen=seen: self._made(numbered[1].name, seen))
            for claim, one in made:
                self._place(now, claim.name, prefix, one, bar)
            left = [name for name in left if name not in group]
        return now

    def advance(self, now, at, run):
        """The states of a batch behind a block, each by its own weights; nobody asks for the dense one if the aim is "own"."""
        after = run(NOW, now)
        if self.aim == "dense":
            self.walk.keep(at, DENSE, run(DENSE))
        self.walk.keep(at, NOW, after)

    def _first_group(self, number, dense, now, names):
        seen = _Seen(dense, now, names, self.aim == "dense")
        with seen:
            self.walk.through(number, lambda at, run: seen.see(partial(run, DENSE), partial(run, NOW, now)))
        if not seen.group:
            raise ValueError(
                f"factorize_in_sequence_: the text never reached {', '.join(names)} of block {number}; needed at least one token. "
                "Leave them out, or give more text."
            )
        return seen

    def _kept(self, name):
        return self.out is not None and (Path(self.out) / f"{name}.safetensors").exists()

    def _made(self, name, seen):
        """Built, or what an earlier call left of it; its bias is its own."""
        number, (_, module, rule) = self.claims[name]
        target, fit = _copied(module), None
        if seen is not None:
            moments = seen.sums.moments()
            if self.stats is not None:
                moments = replace(moments, gradients=self.stats[name].gradients)
            target = seen.aimed(module, self.settings["shrink"]) if self.aim == "dense" else target
            fit = Fit({name: moments}, self.settings)
        given = name, target, rule, self.seed, number, fit
        return build(*given) if self.out is None else kept_layer(self.out, *given, mark=self.mark)

    def _place(self, now, name, prefix, one, bar):
        one.write_bias()
        swap(now, name.removeprefix(prefix), one.layer)
        self.layers[name] = one.layer
        bar.update()


class _Seen:
    """What the first of some modules reads in a block that is compressed so far, and in the dense one at the same tokens.

    group: names of the modules that read that very input
    """

    def __init__(self, dense, now, names, paired):
        self.blocks, self.names, self.paired = {DENSE: dense, NOW: now}, names, paired
        self.inputs, self.handles = {DENSE: {}, NOW: {}}, []
        self.group, self.sums, self.cross, self.mean = [], Sums(names[0]), 0, 0

    def __enter__(self):
        for track, block in self.blocks.items():
            for name in self.names:
                hook = partial(self._note, track, name)
                self.handles.append(block.get_submodule(name).register_forward_pre_hook(hook))
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def _note(self, track, name, module, args):
        self.inputs[track][name] = args[0]

    def see(self, dense, now):
        """Run a batch through both and add up."""
        now()
        found = self.inputs[NOW]
        if found and not self.group:
            first = next(iter(found.values()))  # in the order in which they are reached
            self.group = [name for name, x in found.items() if x is first]
        if self.group and self.group[0] in found:
            self.sums.add(found[self.group[0]])
            if self.paired:
                dense()
                self._pair()
        for inputs in self.inputs.values():
            inputs.clear()

    def _pair(self):
        x, now = (self.inputs[track].get(self.group[0]) for track in (DENSE, NOW))
        if x is None or x.shape != now.shape:
            raise ValueError(
                f"factorize_in_sequence_: module {self.group[0]} reads {tuple(now.shape)} here and "
                f"{None if x is None else tuple(x.shape)} in the dense model; needed the same tokens, which a router does not "
                "promise. Use aim='own'."
            )
        x, now = (part.reshape(-1, part.shape[-1]) for part in (x, now))
        x, now = (part if part.dtype == torch.float64 else part.float() for part in (x, now))
        self.cross = self.cross + (x.T @ now).double()  # (in, in)
        self.mean = self.mean + x.sum(0).double()  # (in,)

    def aimed(self, module, shrink):
        """The dense layer whose outputs on what arrives are nearest to the old one's on what should have: W*, b*."""
        moments = self.sums.moments()
        cross, mean, second = self.cross / moments.tokens, self.mean / moments.tokens, moments.second
        if module.bias is not None:
            cross, second = cross - torch.outer(mean, moments.mean), moments.covariance()
        noisy = with_noise(second, moments.tokens, shrink)
        weight = weight_of(module).detach().double()
        best = weight + torch.linalg.solve(noisy, (weight @ (cross - second)).T).T  # (out, in)
        bias = None if module.bias is None else module.bias.detach().double() + weight @ mean - best @ moments.mean
        return _copied(module, best, bias)


def _copied(module, weight=None, bias=None):
    """A dense layer of the same kind, with parameters of its own."""
    weight = weight_of(module).detach().clone() if weight is None else weight.to(module.weight.dtype)
    if module.bias is not None:
        bias = nn.Parameter((module.bias.detach().clone() if bias is None else bias).to(module.bias.dtype))
    return dense_layer(weight, bias, "Conv1D" if is_conv1d(module) else "Linear", module.training)
