"""What a transformers model believes to be tied. It knows ties by name, and surgery takes weights away under their names."""

import re

_PLAIN = re.compile(r"[\w.]+\.(weight|bias)")


def tell_ties(model):
    """Leave in the model's own list of ties those whose two names are still one tensor, in place; returns None.

    model: any module; only transformers models in it have such a list. Called after every exchange of weights
    Without it tie_weights(), which wrappers and loaders call, looks for names that are gone, or ties a head anew that was
    kept dense on purpose. Factors that embedding and head share are one tensor whether the list says so or not
    Exact: tie_weights() then changes nothing.
    """
    listed = [module for module in model.modules() if hasattr(module, "get_expanded_tied_weights_keys")]
    for module in listed:
        tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
        known = type(module)._tied_weights_keys or {}
        module._tied_weights_keys = {
            target: source
            for target, source in known.items()
            if not _PLAIN.fullmatch(target) or (source in tensors and tensors.get(target) is tensors[source])
        }
    for module in listed:
        module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
