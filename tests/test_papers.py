"""Every exact size that the five papers print, or that follows from their shapes, on meta tensors: nothing is downloaded.

Each line states its convention. "tied" counts the shared embedding and head once; "head stored" adds the dense head.
"""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from tnlib.kronecker import Kronecker
from tnlib.papers import papers, qat_embedding, skeleton
from tnlib.plan import plan
from tnlib.recipe import Recipe, RecipeError, Rule
from tnlib.tt_matrix import MPO, TTMatrix


@pytest.fixture(scope="module")
def gpt2():
    return skeleton("gpt2")


def krony(up, terms=1):
    """Krony-PT's rule with another right factor: c_fc (3072, 768) and, transposed, c_proj."""
    return Recipe(
        name="krony",
        rules=(
            Rule(where="up", form=Kronecker(right=up, terms=terms)),
            Rule(where="down", form=Kronecker(right=up[::-1], terms=terms)),
        ),
    )


@pytest.mark.parametrize(
    ("base", "params"),
    [
        ("gpt2", 124_439_808),
        ("distilgpt2", 81_912_576),
        ("smollm2-135m", 134_515_008),
        ("bert-base-uncased", 109_482_240),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
    ],
)
def test_skeletons_have_the_published_sizes(base, params):
    model = skeleton(base)
    assert sum(p.numel() for p in model.parameters()) == params  # tied, with positions
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("up", "terms", "total"),
    [
        ((48, 24), 1, 67_893_504),  # Krony-PT table I, (64, 32) x (48, 24)
        ((4, 1), 1, 81_972_576),  # table I, "81M"
        ((1, 2), 1, 96_128_304),  # table I, "96M"
        ((3, 3), 2, 80_400_048),  # table II, "80.40 M"
        ((3, 3), 3, 86_691_720),  # table II, "86.69 M"
        ((3, 3), 4, 92_983_392),  # printed as 92.2 M; without its 96 scalars it is 93.0 M
    ],
)
def test_krony_tables(gpt2, up, terms, total):
    assert plan(gpt2, krony(up, terms)).total == total  # tied, with positions, scalars folded


def test_krony_gpt2_row_holds_24_degenerate_factors(gpt2):
    assert plan(gpt2, krony((1, 1))).total == 124_439_832 == 124_439_808 + 24


@pytest.mark.parametrize(("name", "without_positions"), [("krony-81m", 81.19), ("krony-96m", 95.34)])
def test_krony_as_its_repository_counts(gpt2, name, without_positions):
    predicted = plan(gpt2, papers[name])
    assert round((predicted.total - predicted.positions) / 1e6, 2) == without_positions


def test_krony_92m_has_96_scalars(gpt2):
    assert plan(gpt2, papers["krony-92m"]).total == 92_983_392 + 96


def test_tqcompressor_is_81_or_119_million_by_what_becomes_of_the_head(gpt2):
    tied = papers["tqcompressor-81m"]
    assert plan(gpt2, tied).total == 81_336_388
    assert plan(gpt2, tied).total + plan(gpt2, tied).head == 119_933_764
    *mlp, embedding = tied.rules
    as_released = replace(tied, rules=(*mlp, replace(embedding, head="dense")))
    assert plan(gpt2, as_released).total == 119_933_764  # dense lm_head stored beside the compressed wte
    one_halving = replace(tied, rules=(*mlp, replace(embedding, form=Kronecker(right=(1, 2)))))
    assert round(plan(gpt2, one_halving).total / 1e6, 1) == 91.0


def test_hybrid_tt_ratios():
    model = skeleton("gpt2-50k")
    hybrid, uniform = plan(model, papers["hybrid-tt"]), plan(model, papers["uniform-tt"])
    assert round(hybrid.compression, 3) == 2.580  # README "2.5x"; biases, norms and positions counted
    assert round(uniform.compression, 2) == 2.34  # README "2.2x" matches no documented rank
    attention, mlp = hybrid.rows[0], hybrid.rows[2]
    assert round(attention.dense / attention.params, 2) == 3.46  # README "about 3x"
    assert round(mlp.dense / mlp.params, 1) == 86.1  # README "about 20x"
    assert round(uniform.rows[2].dense / uniform.rows[2].params, 1) == 10.3
    gentler = TTMatrix(out_modes=(12, 16, 16), in_modes=(8, 12, 8), ranks=(1, 17, 34, 1))
    assert round(1 / gentler.share((3072, 768)), 1) == 20.2  # what 20x would need


