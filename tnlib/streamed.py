"""Back into memory: the model that factorize_folder wrote."""

import contextlib
import json
from pathlib import Path

import torch

from tnlib.assets import weight_files
from tnlib.layers import FactorizedEmbedding, FactorizedLinear
from tnlib.recipe import Recipe
from tnlib.resume import own_tensors
from tnlib.surgery import factorize_

FACTS = "tnlib.json"
LAYERS = (FactorizedLinear, FactorizedEmbedding)


def load_factorized(folder):
    """The model that factorize_folder wrote, in eval mode, on the CPU, in the stored types.

    Raises: ValueError when the folder is not one, or its tensors do not fit its recipe
    Exact: its parameters are those of factorize_ in memory; tied weights are shared; report(model) has the errors.
    """
    folder = Path(folder)
    if not (folder / FACTS).exists():
        raise ValueError(f"load_factorized: {folder} has no {FACTS}; needed a folder that factorize_folder finished.")
    facts, model = json.loads((folder / FACTS).read_text("utf-8")), skeleton_of(folder)
    factorize_(model, Recipe.from_dict(facts["recipe"]), progress=False)
    _fill(model, folder)
    for name, error in facts["errors"].items():
        layer = model.get_submodule(name)
        first = next(layer.parameters())
        for other in model.modules():  # a tied head has its embedding's factors, and so its error
            if other is layer or (isinstance(other, LAYERS) and next(other.parameters()) is first):
                other.error = error
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return model


def skeleton_of(folder):
    """The model that a folder's config.json describes, in eval mode: parameters on the meta device, other buffers real."""
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or ["none"])[0], None)
    if kind is None:
        raise ValueError(
            f"{folder}/config.json: got architectures={config.architectures}; needed a model class of transformers first. "
            "Save the model again with save_pretrained, or write the class's name there."
        )
    with init_empty_weights(include_buffers=False):
        model = kind(config)
    model.tie_weights()  # each parameter was made anew
    return model.eval()


def _fill(model, folder):
    """Put the tensors of a folder in the places of those on the meta device; what was shared stays shared."""
    files, real = weight_files(folder), {}
    with _opened(set(files.values())) as opened:
        for name, tensor in own_tensors(model).items():
            if name in files:
                found = opened[files[name]].get_tensor(name)
                if found.shape != tensor.shape:
                    break
                trained = isinstance(tensor, torch.nn.Parameter)
                real[id(tensor)] = torch.nn.Parameter(found, tensor.requires_grad) if trained else found
            elif tensor.is_meta:
                break
        else:
            for module in model.modules():
                for held in (module._parameters, module._buffers):
                    held |= {name: real[id(t)] for name, t in held.items() if id(t) in real}
            return
    raise ValueError(
        f"load_factorized: {folder} has no {name} of shape {tuple(tensor.shape)}; needed what its recipe makes. Run factorize_folder "
        "again."
    )


@contextlib.contextmanager
def _opened(paths):
    """{path: open safetensors file}, each opened once: to read a header costs more than to read a small tensor."""
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        yield {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
