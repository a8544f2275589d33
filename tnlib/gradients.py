"""The other side of a matrix: second moments of the loss's gradient at its outputs, so that errors count where the loss feels them.

With G = mean of g g.T and C = mean of x x.T, tr(G D C D.T) is the loss's second-order rise for a change D of the weight if
gradients and inputs were independent (K-FAC's assumption, Martens & Grosse 2015).
"""

from contextlib import ExitStack
from dataclasses import replace

import torch
import torch.nn.functional as F

from tnlib.modes import eval_mode


def with_gradients(stats, model, windows, names=None, batch=4):
    """Moments with the second moment of gradients at the outputs, from one backward pass over a text.

    stats: {module name: Moments}; model: a causal language model, its weights are not changed
    windows: (windows, context), batch at a time; names: None: all of `stats` that have inputs. Memory: 8 * out * out bytes each
    Returns: a dictionary like `stats`; fits then weigh errors on both sides (LowRank in closed form, trains by sweeps, others
        downhill). What LayerFit reports stays the error of the outputs
    Raises: ValueError for a model without a next token, for a module that no gradient reaches and for gradients that are not finite
    Exact: `gradients` is G.T @ G / tokens for the matrix G (tokens, out) of gradients of the summed next-token losses.
    """
    if not getattr(model, "can_generate", lambda: False)():
        raise ValueError(
            f"with_gradients: got {type(model).__name__}; needed a causal language model with its head, whose loss is that of the next "
            "token. Load it with task='causal-lm'."
        )
    names = [name for name in (stats if names is None else names) if stats[name] is not None and stats[name].second is not None]
    sums, tokens = dict.fromkeys(names, 0), 0
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    device = next(model.parameters()).device

    def watch(name):
        def hook(module, args, output):
            output.register_hook(lambda gradient: sums.__setitem__(name, sums[name] + _gram(gradient)))

        return hook

    with ExitStack() as hooks, eval_mode(model), torch.enable_grad():
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_hook(watch(name)).remove)
        try:
            for parameter, _ in needed:
                parameter.requires_grad_(False)
            start = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
            hooks.callback(start.remove)
            for ids in windows.split(batch):
                ids = ids.to(device).long()
                logits = model(ids).logits[:, :-1].float()
                F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
                tokens += ids.numel()
        finally:
            for parameter, wanted in needed:
                parameter.requires_grad_(wanted)
    if lost := [name for name in names if isinstance(sums[name], int)]:
        raise ValueError(
            f"with_gradients: no gradient reaches {lost[0]} ({len(lost)} modules); needed modules between the embedding and the loss."
        )
    if odd := [name for name in names if not bool(sums[name].diagonal().sum().isfinite())]:
        raise ValueError(
            f"with_gradients: gradients at {odd[0]} are NaN or infinite ({len(odd)} modules); needed finite ones. Run the model in float32."
        )
    return {name: replace(m, gradients=sums[name] / tokens) if name in sums else m for name, m in stats.items()}


def _gram(gradient):
    flat = gradient.reshape(-1, gradient.shape[-1])
    flat = flat if flat.dtype == torch.float64 else flat.float()
    return (flat.T @ flat).double()
