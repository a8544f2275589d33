"""A whole checkpoint at once: weights, tokenizer and model card into a folder, and the model back from it."""

import shutil
from pathlib import Path

from tnlib.assets import fetch
from tnlib.bars import bars_on_terminals
from tnlib.checkpoint_files import class_of, stored_config
from tnlib.model_card import CARD, model_card
from tnlib.records import write_atomic


def save(model, folder, tokenizer=None, *, base=None, measured=None, **options):
    """Write a model that from_pretrained reads, its tokenizer and its model card into a new folder; returns None.

    base, measured: for the model card, see model_card; options: for save_pretrained, such as max_shard_size
    The folder gets its name when all is in it. To write over an older checkpoint use model.save_pretrained(folder).
    Raises: ValueError for a folder that holds something, and for a model that could not be loaded again; OSError when it
        cannot be written
    Exact: load(folder) has every bit of the model's tensors.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"save: {folder} is there already; needed a new folder. Choose another, or delete it.")
    part = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(part, ignore_errors=True)  # of a save that was killed
    part.mkdir(parents=True)
    try:
        with bars_on_terminals():
            model.save_pretrained(part, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        size_mb = sum(path.stat().st_size for path in part.glob("*.safetensors")) / 1e6
        write_atomic(part / CARD, model_card(model, base=base, measured=measured, size_mb=size_mb))
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load(name, **options):
    """The model in a folder, of the class that its config.json names, in eval mode; dense checkpoints too.

    name: as in `fetch`; options: for from_pretrained, such as dtype or device_map. The type is that of the stored tensors
    Raises: ValueError for a folder without such a class, or of a format that is not read any more
    Exact: what AutoModelFor….from_pretrained(folder) gives in a process that has imported tnlib.
    """
    folder = fetch(name)
    if (folder / "tnlib.json").exists() and not stored_config(folder):
        raise ValueError(
            f"load: {folder} is of the format before the native one (tnlib.json); needed config.json with a quantization_config. "
            "Run factorize_folder again on the dense checkpoint that tnlib.json names."
        )
    with bars_on_terminals():
        return class_of(folder)[0].from_pretrained(folder, use_safetensors=True, **options)
