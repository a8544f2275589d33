"""A teacher's logits, computed once and kept on disk, so that many students or many epochs share one forward pass.

    teacher.json                 what was computed: model, windows, how many logits, at which temperature
    shard-00000.safetensors …    values (windows, context, top) and, unless all are kept, their tokens

A shard is written under another name, flushed and renamed, so a shard that is there is whole; a run that was stopped goes
on with the first missing one.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from tnlib.history import is_interactive
from tnlib.modes import eval_mode
from tnlib.records import write_atomic
from tnlib.resume import digest, fingerprint, only_one, same_fingerprint
from tnlib.windows import check_windows

SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Logits:
    """All logits of a batch: (batch, context, vocabulary), under the name that a model's output has."""

    logits: torch.Tensor


@dataclass(frozen=True)
class TopLogits:
    """The largest log-probabilities of a batch and their tokens: (batch, context, top) each."""

    values: torch.Tensor
    indices: torch.Tensor


class PrecomputedTeacher:
    """Stands for a teacher in heal(), for the losses "logits" and "logits_reverse", on the windows it was computed for."""

    def __init__(self, out, facts):
        self.out, self.facts, self.fingerprint = Path(out), facts, facts | {"kind": "precomputed"}
        self._open = {}

    def check(self, heal, tensors):
        """Refuse losses, training data or a temperature that these logits are not for. Raises: ValueError"""
        windows = tensors["input_ids"]
        known = {"logits", "logits_reverse"}
        if beyond := set(heal.needs_teacher) - known:
            raise ValueError(
                f"heal: losses {', '.join(sorted(beyond))} need the teacher itself, got precomputed logits. Give the model."
            )
        if "attention_mask" in tensors:
            raise ValueError(
                "heal: padded data with precomputed logits, which are of whole windows. Give the model itself."
            )
        if digest(windows) != self.facts["windows"]:
            raise ValueError(
                f"heal: training windows {tuple(windows.shape)} are not those that the teacher in {self.out} read; needed the "
                "same windows in the same order. Precompute it for these."
            )
        if self.facts["temperature"] is not None and self.facts["temperature"] != heal.temperature:
            raise ValueError(
                f"heal: temperature {heal.temperature}, but {self.out} holds the largest probabilities at "
                f"{self.facts['temperature']}; needed the same. Precompute with temperature={heal.temperature}, or with top=None."
            )

    def batch(self, window, device="cpu"):
        """The logits of the windows numbered `window` (batch,): Logits, or TopLogits where only the largest are kept."""
        parts = {}
        for number in window.tolist():
            shard, row = divmod(number, self.facts["shard"])
            opened = self._shard(shard)
            for name in opened.keys():  # noqa: SIM118 -- a safetensors handle, not a dictionary
                parts.setdefault(name, []).append(opened.get_slice(name)[row])
        found = {name: torch.stack(rows).to(device) for name, rows in parts.items()}
        if self.facts["top"] is None:
            return Logits(found["values"])
        return TopLogits(found["values"], found["indices"].long())

    def _shard(self, number):
        if number not in self._open:
            self._open[number] = safe_open(_shard_path(self.out, number), "pt")  # mapped into memory, read when asked
        return self._open[number]


def precompute_teacher(teacher, windows, out, top=None, *, temperature=1.0, batch=4, progress=None):
    """Write a teacher's logits for `windows` to the folder `out`, and return what heal() takes in the teacher's place.

    windows: (n, context) int64 or int32, the training windows of the healing, in the same order
    top: keep only so many of the largest log-probabilities, all others as one bucket (see losses.logits_kl_top, a lower
        bound of the full divergence); None: all logits, 4 bytes each, which give the very numbers of the live teacher
    temperature: of the probabilities kept, the Heal's; all logits serve every temperature
    Returns: PrecomputedTeacher
    Raises: ValueError for another teacher's, other windows' or other settings' folder, or a `top` beyond the vocabulary
    Exact: the second call with the same arguments computes nothing; a damaged or missing shard is computed again.
    """
    check_windows("precompute_teacher", teacher, windows)
    vocabulary = teacher.config.vocab_size
    if top is not None and not 1 <= top <= vocabulary:
        raise ValueError(
            f"precompute_teacher: got top={top}; needed 1 to {vocabulary}, the vocabulary, or None for all."
        )
    per_window = windows.shape[1] * (4 * vocabulary if top is None else 8 * top)
    facts = {"teacher": fingerprint(teacher), "windows": digest(windows), "shape": list(windows.shape), "top": top}
    facts |= {"temperature": None if top is None else float(temperature), "shard": max(1, SHARD_BYTES // per_window)}
    facts["dtype"] = str(next(teacher.parameters()).dtype)
    out = Path(out)
    with only_one(out, wait=-1):
        _claim(out, facts)
        starts = range(0, len(windows), facts["shard"])
        missing = [
            n for n, start in enumerate(starts) if not _whole(out, n, len(windows[start : start + facts["shard"]]))
        ]
        hide = not (is_interactive() if progress is None else progress)
        for number in tqdm(missing, "teacher", disable=hide):
            some = windows[starts[number] : starts[number] + facts["shard"]]
            _write(_shard_path(out, number), _compute(teacher, some, top, temperature, batch))
    return PrecomputedTeacher(out, facts)


def _claim(out, facts):
    """Begin a folder, or see that it was begun with the same facts."""
    path = out / "teacher.json"
    if path.exists():
        there = json.loads(path.read_text("utf-8"))
        same = same_fingerprint(there.pop("teacher", None), facts["teacher"])
        others = {key: value for key, value in facts.items() if key != "teacher"}
        differ = ([] if same else ["teacher"]) + [k for k in others if there.get(k) != others[k]]
        if differ:
            raise ValueError(
                f"precompute_teacher: folder {out} holds another computation (differs in {', '.join(differ)}); needed the same "
                "arguments. Choose another folder, or remove this one."
            )
    else:
        write_atomic(path, json.dumps(facts) + "\n")
    for part in out.glob("*.part"):
        part.unlink()


def _compute(teacher, windows, top, temperature, batch):
    """Tensors of one shard."""
    device, values, indices = next(teacher.parameters()).device, [], []
    with eval_mode(teacher), torch.inference_mode():
        for some in windows.split(batch):
            logits = teacher(input_ids=some.to(device), use_cache=False).logits.float()  # (batch, context, vocabulary)
            if top is None:
                values.append(logits.cpu())
            else:
                best = (logits / temperature).log_softmax(-1).topk(top)
                values.append(best.values.cpu())
                indices.append(best.indices.int().cpu())
    found = {"values": torch.cat(values)}
    if not found["values"].isfinite().all():
        raise ValueError("precompute_teacher: the teacher's logits are not finite; needed a sound model. Try float32.")
    return found if top is None else found | {"indices": torch.cat(indices)}


def _write(path, tensors):
    part = path.with_suffix(".part")
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"precompute_teacher: {path} could not be written ({error}); needed room and leave to write. Make room, or keep "
            "fewer logits with top=, and call again: shards that are there are kept."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _whole(out, number, rows):
    """Whether a shard is there, readable and of the right length; safetensors checks that its data end where the file does."""
    try:
        with safe_open(_shard_path(out, number), "pt") as opened:
            return opened.get_slice("values").get_shape()[0] == rows
    except (FileNotFoundError, SafetensorError):
        return False


def _shard_path(out, number):
    return Path(out) / f"shard-{number:05d}.safetensors"
