"""Fitted layers on disk: one safetensors file a layer, with the fingerprint of all that it came from."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tnlib.layer_fit import Found, LayerFit
from tnlib.records import write_atomic


@dataclass(frozen=True)
class FitStore:
    """Fitted layers of one run in `folder`; `settings` are the plain facts that decide a fit beside the tensors."""

    folder: Path
    teacher: torch.nn.Module
    windows: torch.Tensor
    held_out: torch.Tensor | None
    settings: dict

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        texts = [tensor for text in (self.windows, self.held_out) for tensor in moment_tensors(text)]
        object.__setattr__(self, "text", digest([*self.teacher.state_dict().values(), *texts], self.settings))

    def load(self, job):
        """The Found of an earlier run, None where there is none. Raises: ValueError for another run's."""
        from safetensors import safe_open

        path = self.folder / f"{job.name}.safetensors"
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            kept, names = file.metadata(), file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        if kept.get("fingerprint") != self._fingerprint(job):
            raise ValueError(
                f"fit_layers_: {path} is of another run: teacher, student, text or settings differ; needed the same ones to go "
                "on with it. Give out= another folder, or delete this one."
            )
        device = next(job.layer.parameters()).device
        parts = [{name: tensors[f"{k}.{name}"].to(device) for name in part.operands} for k, part in enumerate(job.parts)]
        bias = tensors["bias"].to(device) if "bias" in tensors else None
        return Found(parts, bias, LayerFit(**json.loads(kept["row"])))

    def save(self, job, found):
        from safetensors.torch import save

        tensors = {f"{k}.{n}": f.cpu().contiguous() for k, part in enumerate(found.factors) for n, f in part.items()}
        if found.bias is not None:
            tensors["bias"] = found.bias.cpu()
        row = {"fingerprint": self._fingerprint(job), "row": json.dumps(asdict(found.row))}
        write_atomic(self.folder / f"{job.name}.safetensors", save(tensors, metadata=row))

    def _fingerprint(self, job):
        forms = [str(part.form) for part in job.parts]
        return digest([f for part in job.parts for f in part.operands.values()], [self.text, job.names, forms])


def moment_tensors(text):
    """What a text is known by: its windows, or the tensors of its moments; nothing for None."""
    if known := getattr(text, "fingerprint", None):
        return [torch.tensor(list(known.encode()), dtype=torch.uint8)]
    if isinstance(text, Mapping):
        parts = [getattr(use, name) for use in text.values() if use for name in ("mean", "second", "counts")]
        return [part for part in parts if part is not None]
    return [] if text is None else [text]


def digest(tensors, facts):
    """Fingerprint of tensors, bit for bit, and of plain facts."""
    total = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for tensor in tensors:
        if tensor.device.type == "meta":  # a weight that is offloaded: known by its shape
            total.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            continue
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return total.hexdigest()