def test_hybrid_tt_conservative_ranks_give_the_uniform_ratio():
    by_rank = {a: TTMatrix(out_modes=(8, 12, 8), in_modes=(8, 12, 8), ranks=(1, *a, 1)) for a in ((32, 64),)}
    rules = [replace(r, form=by_rank[(32, 64)]) for r in papers["hybrid-tt"].rules[:2]]
    rules += [replace(r, form=replace(r.form, ranks=(1, 16, 32, 1))) for r in papers["hybrid-tt"].rules[2:]]
    assert round(plan(skeleton("gpt2-50k"), Recipe(name="conservative", rules=rules)).compression, 2) == 2.21


def test_compactifai_sizes():
    model = skeleton("meta-llama/Llama-2-7b-hf")
    predicted = plan(model, papers["compactifai"])
    assert round(predicted.dense_total * 4 / 1e9, 2) == 26.95  # GB, fp32; printed as 27.1
    assert round(predicted.total / 1e9, 2) == 2.21  # printed as 2.1 B
    down = 32 * 4096 * 11008
    assert (
        round((down / 2 + (predicted.total - down) * 2) / 1e9, 2) == 2.25
    )  # int4 down_proj, fp16 rest; printed as 2.1 GB
    assert round(100 * (1 - 4.1 / 27.1), 1) == 84.9  # printed as 88 %
    assert round(100 * (1 - 2.1 / 27.1), 1) == 92.3  # printed as 93 %


def test_compactifai_216_example():
    def params(chi):
        return MPO(out_modes=(6, 6, 6), in_modes=(6, 6, 6), max_rank=chi).num_params((216, 216))

    assert all(params(chi) == 2 * 36 * chi + 36 * chi**2 for chi in (1, 20, 36))
    assert params(35) < 216**2 < params(36) == 49_248  # saves up to 35; 36 is lossless and larger than dense
    assert params(100) == params(36)  # a bond cannot exceed 36


def test_bert_sizes():
    model = skeleton("bert-base-uncased")
    params = sum(p.numel() for p in model.parameters())
    assert round(params * 4 / 1e6, 1) == 437.9  # MB
    assert round(params * 4 / 2**20, 1) == 417.6  # MiB; the paper prints 423
    flops = plan(model, papers["qat-tt-shipped"], tokens=128).dense_flops * 128
    assert round(flops / 2**30, 2) == 20.25  # GiFLOP, linear layers of the encoder, 128 tokens; printed as 20.3


def test_qat_as_shipped_is_nowhere_near_the_printed_sizes():
    model, shipped = skeleton("bert-base-uncased"), papers["qat-tt-shipped"]
    assert round(plan(model, shipped).megabytes(), 1) == 111.6  # dense word embedding: about 4x, not 11x
    with_embedding = replace(shipped, rules=(*shipped.rules, qat_embedding(20)))
    assert round(plan(model, with_embedding).megabytes(), 1) == 18.1  # 4.52 M parameters
    assert round(plan(model, with_embedding).total / 1e6, 2) == 4.52


@pytest.mark.parametrize(("rank", "fp32", "int4"), [(30, 38.51, 4.81), (50, 98.74, 12.34)])
def test_qat_inferred_shapes_reproduce_the_printed_sizes(rank, fp32, int4):
    with torch.device("meta"):  # with the two-label head of a GLUE model, 1,538 numbers
        model = AutoModelForSequenceClassification.from_config(BertConfig(num_labels=2))
    predicted = plan(model, papers[f"qat-tt-rank{rank}"])
    assert round(predicted.megabytes(), 2) == fp32  # printed as 39 and 99
    assert round(predicted.megabytes(4), 2) == int4  # printed as 4.8 and 12.1


def test_every_recipe_cites_its_source():
    assert all(recipe.source and recipe.base for recipe in papers.values())


def test_unknown_base_lists_the_known():
    with pytest.raises(RecipeError, match="needed one of gpt2"):
        skeleton("gpt3")
