"""Read this first: the five papers as recipes, every number with the place it was read.

Sizes that the papers print, and whether they follow from these shapes, are checked in tests/test_papers.py.
`skeleton(base)` builds a paper's model without weights or network, so that a plan costs nothing.
"""

from dataclasses import replace

from tnlib.kronecker import Kronecker
from tnlib.recipe import Heal, Quantize, Recipe, RecipeError, Rule
from tnlib.tensor_train import TensorTrain
from tnlib.treatment import Group
from tnlib.tt_matrix import MPO, TTMatrix

# --- Krony-PT, arXiv 2412.12351 v2 -------------------------------------------------------------------------------------
# All 12 blocks, MLP matrices only; embeddings and head tied. Shapes from table I and section 4; weights here are (out, in).
_KRONY_HEAL = Heal(
    losses=(("next_token", 1.0),),  # no distillation, section 4
    learning_rate=6e-5,  # cosine 6e-5 -> 6e-6, section 5; the July 2024 repository says 1.8e-3 -> 6e-5 instead
    final_learning_rate=6e-6,
    betas=(0.9, 0.95),
    clip=1.0,
    warmup=0.005,  # 500 to 1,500 steps, section 5, of about 220,000 (3 epochs of 9.04 B tokens, 122,880 a step)
    weight_decay=0.1,  # on the Kronecker factors only, in the April 2024 repository
    groups=(Group(where="scalars"), Group(where="rest", weight_decay=0.0)),
    source="arXiv 2412.12351 v2, section 5",
)


def _krony(name, up, terms=1, scaled=False, init="svd", notes=""):
    """Krony-PT's rule: right factor `up` = (r0, r1) on c_fc (3072, 768), transposed on c_proj (768, 3072)."""
    down = up[::-1]
    rules = tuple(
        Rule(where=where, form=Kronecker(right=right, terms=terms, scaled=scaled), init=init)
        for where, right in (("transformer.h.*.mlp.c_fc", up), ("transformer.h.*.mlp.c_proj", down))
    )
    source = "arXiv 2412.12351 v2, table I and section 4"
    return Recipe(name=name, rules=rules, base="gpt2", source=source, heal=_KRONY_HEAL, notes=notes)


KRONY = (
    _krony("krony-81m", (4, 1), notes="(768, 768) x (4, 1), one term"),
    _krony("krony-96m", (1, 2), init="prune", notes="(3072, 384) x (1, 2), one term, pruning initialization"),
    _krony(
        "krony-92m", (3, 3), terms=4, scaled=True, init="norm", notes="(1024, 256) x (3, 3), 4 terms, learnable scalars"
    ),
)

# --- TQCompressor, arXiv 2401.16367; numbers from config.yaml of terra-quantum-public/TQCompressedGPT2 ------------------
# wte 768 -> 384 -> 192 (two halvings of its columns: right factors (1, 2) nested make (1, 4)); MLPs of odd blocks only,
# c_fc A 384 x 768, B 2 x 4 as stored (in, out), r = 4. Attention untouched. Rows and columns of the MLPs are permuted (abstract:
# P W C), of wte the columns only (config.yaml); the search code is not in the repository, "damped" follows its description.
def _tq(right, terms, axes="both"):
    return Kronecker(right=right, terms=terms, permute=axes, search="damped")


_TQ_MLPS = (
    Rule(where="transformer.h.*.mlp.c_fc", blocks="odd", form=_tq((4, 2), 4)),
    Rule(where="transformer.h.*.mlp.c_proj", blocks="odd", form=_tq((2, 4), 4)),
)
_TQ_EMBEDDING = Rule(where="transformer.wte", form=_tq((1, 4), 1, "columns"))
_TQ_HALVED = replace(_TQ_EMBEDDING, form=_tq((1, 2), 1, "columns"))
TQCOMPRESSOR = Recipe(
    name="tqcompressor-81m",
    base="gpt2",
    source="arXiv 2401.16367; config.yaml of terra-quantum-public/TQCompressedGPT2",
    rules=(*_TQ_MLPS, _TQ_EMBEDDING),
    stages=((_TQ_HALVED,), _TQ_MLPS, (_TQ_EMBEDDING,)),  # tags 0, 1, 2
    heal=Heal(
        losses=(
            ("next_token", 1.0),
            ("logits", 1.0),
        ),  # distillation terms, weights and learning rate are not published
        source="losses, learning rate, batch and steps unpublished; 3.1 % of OpenWebText in three stages",
    ),
    notes="81.3 M only with a head tied to the compressed wte; the released model keeps a dense one (head='dense'): 119.9 M",
)

