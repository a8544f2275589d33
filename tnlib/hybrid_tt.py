"""Hybrid TT: a GPT-2 of random TT-matrix cores to train from scratch, under the names of github.com/tkenaz/tt-transformer.

The model is transformers' own GPT-2 with its matrices replaced by a recipe, so config.json stays a GPT-2 config. The rules
are in papers.py; cores are drawn so that their product has the deviation of GPT-2's own start, which per-core Xavier has not.
"""

import math
from dataclasses import dataclass, replace

import torch

from tnlib.layers import FactorizedLinear
from tnlib.low_rank import LowRank
from tnlib.papers import HYBRID_SOURCE, hybrid_rules
from tnlib.plan import plan
from tnlib.recipe import Recipe, RecipeError, Rule
from tnlib.shapes import balanced_modes
from tnlib.surgery import factorize_
from tnlib.tt_matrix import TTMatrix

_PRINTED_MODES = {768: (8, 12, 8), 3072: (12, 16, 16)}  # of the hybrid class; other sizes get balanced ones here
_PARTS = {"attention": ".attn.", "ffn": ".mlp.", "embeddings": ".wte.", "positions": ".wpe.", "head": "lm_head."}


@dataclass(frozen=True, kw_only=True)
class HybridTTConfig:
    """A GPT-2 and the bond ranks of its attention and MLP; field names and defaults are the repository's.

    attention_ranks, ffn_ranks: (r1, r2). A third entry, as in the repository's [24, 48, 24], is accepted and not used: three
        cores have two bonds, and the recipe's notes say so
    d_ff: None is 4 * d_model
    Raises: RecipeError for ranks that are not two or three positive integers
    Source: src/tt_transformer_hybrid.py. Its embed_ranks are never read there, and are left out here.
    """

    vocab_size: int = 50_257
    d_model: int = 768
    n_heads: int = 12
    n_layers: int = 12
    d_ff: int | None = None
    max_seq_len: int = 1024
    dropout: float = 0.1
    attention_ranks: tuple[int, ...] = (32, 64, 32)
    ffn_ranks: tuple[int, ...] = (12, 24, 12)
    tie_embeddings: bool = True

    def __post_init__(self):
        for name in ("attention_ranks", "ffn_ranks"):
            ranks = tuple(getattr(self, name))
            if len(ranks) not in (2, 3) or not all(isinstance(r, int) and r > 0 for r in ranks):
                raise RecipeError(
                    f"HybridTTConfig: got {name}={ranks}; needed two positive integers (a third is not used). "
                    "Give one rank for each bond between three cores, such as (24, 48)."
                )
            object.__setattr__(self, name, ranks)

    def gpt2(self):
        """The GPT2Config of this size, without special tokens."""
        from transformers import GPT2Config

        drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), self.dropout)
        sizes = {"n_embd": self.d_model, "n_head": self.n_heads, "n_layer": self.n_layers, "n_inner": self.d_ff}
        sizes |= {"n_positions": self.max_seq_len, "tie_word_embeddings": self.tie_embeddings}
        return GPT2Config(vocab_size=self.vocab_size, bos_token_id=None, eos_token_id=None, **sizes, **drop)

    def recipe(self):
        """These ranks as a Recipe. Exact: with the README's ranks its rules are those of papers["hybrid-tt"]."""
        narrow, wide = (
            _PRINTED_MODES.get(size) or balanced_modes(size, 3)
            for size in (self.d_model, self.d_ff or 4 * self.d_model)
        )
        rules = hybrid_rules(self.attention_ranks[:2], self.ffn_ranks[:2], narrow, wide)
        unused = [f"{ranks[2]} of {ranks}" for ranks in (self.attention_ranks, self.ffn_ranks) if len(ranks) > 2]
        notes = f"three cores have two bonds; not used: {', '.join(unused)}" if unused else ""
        return Recipe(name="hybrid-tt", base="gpt2", source=HYBRID_SOURCE, rules=rules, notes=notes)


def split_recipe(name, attention, ffn, init="random"):
    """Attention matrices in one form and FFN matrices in another, None for dense; q, k and v are three matrices.

    Exact: with ffn=None the parameters removed are those of attention, 4 d^2 less 4 forms a block.
    """
    forms = {"qkv": (attention, 3), "o": (attention, 1), "mlp": (ffn, 1)}
    rules = (Rule(where=where, form=form, split=n, init=init) for where, (form, n) in forms.items() if form)
    return Recipe(name=name, base="gpt2", rules=tuple(rules))


