"""The folder of a healing: what it was started with, its checkpoints, its result. Nothing half-written is ever read.

    arguments.json      what the run was started with; another call with other arguments is refused
    history.csv         one row every few steps
    checkpoint-STEP/    model and best weights (safetensors), optimizer, scheduler and random states (torch's own format,
                        read with weights_only)
    config.json, model.safetensors, finished.json      the result, as from_pretrained reads it; the checkpoints are removed then

A checkpoint is written under another name, flushed to the disk and renamed; so is the result.
"""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tnlib.bars import bars_on_terminals
from tnlib.records import write_atomic

CLOSE = 1e-3  # relative difference of two tensors' root mean squares that rounding may explain, another start may not


class Folder:
    """One healing's folder. Raises: ValueError when it holds a run with other arguments, naming each difference."""

    def __init__(self, path, arguments, main=True):
        self.path, self.main = Path(path), main
        self.history = self.path / "history.csv"
        known = self.path / "arguments.json"
        arguments = json.loads(json.dumps(arguments))
        if known.exists():
            _refuse_other(self.path, json.loads(known.read_text("utf-8")), arguments)
        elif main:
            write_atomic(known, json.dumps(arguments, indent=1) + "\n")
        if main:
            for part in self.path.glob("*.part"):
                _remove(part)

    @property
    def finished(self):
        """What finished.json says, or None while the run is not over."""
        path = self.path / "finished.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def latest(self):
        """The checkpoint of the most steps, or None."""
        found = [path for path in self.path.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
        return max(found, key=step_of, default=None)

    @contextmanager
    def checkpoint(self, step, barrier):
        """A folder to write checkpoint `step` into; it gets its name when all processes have left it unharmed.

        Raises: OSError, with what was and what can be done, when it cannot be written
        """
        part = self.path / f"checkpoint-{step}.part"
        if self.main:
            _remove(part)
            part.mkdir(parents=True)
        barrier()
        try:
            yield part
            barrier()
            if self.main:
                _flush(part)
                part.rename(self.path / f"checkpoint-{step}")
                self._forget(before=step)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeError
            _remove(part)
            raise self._unwritten(f"checkpoint of step {step}", error) from error
        barrier()

    def finish(self, model, facts):
        """Write the result, mark the folder as finished, and remove the checkpoints."""
        part = self.path / "student.part"
        try:
            with bars_on_terminals():
                model.save_pretrained(part, max_shard_size="100TB")  # one file
            _flush(part)
            for file in sorted(part.iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(self.path / file.name)
        except (OSError, SafetensorError) as error:
            raise self._unwritten("the result", error) from error
        finally:
            _remove(part)
        write_atomic(self.path / "finished.json", json.dumps(facts) + "\n")
        self._forget()

    def load(self, model):
        """Put the result into a model of the same structure."""
        with bars_on_terminals():
            put_weights_(model, weights(type(model).from_pretrained(self.path)), str(self.path))

    def _unwritten(self, what, error):
        kept = self.latest()
        return OSError(
            f"heal: {what} in {self.path} could not be written ({error}); needed room and leave to write. "
            f"Make room and call again: the run goes on from {f'step {step_of(kept)}' if kept else 'its start'}."
        )

    def _forget(self, before=None):
        for path in self.path.glob("checkpoint-*"):
            if before is None or (path.name.removeprefix("checkpoint-").isdigit() and step_of(path) < before):
                path.rename(gone := path.with_name(f"{path.name}.part"))  # never half a checkpoint under its name
                _remove(gone)


@contextmanager
def only_one(path, wait=0):
    """Hold a folder for this process; the system gives it free when the process ends, however it ends.

    wait: seconds to wait for another process; -1: as long as it takes
    Raises: ValueError when another process holds it
    """
    Path(path).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(Path(path) / ".lock", timeout=wait):
            yield
    except Timeout:
        raise ValueError(
            f"folder {path}: another process is at work in it; needed one at a time. Wait for it."
        ) from None


def step_of(checkpoint):
    """Steps that a checkpoint folder holds, from its name."""
    return int(Path(checkpoint).name.removeprefix("checkpoint-"))


def weights(model):
    """Parameters and persistent buffers by name, each once, contiguous, sharded ones gathered."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDP leaves some whole after a forward, in memory that it frees later
            module.reshard()
    return {name: _whole(tensor.detach()).contiguous() for name, tensor in own_tensors(model).items()}


def own_tensors(model):
    kept = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def save_weights(model, path):
    """weights(model) as a safetensors file, flushed to the disk under another name and then renamed.

    Raises: OSError when it cannot be written; a file that was there before stays as it was
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.new")
    try:
        save_file(weights(model), part, metadata={"format": "pt"})
        _flush(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_weights_(model, path):
    """Put saved weights back, in place, so that what was shared stays shared.

    Raises: ValueError when names or shapes are not the model's
    Exact: load_weights_ after save_weights leaves every bit as it was.
    """
    put_weights_(model, load_file(path), str(path))


def put_weights_(model, saved, where):
    """load_weights_ from tensors by name."""
    own = own_tensors(model)
    if {n: tuple(t.shape) for n, t in own.items()} != {n: tuple(t.shape) for n, t in saved.items()}:
        odd = sorted(set(own) ^ set(saved)) or [n for n in own if own[n].shape != saved[n].shape]
        raise ValueError(
            f"{where}: tensors {', '.join(odd[:4])} do not fit the student; needed the student of that run."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def fingerprint(model, entries=65536):
    """What a model is, in a few numbers: names, shapes and types of its parameters, and the root mean square of each.

    Evenly spaced entries stand for large tensors. Two fits of one matrix agree to rounding, so a run can be resumed
    under another number of threads; another seed, start or training does not.
    """
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shapes = "".join(f"{name}{tuple(tensor.shape)}" for name, tensor in named.items())
    sizes = {}
    for name, tensor in named.items():
        flat = tensor.flatten()
        sample = flat[:: max(1, flat.numel() // entries)].float().cpu().double()  # no float64 on some devices
        sizes[name] = float(sample.square().mean().sqrt())
    return {"structure": hashlib.sha256(shapes.encode()).hexdigest()[:16], "rms": sizes}


def digest(tensor):
    """A short SHA-256 of a tensor's type, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    total = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    total.update(tensor.view(torch.uint8).numpy())  # no copy: it may be a file larger than memory
    return total.hexdigest()[:16]


def same_fingerprint(one, other):
    """Whether two fingerprints may be of one model."""
    if one is None or other is None or one.get("structure") != other.get("structure"):
        return one == other
    pairs = [(one["rms"][name], other["rms"].get(name, -1.0)) for name in one["rms"]]
    return all(abs(a - b) <= CLOSE * max(abs(a), abs(b)) for a, b in pairs)


def _refuse_other(path, there, here):
    differ = []
    for key in sorted(set(there) | set(here)):
        a, b = there.get(key), here.get(key)
        if (isinstance(a, dict) and "rms" in a) or (isinstance(b, dict) and "rms" in b):
            differ += [] if same_fingerprint(a, b) else [f"{key}: another model"]
        elif isinstance(a, dict) and isinstance(b, dict):
            differ += [f"{key}.{k}: {a.get(k)!r} there, {b.get(k)!r} here" for k in {**a, **b} if a.get(k) != b.get(k)]
        elif a != b:
            differ.append(f"{key}: {a!r} there, {b!r} here")
    if differ:
        raise ValueError(
            f"heal: folder {path} holds a run with other arguments ({'; '.join(differ)}); needed the same ones to go on. "
            "Choose another folder, or remove this one."
        )


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _flush(path):
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("r+b") as opened:  # Windows flushes only what is open for writing
            os.fsync(opened.fileno())


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