# --- Hybrid TT, github.com/tkenaz/tt-transformer ------------------------------------------------------------------------
# From scratch, GPT-2 size with a vocabulary of 50,000; q, k, v are three matrices there, one fused matrix in GPT-2.
def hybrid_rules(attention, mlp, narrow=(8, 12, 8), wide=(12, 16, 16)):
    """Rules for two bond ranks in attention and two in the MLP; modes of d_model and of d_ff, here those of 768 and 3072."""
    square = TTMatrix(out_modes=narrow, in_modes=narrow, ranks=(1, *attention, 1))
    up = TTMatrix(out_modes=wide, in_modes=narrow, ranks=(1, *mlp, 1))
    down = TTMatrix(out_modes=narrow, in_modes=wide, ranks=(1, *mlp, 1))
    return (
        Rule(where="transformer.h.*.attn.c_attn", form=square, split=3, init="random"),
        Rule(where="transformer.h.*.attn.c_proj", form=square, init="random"),
        Rule(where="transformer.h.*.mlp.c_fc", form=up, init="random"),
        Rule(where="transformer.h.*.mlp.c_proj", form=down, init="random"),
    )


HYBRID_SOURCE = "github.com/tkenaz/tt-transformer, hybrid class and README"
HYBRID = tuple(
    Recipe(name=name, base="gpt2-50k", source=HYBRID_SOURCE, rules=hybrid_rules(attention, mlp), notes=notes)
    for name, attention, mlp, notes in (
        ("hybrid-tt", (24, 48), (8, 16), "printed as [24, 48, 24] and [8, 16, 8]; three cores have two bonds"),
        ("uniform-tt", (24, 48), (24, 48), "the README's '2.2x' matches no documented rank; [24, 48] gives 2.34x"),
    )
)

# --- CompactifAI, arXiv 2401.14109 --------------------------------------------------------------------------------------
# Site counts and bond dimensions are not published: three sites and chi = 100 reproduce 2.1 B parameters to 5 %.
COMPACTIFAI = Recipe(
    name="compactifai",
    base="meta-llama/Llama-2-7b-hf",
    source="arXiv 2401.14109 v2, sections 2 and 3; sites and chi inferred from its sizes",
    rules=(
        Rule(where="attention", form=MPO(out_modes=(16, 16, 16), in_modes=(16, 16, 16), max_rank=100)),
        Rule(where=("gate", "up"), form=MPO(out_modes=(16, 16, 43), in_modes=(16, 16, 16), max_rank=100)),
    ),
    heal=Heal(source="less than one epoch of UltraChat, Alpaca and OpenHermes; learning rate and steps unpublished"),
    quantize=Quantize(
        bits=4, what="dense", when="after", learn="frozen", source="the '93 %' variant, v2 section 3"
    ),
    notes="down_proj, embeddings and head stay dense, as the paper advises",
)

# --- Yang et al. 2023, arXiv 2306.01076, and its repository -------------------------------------------------------------
_QAT_HEAL = Heal(
    losses=(
        *((name, 1.0) for name in ("hidden", "hidden_cosine", "attention", "embedding", "embedding_cosine")),
        *(("task", 1.0), ("logits", 1.0)),  # join after all 12 layers, at temperature 1
    ),
    learning_rate=1e-3,  # then 2e-5 once task and logit losses join
    final_learning_rate=2e-5,
    schedule="constant",
    betas=(0.9, 0.999),  # torch's defaults
    clip=10.0,
    curriculum_steps=2000,
    source="repository: one more layer every 2,000 steps",
)


