"""A checkpoint's tensors where they lie: file, name, shape and type of each, without reading one."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from tnlib.assets import weight_files

INDEX, CONFIG = "model.safetensors.index.json", "config.json"


class Stored(NamedTuple):
    """Where a tensor of the checkpoint is."""

    path: Path
    key: str
    shape: tuple
    wide: int  # bytes a number

    def read(self):
        """The tensor, in memory of its own."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.key)


def stored_tensors(source):
    """{stored name: Stored} of a folder, every file opened once.

    Raises: ValueError for a file that is missing or truncated, and for an index that does not fit the shards
    """
    files, found = weight_files(source), {}
    for path in sorted(set(files.values())):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, not a dictionary
                    part = file.get_slice(key)
                    wide = int(re.search(r"\d+", part.get_dtype())[0]) // 8  # "BF16"
                    found[key] = Stored(path, key, tuple(part.get_shape()), wide)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"checkpoint: {path} cannot be read ({error}); needed a whole safetensors file. Fetch it again."
            ) from error
    if lost := sorted(set(files) - set(found)):
        raise ValueError(
            f"checkpoint: {source / INDEX} names {len(lost)} tensors that are in no shard, {lost[0]} among them; needed an "
            "index that fits the shards. Fetch the checkpoint again."
        )
    return found


def identity(files):
    """Name, size and time of change of each file, to know a checkpoint again."""
    paths = sorted({stored.path for stored in files.values()})
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def stored_config(folder):
    """The quantization_config of a folder's config.json, {} where there is none."""
    path = Path(folder) / CONFIG
    return (json.loads(path.read_text("utf-8")).get("quantization_config") or {}) if path.exists() else {}


def class_of(folder):
    """The class of transformers that a folder's config.json names, and that config.

    Raises: ValueError where it names none
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or ["none"])[0], None)
    if kind is None:
        raise ValueError(
            f"{folder}/{CONFIG}: got architectures={config.architectures}; needed a model class of transformers first. "
            "Save the model again with save_pretrained, or write the class's name there."
        )
    return kind, config


def skeleton_of(folder):
    """The dense model that a folder's config.json describes, in eval mode: parameters on the meta device, other buffers real."""
    from accelerate import init_empty_weights

    kind, config = class_of(folder)
    with init_empty_weights(include_buffers=False):
        model = kind(config)
    model.tie_weights()  # each parameter was made anew
    return model.eval()
