"""What the commands ask of a folder: is it compressed, by which recipe, with which errors, how large; and its model."""

from pathlib import Path

from tnlib.checkpoint_files import stored_config
from tnlib.native import METHOD
from tnlib.recipe import Recipe
from tnlib.saving import load


def compressed(name):
    """Whether `name` is a folder with a compressed model."""
    return stored_config(name).get("quant_method") == METHOD


def recipe_of(folder):
    """The Recipe that a compressed folder was made by."""
    return Recipe.from_dict(stored_config(folder)["recipe"])


def errors_of(folder):
    """{module: relative error of its weight} of a compressed folder's factorized layers; None where it was not measured."""
    modules = stored_config(folder).get("modules", {})
    return {name: _error(layer) for name, layer in modules.items() if "form" in layer or "parts" in layer}


def bits_of(folder):
    """Widths in which a compressed folder's tensors are stored; an empty set for floats."""
    modules = stored_config(folder).get("modules", {}).values()
    layers = [part for layer in modules for part in (layer, *layer.get("parts", ()))]
    return {grid["bits"] for layer in layers for grid in layer.get("grids", {}).values() if grid["kind"] == "packed"}


def bytes_of(name):
    """Bytes of a folder's weights on disk; None where `name` is no folder with any."""
    files = list(Path(name).glob("*.safetensors"))
    return sum(path.stat().st_size for path in files) if files else None


def open_model(name, device=None):
    """The model in a folder, compressed or dense, or of an asset's or hub name; in eval mode. device: None: the CPU."""
    model = load(name)
    return model if device is None else model.to(device)


def require_causal(name, model):
    """The model again. Raises: ValueError for one that does not predict next tokens, as encoders do not"""
    if not model.can_generate():
        raise ValueError(
            f"{name}: is a {type(model).__name__}, which predicts no next token; needed a causal language model. Judge others by a "
            "task: tn.load_task, tn.predict, tn.score."
        )
    return model


def _error(layer):
    """A layer's error; of one in bands the root mean square of theirs, whose weights are alike in size."""
    if "parts" not in layer:
        return layer.get("error")
    errors = [part.get("error") for part in layer["parts"]]
    return None if None in errors else (sum(error**2 for error in errors) / len(errors)) ** 0.5
