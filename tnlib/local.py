"""Local distillation: each factorized layer is fitted to its dense layer's outputs on the teacher's own activations.

No loss runs through the whole network. One forward pass of the teacher over a text collects the second moments of every
layer's inputs (moments.py); after that each layer is a small problem of its own (weighted.py), solved one layer a thread.
"""

import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tnlib.fit_store import FitStore
from tnlib.layer_fit import Job, fit_job, load_found, write_bias
from tnlib.layers import FactorizedEmbedding, FactorizedLinear, SplitLinear
from tnlib.moments import second_moments
from tnlib.shapes import ShapeError, check_weight, weight_of

KINDS = (FactorizedLinear, FactorizedEmbedding, SplitLinear)


def fit_layers_(
    student,
    teacher,
    windows,
    *,
    held_out=None,
    steps=40,
    learning_rate=0.1,
    shrink=1.0,
    batch=4,
    memory_gb=4.0,
    seed=0,
    progress=None,
    out=None,
):
    """Fit every factorized layer of `student` to the outputs of its dense layer in `teacher`, in place.

    windows: (windows, context) int64 or int32, the calibration text; held_out: windows that are only measured on. Either may
        be what second_moments or calibrate returned for the same modules instead, so that several students share one pass
    steps: most alternations, or gradient steps, a layer, a twentieth of it sweeps over a train; learning_rate: of gradient steps, in units of a factor's size
    shrink: s adds white noise worth s * in tokens to the second moment, at the power of the median channel. 0 trusts the
        text alone; large values lead back to the plain Frobenius fit. With fewer tokens than inputs, 0 overfits badly
    batch: windows a forward pass; memory_gb: of second moments held at once; more layers than that take further passes
    seed: taken for the sake of callers that pass a run's seed; nothing here is random
    progress: a bar over layers (default: only on a terminal)
    out: a folder in which each fitted layer is saved; a killed run that is started again goes on from there
    Returns: list of LayerFit, in the model's order. A bias is fitted along. Tied layers (embedding and head) are fitted
        once, to all their uses; an embedding's rows weigh as often as the text has them
    Raises: ShapeError when teacher and student do not fit; ValueError on NaN or infinite activations, on a student that
        shares parameters with its teacher, and on a folder of another run
    An error or an interruption leaves the student as it was; the teacher is never written to.
    Source: layer-wise distillation, 2605.19842; low rank as SVD-LLM (2403.07378), Kronecker as ProcrustesGPT (2506.02818).
    Exact: `after` is never above `before`; for LowRank without shrinkage it is the error of the whitened, truncated SVD.
    """
    jobs = _jobs(student, teacher)
    settings = {"steps": steps, "learning_rate": learning_rate, "shrink": shrink}
    store = None if out is None else FitStore(Path(out), teacher, windows, held_out, settings)
    done = {job.name: found for job in jobs if store and (found := store.load(job))}
    hide = not (sys.stderr.isatty() if progress is None else progress)
    with tqdm(total=len(jobs), initial=len(done), desc="fit layers", disable=hide) as bar:
        limit = memory_gb * 1e9 / (1 if held_out is None else 2)
        for group in _groups([job for job in jobs if job.name not in done], limit):
            names = [name for job in group for name in job.names]
            seen, held = (_moments(teacher, text, names, batch) for text in (windows, held_out))
            for job, found in _in_threads(group, partial(fit_job, seen=seen, held=held, **settings)):
                done[job.name] = found
                if store:
                    store.save(job, found)
                bar.update()
    for job in jobs:
        _write(student, job, done[job.name])
    return [done[job.name].row for job in jobs]


def _jobs(student, teacher):
    """Every factorized layer with its dense counterpart; all checks are made here, before any work."""
    layers = {n: m for n, m in student.named_modules() if isinstance(m, KINDS) and ".parts." not in f".{n}"}
    if not layers:
        raise ShapeError(
            "fit_layers_: the student has no factorized layer; needed at least one. Call factorize_ first."
        )
    own = {id(p) for p in student.parameters()}
    if shared := [name for name, p in teacher.named_parameters() if id(p) in own]:
        raise ValueError(
            f"fit_layers_: student and teacher share {len(shared)} parameters, {shared[0]} among them; needed a teacher of its "
            "own, since the student is changed in place. Make the student with copy.deepcopy(teacher), then factorize_ it."
        )
    jobs = {}
    for name, layer in layers.items():
        dense, first = _dense(teacher, name, layer), id(next(layer.parameters()))
        tied = jobs.get(first, Job(name, (), layer, dense))
        jobs[first] = Job(tied.name, (*tied.names, name), tied.layer, tied.dense)
    return list(jobs.values())


def _dense(teacher, name, layer):
    """The teacher's dense layer of that name and shape, with finite weights."""
    try:
        dense = teacher.get_submodule(name)
        shape = tuple(weight_of(dense).shape)
    except (AttributeError, ShapeError):
        shape = "no dense layer"
    if shape != layer.shape:
        raise ShapeError(
            f"fit_layers_, module {name}: the teacher has {shape} there and the student {layer.shape} (out, in); needed the "
            "dense model that the student was made from. Load it again."
        )
    check_weight(weight_of(dense), f"fit_layers_, module {name} of the teacher")
    return dense


def _moments(teacher, text, names, batch):
    """Moments of the named modules, from windows or out of a dictionary of moments; {} without a text."""
    if text is None:
        return {}
    if not isinstance(text, Mapping):
        return second_moments(teacher, text, names, batch, missing=True)
    if missing := [name for name in names if name not in text]:
        raise ValueError(
            f"fit_layers_: got moments of {len(text)} modules, without {missing[0]} ({len(missing)} missing); needed all that were "
            "factorized. Ask second_moments for them, or give windows."
        )
    return {name: text[name] for name in names}


def _groups(jobs, limit):
    """Consecutive jobs whose second moments take at most `limit` bytes together; a single one may take more."""
    group, size = [], 0
    for job in jobs:
        needed = 8 * job.layer.shape[1] ** 2
        if group and size + needed > limit:
            yield group
            group, size = [], 0
        group.append(job)
        size += needed
    if group:
        yield group


def _in_threads(jobs, work):
    """(job, work(job)) in order, one job a thread."""
    threads = torch.get_num_threads()
    at_once = 1 if any(next(job.layer.parameters()).is_cuda for job in jobs) else threads
    pool = ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(threads // at_once,))
    try:
        yield from zip(jobs, pool.map(work, jobs))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a thread's setting is also what new threads start with


def _write(student, job, found):
    """Put factors and bias into the layer that holds them, and the new errors into all that share them."""
    load_found(job, found)
    write_bias(job.parts, found.bias)
    for name in job.names:
        layer = student.get_submodule(name)
        layer.error, layer.output_error = job.layer.error, job.layer.output_error
