"""Rivals of an activation-aware fit, from their papers: ASVD's scaling, SVD-LLM's whitening, magnitude and Wanda pruning."""

import torch
from torch import nn

from tnlib.form import check_kept, measured_error
from tnlib.layers import FactorizedLinear
from tnlib.low_rank import LowRank
from tnlib.native import tell_transformers
from tnlib.recipe import RecipeError, match
from tnlib.shapes import ShapeError, is_conv1d, weight_of
from tnlib.spectrum import truncate
from tnlib.surgery import swap

JITTER = 1e-6  # of the mean power, as published implementations add where a Gram is singular


def asvd(weight, moments, rank, alpha=0.5):
    """Low rank after each input channel has been scaled by (its root mean square)^alpha: {"left", "right"}.

    Source: ASVD (2312.05821), which takes the mean absolute value where this takes the root mean square; alpha is the paper's.
    Exact: alpha = 0 is the plain truncated SVD.
    """
    scale = moments.second.diagonal().clamp_min(1e-12).pow(alpha / 2)  # (in,)
    left, right = truncate(weight.double() * scale, rank).balanced()
    return {"left": left, "right": right / scale}


def svd_llm(weight, moments, rank):
    """Low rank after whitening as SVD-LLM writes it: truncate W S, S a Cholesky factor of the second moment, then undo S.

    Returns: {"left", "right"}. Source: SVD-LLM (2403.07378), algorithm 1.
    Exact: the same product as fit_weighted's for the same second moment, to rounding.
    """
    second = moments.second.double()
    eye = torch.eye(len(second), dtype=second.dtype, device=second.device)
    root = torch.linalg.cholesky(second + JITTER * second.diagonal().mean() * eye)  # (in, in)
    left, right = truncate(weight.double() @ root, rank).balanced()
    return {"left": left, "right": torch.linalg.solve_triangular(root, right, upper=False, left=False)}


def factorize_by_(model, recipe, stats, method, **options):
    """factorize_ for LowRank rules with the factors of `method` (asvd or svd_llm), in place; returns None.

    stats: {module name: Moments}, as from calibrate. Biases stay as they are
    Raises: RecipeError for a rule of another form; as match
    """
    new = {}
    for name, module, rule in match(model, recipe):
        if not isinstance(rule.form, LowRank) or rule.split > 1 or isinstance(module, nn.Embedding):
            raise RecipeError(
                f"factorize_by_, module {name}: got {rule.form} for {type(module).__name__}; needed LowRank rules for linear layers, "
                "without split. Use factorize_ for the others."
            )
        weight = weight_of(module).detach()
        form = rule.form.resolve(tuple(weight.shape))
        source = "Conv1D" if is_conv1d(module) else "Linear"
        layer = FactorizedLinear(form, weight.shape, module.bias is not None, source, weight.device, weight.dtype, draw=False)
        layer.bias = module.bias
        factors = method(weight, stats[name], form.rank, **options)
        layer.load_factors(factors, measured_error(weight, factors["left"] @ factors["right"]))
        new[name] = layer.train(module.training)
    for name, layer in new.items():
        swap(model, name, layer)
    tell_transformers(model, recipe)


def prune_(model, names, kept=None, stats=None, pattern=None):
    """Set the least entries of the named matrices to zero, in place; returns None. Where the zeros are is not stored by this.

    kept: share of each row's entries that stay; or pattern: (n, m), n of every m neighbors along the inputs stay
    stats: {module name: Moments}: entries are judged by |W_ij| times the root mean square of input j (Wanda); None: by |W_ij|
    Raises: ShapeError for a share outside (0, 1], for both or neither of kept and pattern, and for one that does not divide the inputs
    Source: Wanda, Sun et al. 2023 (2306.11695); magnitude: Han et al. 2015.
    Exact: each row keeps round(kept * in) entries, or n of every m, unchanged.
    """
    check_kept("prune_", kept)
    if (kept is None) == (pattern is None):
        raise ShapeError(f"prune_: got kept={kept}, pattern={pattern}; needed one of the two. Give kept=0.8 or pattern=(2, 4).")
    for name in names:
        weight = weight_of(model.get_submodule(name)).detach()  # (out, in), a view
        out, width = weight.shape
        score = weight.abs().double()
        if stats is not None:
            score = score * stats[name].second.diagonal().sqrt().to(score.device)
        if pattern is not None and width % pattern[1]:
            raise ShapeError(f"prune_, module {name}: got {width} inputs; needed a multiple of {pattern[1]} for pattern {pattern}.")
        groups = score.reshape(out, -1, width if pattern is None else pattern[1])
        number = round(kept * width) if pattern is None else pattern[0]
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(number, -1).indices, True)
        weight.mul_(keep.reshape(out, width))