def _qat(name, square, up, ranks, mlp_ranks, embedding_rank=None, pooler=False, notes=""):
    """TT linear layers over (input | output) modes, `square` for attention, `up` for the MLP, reversed for the MLP's output."""

    def train(in_modes, out_modes, ranks):
        return TensorTrain(in_modes=in_modes, out_modes=out_modes, ranks=ranks, redundant=True)

    rules = [
        Rule(where="attention", form=train(*square, ranks), init="scratch"),
        Rule(where="up", form=train(*up, mlp_ranks), init="scratch"),
        Rule(where="down", form=train(up[1][::-1], up[0][::-1], mlp_ranks), init="scratch"),
    ]
    if pooler:
        rules.append(Rule(where="pooler", form=train(*square, ranks), init="scratch"))
    if embedding_rank:
        rules.append(qat_embedding(embedding_rank))
    quantize = Quantize(bits=4, activation_bits=8, source="section 4: INT4 and INT8 rows; one learnable scale a core")
    return Recipe(
        name=name,
        rules=rules,
        base="bert-base-uncased",
        source="arXiv 2306.01076 and its repository",
        heal=_QAT_HEAL,
        quantize=quantize,
        notes=notes,
    )


def qat_embedding(rank):
    """The TTM embedding of the paper: 32,000 rows cover BERT's 30,522; commented out in its repository."""
    ranks = (1, rank, rank, rank, 1)
    form = TTMatrix(out_modes=(16, 20, 10, 10), in_modes=(4, 4, 8, 6), ranks=ranks, pad_rows=True, redundant=True)
    return Rule(where="embedding", form=form, init="scratch")


def _inferred(rank):
    """Shapes that reproduce the paper's 38.5 and 98.7 MB; the shipped ones do not. Inferred, not published."""
    ranks = (1, rank, rank, rank, 1)
    square, up = ((12, 64), (64, 12)), ((12, 64), (64, 48))
    return _qat(f"qat-tt-rank{rank}", square, up, ranks, ranks, rank, notes="shapes inferred from the printed sizes")


QAT_TT = (
    _inferred(30),
    _inferred(50),
    _qat(
        "qat-tt-shipped",
        square=((24, 32), (32, 24)),
        up=((32, 24), (48, 64)),
        ranks=(1, 24, 30, 24, 1),
        mlp_ranks=(1, 30, 30, 30, 1),
        pooler=True,
        notes="as the repository ships it: the word embedding stays dense",
    ),
)

ALL = {recipe.name: recipe for recipe in (*KRONY, TQCOMPRESSOR, *HYBRID, COMPACTIFAI, *QAT_TT)}


class _Papers(dict):
    """Recipes by name; a name that is not there is answered with those that are."""

    def __missing__(self, name):
        raise RecipeError(f"papers[{name!r}]: no such recipe; needed one of {', '.join(self)}.")


papers = _Papers(ALL)


_SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def skeleton(base):
    """A paper's base model on the meta device: true shapes, no weights, no network, milliseconds.

    base: "gpt2", "gpt2-50k" (Hybrid TT's vocabulary), "distilgpt2", "smollm2-135m", "bert-base-uncased",
        "meta-llama/Llama-2-7b-hf", or a config object
    Raises: RecipeError for other names
    Exact: parameter counts are those of the published checkpoints (124,439,808; 134,515,008; 109,482,240; 6,738,415,616).
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig

    known = {
        "gpt2": (AutoModelForCausalLM, GPT2Config),
        "gpt2-50k": (AutoModelForCausalLM, lambda: GPT2Config(vocab_size=50_000, bos_token_id=None, eos_token_id=None)),
        "distilgpt2": (AutoModelForCausalLM, lambda: GPT2Config(n_layer=6)),
        "smollm2-135m": (AutoModelForCausalLM, lambda: LlamaConfig(**_SMOLLM2)),
        "bert-base-uncased": (AutoModel, BertConfig),
        "meta-llama/Llama-2-7b-hf": (AutoModelForCausalLM, LlamaConfig),
    }
    if isinstance(base, str) and base not in known:
        raise RecipeError(
            f"skeleton({base!r}): no such base; needed one of {', '.join(known)}, or a transformers config."
        )
    kind, config = known[base] if isinstance(base, str) else (AutoModelForCausalLM, lambda: base)
    with torch.device("meta"):
        return kind.from_config(config())