def matched_recipe(model, recipe, total):
    """The recipe with other ranks in its last rule, those that bring the model nearest to `total` parameters.

    model: dense, also on the meta device; the last rule's form is LowRank or TTMatrix, its own ranks do not matter
    Raises: RecipeError for other forms
    Exact: no rank, and no ranks (r, …, r) or (r, …, r + 1) of a TT-matrix, come nearer.
    """
    *others, last = recipe.rules
    widest = max(max(row.shape) for row in plan(model, recipe).rows)
    best, best_gap = None, math.inf
    for form in _growing(last.form, widest):
        tried = replace(recipe, rules=(*others, replace(last, form=form)))
        size = plan(model, tried).total
        if abs(size - total) < best_gap:
            best, best_gap = tried, abs(size - total)
        if size >= total:  # all that follow are larger
            break
    return best


def _growing(form, widest):
    """The form at rank 1, 2, … up to `widest`; a TT-matrix takes half a step in between, its last bond first."""
    if isinstance(form, LowRank):
        return [replace(form, kept=None, rank=r) for r in range(1, widest + 1)]
    if not isinstance(form, TTMatrix):
        raise RecipeError(
            f"matched_recipe: got {form}; needed LowRank or TTMatrix in the last rule. Choose ranks by hand."
        )
    bonds = (form.order or len(form.in_modes)) - 1
    steps = [(r,) * (bonds - 1) + (last,) for r in range(1, widest + 1) for last in ((r, r + 1) if bonds > 1 else (r,))]
    return [replace(form, kept=None, max_rank=None, ranks=(1, *ranks, 1)) for ranks in steps]


def hybrid_model(config, seed=0, recipe=None):
    """GPT2LMHeadModel of random weights from `seed`, factorized.

    config: HybridTTConfig; recipe: another one than config.recipe(), with init="random" rules
    Returns: the model, on the CPU. The global random state is left as it was
    Exact: each replaced weight has in expectation the mean square of the dense one that GPT-2 starts from: 0.02^2, and
        0.02^2 / (2 n_layers) where a block adds to the residual stream.
    """
    model = dense_model(config, seed)
    factorize_(model, config.recipe() if recipe is None else recipe, seed=seed, progress=False)
    return model


def dense_model(config, seed=0):
    """The GPT2LMHeadModel that hybrid_model starts from. Exact: equal seeds give equal weights."""
    from transformers import GPT2LMHeadModel

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config.gpt2())


def per_core_xavier_(model, seed=0):
    """Draw all cores again as the repository does, each from N(0, 2 / (r*in + out*r')), in place; returns None.

    Exact: the product's deviation is sqrt(product of ranks * product of the cores' variances): 0.0117 for 768x768 at
        (24, 48), where GPT-2 starts at 0.02 and Xavier for the matrix would be 0.0361.
    Source: src/tt_linear.py, TTLinear.__init__.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        for core in layer.factors.values() if isinstance(layer, FactorizedLinear) else ():
            r, o, i, s = core.shape
            core.data.copy_(math.sqrt(2 / (r * i + o * s)) * torch.randn(core.shape, generator=generator))


def get_compression_stats(model):
    """Parameters of a factorized model and of the dense one that it replaces, in all and by part.

    model: a GPT-2 of hybrid_model, or any with its module names and dense embeddings; works on the meta device
    Returns: dictionary of {"original_params", "compressed_params", "compression_ratio"}: "total" (tied weights once, with
        positions, biases and norms), "attention", "ffn", "embeddings" (of tokens), "positions", "head" (0 if
        tied), "other", then "without_embeddings" (neither tokens, positions nor head) and "untied" (a dense head stored)
    Source: the name and the three keys are the repository's; it leaves biases out of the original and norms out of both.
    Exact: the compressed total is the number of the model's parameters.
    """
    stored, dense = dict.fromkeys((*_PARTS, "other"), 0), dict.fromkeys((*_PARTS, "other"), 0)
    for name, parameter in model.named_parameters():
        stored[_part(name)] += parameter.numel()
        dense[_part(name)] += parameter.numel()
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear):
            dense[_part(name)] += math.prod(layer.shape) - layer.form.num_params(layer.shape)
    total = sum(dense.values()), sum(stored.values())
    outside = sum(stored[part] for part in ("embeddings", "positions", "head"))
    head = stored["embeddings"] if model.config.tie_word_embeddings else 0
    counts = {"total": total} | {part: (dense[part], stored[part]) for part in stored}
    counts |= {"without_embeddings": tuple(n - outside for n in total), "untied": tuple(n + head for n in total)}
    keys = ("original_params", "compressed_params", "compression_ratio")
    return {part: dict(zip(keys, (*both, both[0] / max(1, both[1])))) for part, both in counts.items()}


def _part(name):
    return next((part for part, mark in _PARTS.items() if mark in f".{name}."), "other")
