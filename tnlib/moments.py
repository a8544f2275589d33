"""Second moments of what enters a model's matrices: all that a fit to activations needs to know of a text.

For a matrix W and its inputs x, the mean squared error of a replacement W' is tr((W - W') C (W - W').T) with
C = mean of x x.T, an (in, in) matrix. One pass over the text gives C; the fit then sees no token again.
"""

import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from tnlib.modes import eval_mode

KEEP = 8  # inputs of one forward pass that are remembered to find matrices that share one: q, k and v; gate and up


@dataclass(frozen=True)
class Moments:
    """Mean and second moment of a matrix's inputs; for an embedding how often each row was looked up."""

    tokens: int
    mean: torch.Tensor | None = None  # (in,), float64
    second: torch.Tensor | None = None  # (in, in), float64: mean of x x.T
    counts: torch.Tensor | None = None  # (rows,), float64, embeddings only

    @classmethod
    def joined(cls, parts):
        """Moments of several texts together, each weighed by its tokens. Exact: those of one text that holds all of them."""
        tokens = sum(part.tokens for part in parts)
        if parts[0].counts is not None:
            return cls(tokens, counts=sum(part.counts for part in parts))
        mean, second = (sum(part.tokens / tokens * getattr(part, name) for part in parts) for name in ("mean", "second"))
        return cls(tokens, mean, second)

    def covariance(self):
        """second - mean mean.T (in, in): what is left to a matrix whose bias takes the mean."""
        return self.second - torch.outer(self.mean, self.mean)


def second_moments(model, windows, names, batch=4, missing=False):
    """Second moments of the inputs of modules `names` over a text, in one pass.

    model: in any mode; it runs in eval mode without gradients and is left as it was
    windows: (windows, context) int64 or int32, as from token_windows
    names: names of nn.Linear, Conv1D or nn.Embedding modules; memory is 8 * in * in bytes for each distinct input
    batch: windows a forward pass. Each pass's products are taken in its own precision, at least float32, and summed in float64
    missing: give None for a module that the text never reaches, instead of an error
    Returns: {name: Moments}; modules that read the same tensor (q, k and v) share one Moments, computed once
    Raises: ValueError, naming the module, for inputs that are NaN or infinite and for a module that the text never reaches
    Exact: second equals X.T @ X / tokens for the matrix X (tokens, in) of all inputs.
    """
    names = list(names)
    if not names or not len(windows):
        raise ValueError(
            f"second_moments: got {len(names)} names and windows {tuple(windows.shape)}; needed at least one of each. "
            "Name modules as in model.named_modules(), and give token_windows of a longer text."
        )
    seen, run = Seen(model, names), runner(model, names)
    device = next(model.parameters()).device
    with seen, eval_mode(model), torch.no_grad():
        for ids in windows.split(batch):
            run(ids.to(device))
            seen.forget()
    return seen.moments(missing)


class Seen:
    """Sums over what enters some modules of a model, as long as one is in `with Seen(model, names):`."""

    def __init__(self, model, names):
        self.model, self.names = model, list(names)
        self.sums = {name: Sums(name) for name in self.names}
        self.groups, self.recent, self.hooks = {}, [], ExitStack()

    def __enter__(self):
        for name in self.names:
            hook = _hook(self.sums, name, self.groups, self.recent)
            handle = self.model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
            self.hooks.callback(handle.remove)
        return self

    def __exit__(self, *error):
        self.hooks.close()
        self.forget()

    def forget(self):
        """Let go of the last pass's inputs: the next ones are others, even where they lie in the same memory."""
        self.recent.clear()

    def moments(self, missing=False):
        """{name: Moments}, one object for modules that read the same tensors. missing: as in second_moments."""
        leaders = {name: self.groups.get(name, name) for name in self.names}
        found = {name: self.sums[name].moments(missing) for name, leader in leaders.items() if leader == name}
        return {name: found[leader] for name, leader in leaders.items()}


class Sums:
    """Running sums over one module's inputs."""

    def __init__(self, name):
        self.name, self.tokens, self.first, self.second, self.counts = name, 0, None, None, None

    def add(self, x):
        """x (…, in) of a matrix."""
        x = x.reshape(-1, x.shape[-1])  # (tokens, in)
        x = x if x.dtype == torch.float64 else x.float()
        product = x.T @ x  # (in, in)
        if not bool(product.diagonal().sum().isfinite()):  # a NaN or an infinity anywhere in x ends up here
            raise ValueError(
                f"second_moments: the inputs of module {self.name} hold {int((~x.isfinite()).sum())} NaN or infinite entries "
                f"among {x.numel()}, or their squares overflow; needed finite activations. Look at the layers before it, or run the "
                "teacher in float32."
            )
        if self.second is None:
            self.second = torch.zeros_like(product, dtype=torch.float64)
            self.first = torch.zeros_like(product[0], dtype=torch.float64)
        self.second += product
        self.first += x.sum(0)
        self.tokens += len(x)

    def count(self, ids, rows):
        """ids (…) looked up in an embedding of `rows` rows."""
        found = torch.bincount(ids.reshape(-1), minlength=rows).double()  # (rows,)
        self.counts = found if self.counts is None else self.counts + found
        self.tokens += ids.numel()

    def moments(self, missing=False):
        """The sums as Moments; for a module that saw no input None if `missing`, else an error."""
        if not self.tokens and missing:
            return None
        if not self.tokens:
            raise ValueError(
                f"second_moments: module {self.name} saw no input in the whole text; needed at least one token. It is not part of "
                "this model's forward pass, or a router never chose it: leave it out, or give more text."
            )
        if self.counts is not None:
            return Moments(self.tokens, counts=self.counts)
        return Moments(self.tokens, self.first / self.tokens, self.second / self.tokens)


def _hook(sums, name, groups, recent):
    """Add a module's input to its own sums, or find in the first pass that another module adds the same tensor."""

    def hook(module, args, kwargs):
        """Before the module's forward pass: its first argument is what enters the matrix."""
        x = args[0] if args else next(iter(kwargs.values()))
        leader = next((other for tensor, other in recent if tensor is x), None)
        if groups.setdefault(name, leader or name) != (leader or name):
            raise ValueError(
                f"second_moments: module {name} read {groups[name]}'s input in one pass and {leader or 'its own'} in another; "
                "needed the same in all. Ask for it in a call of its own."
            )
        if leader is None:
            recent.append((x, name))
            del recent[:-KEEP]
            sums[name].count(x, module.num_embeddings) if isinstance(module, nn.Embedding) else sums[name].add(x)

    return hook


def runner(model, names, cache=True):
    """What to call with ids: the model without its head where none of `names` is in it; cache=False: no keys and values are kept."""
    base, prefix = getattr(model, "base_model", model), getattr(model, "base_model_prefix", "")
    inside = base is not model and all(name.startswith(f"{prefix}.") for name in names)
    called = base if inside else model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return lambda ids: called(input_ids=ids, decoder_input_ids=ids)
    if not cache and "use_cache" in inspect.signature(called.forward).parameters:
        return partial(called, use_cache=False)
    return called
