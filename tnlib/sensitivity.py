"""Sensitivity: one matrix at a time (or one block) is replaced, the model is run on held-out text, the matrix is put back.

What runs is dense: a form's factors are multiplied out, so that an evaluation costs what the blocks from the changed one
on cost, whatever the form. CompactifAI (2401.14109 v2) profiles its layers so, by MMLU where this takes KL and loss.
"""

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tnlib.fit_store import digest, moment_tensors
from tnlib.layer_fit import FIT, Job, fit_job
from tnlib.layers import FactorizedLinear
from tnlib.prefix import Prefix
from tnlib.profile import blank_profile, row_from_dict, row_to_dict
from tnlib.records import write_atomic
from tnlib.shapes import check_weight, is_conv1d, weight_of


def sensitivity(
    model, windows, forms, where="linear", unit="matrix", *, moments=None, batch=4, out=None, progress=None
):
    """How much each matrix, replaced alone by each form, changes the model on a text.

    model: a causal language model with one stack of blocks (GPT-2, Llama, Qwen, OPT), in any mode
    windows: (windows, context) int64 or int32 of held-out text
    where, unit: as in blank_profile. A form that is not smaller than the matrix is left out; no damage is its damage
    moments: {name: Moments} of the matrices' inputs over a calibration text; forms are then fitted to them as fit_layers_
        does, bias included. None: the nearest in Frobenius norm
    batch: windows a forward pass; memory: see Prefix
    out: a folder with one JSON a unit; a killed run that is started again goes on from there, and forms may be added later
    progress: a bar over units (default: only on a terminal)
    Returns: Profile; rows have the scores kl, loss, error and square. Loss rises and KLs are kept by window, so that two rows
        are compared pairwise: tn.compare(a.scores["loss"], b.scores["loss"])
    Raises: as blank_profile and Prefix; ValueError for a folder of another run. All forms are checked before the first run
    An error or an interruption leaves the model as it was, bit for bit.
    Source: CompactifAI v2, section 2. Exact: the scores are those of factorize_ (and fit_layers_) on a copy for one matrix.
    """
    blank = checked_profile("sensitivity", model, forms, where, unit, moments)
    store = Store.open(out, model, windows, moments) if out is not None else None
    done, prefix = [], Prefix(model, windows, batch)
    hide = not (sys.stderr.isatty() if progress is None else progress)
    for one in tqdm(blank.units, f"sensitivity, {len(blank.rows)} evaluations", disable=hide):
        known = store.load(one) if store else {}
        wanted = blank.of(one.name)
        rows = [known.get(row.form) or _measured(model, prefix, one.block, row, moments) for row in wanted]
        if store and any(row.form not in known for row in rows):
            store.save(one, known | {row.form: row for row in rows})
        done += rows
    return replace(blank, rows=tuple(done), dense_losses=tuple(prefix.losses.tolist()), tokens=int(windows.numel()))


def checked_profile(caller, model, forms, where, unit, moments):
    """blank_profile, and a refusal of weights that are not finite and of moments that do not cover all matrices."""
    blank = blank_profile(model, forms, where, unit)
    for name in dict.fromkeys(name for row in blank.rows for name in row.names):
        check_weight(weight_of(model.get_submodule(name)), f"{caller}, matrix {name}")
        if moments is not None and moments.get(name) is None:
            raise ValueError(
                f"{caller}: got moments of {len(moments)} matrices, without {name}; needed all that are replaced. Ask "
                "second_moments for them."
            )
    return blank


def _measured(model, prefix, block, row, moments):
    """The row with its scores: matrices replaced, model run, matrices put back."""
    new, missed, whole = {}, 0.0, 0.0
    for name in row.names:
        module = model.get_submodule(name)
        layer = fitted_layer(name, module, row.form, moments)
        weight = layer.weight.detach()  # (out, in)
        square, total = squares(module, weight)
        missed, whole = missed + square, whole + total
        new[module.weight] = weight.T.contiguous() if is_conv1d(module) else weight
        if module.bias is not None:
            new[module.bias] = layer.bias.detach()
    with _exchanged(new):
        found = prefix.scores_from(block)
    scores = {
        "kl": tuple(found.kl.tolist()),
        "loss": tuple((found.loss - prefix.losses).tolist()),
        "error": ((missed / whole) ** 0.5 if whole else 0.0,),
        "square": (missed,),
    }
    return replace(row, scores=scores)


def fitted_layer(name, module, form, moments=None):
    """The FactorizedLinear that factorize_, and with moments fit_layers_, makes of a dense layer."""
    layer = FactorizedLinear.from_dense(module, form)
    if moments is not None:
        found = fit_job(Job(name, (name,), layer, module), {name: moments[name]}, {}, **FIT)
        layer.load_factors(found.factors[0])
        if found.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(found.bias)
    return layer


def squares(module, weight):
    """|W - W'|^2 and |W|^2 of a dense layer and the weight (out, in) that replaces its own, float64."""
    dense = weight_of(module).detach().double()
    return float((dense - weight).square().sum()), float(dense.square().sum())


@contextmanager
def _exchanged(new):
    """Parameters that hold other tensors for a while: {parameter: tensor}. The old tensors themselves come back."""
    old = {parameter: parameter.data for parameter in new}
    try:
        for parameter, tensor in new.items():
            parameter.data = tensor
        yield
    finally:
        for parameter, tensor in old.items():
            parameter.data = tensor


@dataclass(frozen=True)
class Store:
    """Rows on disk, one JSON a unit, with the fingerprint of model, text and moments that they were measured with."""

    folder: Path
    run: str

    @classmethod
    def open(cls, folder, model, windows, moments):
        """The store of a run in `folder`, made where it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = [*model.state_dict().values(), windows, *moment_tensors(moments)]
        return cls(folder, digest(tensors, FIT if moments is not None else {}))

    def load(self, unit):
        """{form: Row} of an earlier run, {} where there is none. Raises: ValueError for another run's."""
        path = self.folder / f"{unit.name}.json"
        if not path.exists():
            return {}
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["fingerprint"] != self._fingerprint(unit):
            raise ValueError(
                f"sensitivity: {path} is of another run: model, text, moments or unit differ; needed the same ones to go on with it. "
                "Give out= another folder, or delete this one."
            )
        return {row.form: row for row in map(row_from_dict, data["rows"])}

    def save(self, unit, rows):
        """Write all rows of a unit."""
        data = {"fingerprint": self._fingerprint(unit), "rows": [row_to_dict(row) for row in rows.values()]}
        write_atomic(self.folder / f"{unit.name}.json", json.dumps(data, indent=1, allow_nan=False) + "\n")

    def _fingerprint(self, unit):
        return digest([], [self.run, unit.names])
