"""Tiny random models of every family, built from configurations: no weights are fetched. And what is done to them."""

import torch
import transformers as hf

from tnlib.block_low_rank import BlockLowRank
from tnlib.kronecker import Kronecker
from tnlib.low_rank import LowRank
from tnlib.recipe import Recipe, Rule
from tnlib.tensor_ring import TensorRing
from tnlib.tensor_train import TensorTrain
from tnlib.tt_matrix import MPO

SIZES = {"vocab_size": 96, "hidden_size": 24, "num_attention_heads": 2}
LLAMA = {
    **SIZES,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}

CONFIGS = {
    "gpt2": lambda: hf.GPT2Config(vocab_size=96, n_embd=24, n_head=2, n_layer=2, n_positions=64),
    "llama": lambda: hf.LlamaConfig(**LLAMA),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA, head_dim=12),
    "bert": lambda: hf.BertConfig(**SIZES, intermediate_size=48, num_hidden_layers=2),
    "opt": lambda: hf.OPTConfig(**SIZES, ffn_dim=48, num_hidden_layers=2, word_embed_proj_dim=24),
    "t5": lambda: hf.T5Config(vocab_size=96, d_model=24, d_kv=12, d_ff=48, num_layers=2, num_heads=2),
    "t5-gated": lambda: hf.T5Config(
        vocab_size=96, d_model=24, d_kv=12, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    ),
}
WINDOWS = torch.randint(2, 90, (12, 16), generator=torch.Generator().manual_seed(0))
HALF = [
    LowRank(kept=0.5),
    MPO(order=2, kept=0.5),
    TensorTrain(order=2, kept=0.5),
    Kronecker(right=(2, 2), terms=2),
    BlockLowRank(kept=0.5),
    TensorRing(order=2, kept=0.5),
]
AUTO = {"bert": hf.AutoModelForMaskedLM, "t5": hf.AutoModelForSeq2SeqLM, "t5-gated": hf.AutoModelForSeq2SeqLM}


def tiny(family, dtype=torch.float64):
    """A random model of a family in eval mode, with weights large enough that every matrix matters to the logits."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.bos_token_id = config.eos_token_id = config.pad_token_id = config.decoder_start_token_id = 1
    model = AUTO.get(family, hf.AutoModelForCausalLM).from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def recipe(form, *wheres, **options):
    """One form everywhere: in all linear layers, or where it is said."""
    return Recipe(name="test", rules=tuple(Rule(where=where, form=form, **options) for where in wheres or ("linear",)))


def logits(model, ids):
    """Logits (batch, tokens, vocabulary) for any of the families."""
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits
