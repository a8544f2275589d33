"""Where each transformer family keeps its matrices: one pattern a role, so that a recipe written for GPT-2 finds Llama's.

`*` stands for a block number. A family that is not here still works: name its modules by pattern instead of by role.
"""

_LLAMA = {
    "embedding": ("model.embed_tokens",),
    "q": ("model.layers.*.self_attn.q_proj",),
    "k": ("model.layers.*.self_attn.k_proj",),
    "v": ("model.layers.*.self_attn.v_proj",),
    "o": ("model.layers.*.self_attn.o_proj",),
    "gate": ("model.layers.*.mlp.gate_proj",),
    "up": ("model.layers.*.mlp.up_proj",),
    "down": ("model.layers.*.mlp.down_proj",),
}
_GPT2 = {
    "embedding": ("transformer.wte",),
    "qkv": ("transformer.h.*.attn.c_attn",),
    "o": ("transformer.h.*.attn.c_proj",),
    "up": ("transformer.h.*.mlp.c_fc",),
    "down": ("transformer.h.*.mlp.c_proj",),
}
_BERT = {
    "embedding": ("bert.embeddings.word_embeddings",),
    "q": ("bert.encoder.layer.*.attention.self.query",),
    "k": ("bert.encoder.layer.*.attention.self.key",),
    "v": ("bert.encoder.layer.*.attention.self.value",),
    "o": ("bert.encoder.layer.*.attention.output.dense",),
    "up": ("bert.encoder.layer.*.intermediate.dense",),
    "down": ("bert.encoder.layer.*.output.dense",),
    "pooler": ("bert.pooler.dense",),
}
_OPT = {
    "embedding": ("model.decoder.embed_tokens",),
    "q": ("model.decoder.layers.*.self_attn.q_proj",),
    "k": ("model.decoder.layers.*.self_attn.k_proj",),
    "v": ("model.decoder.layers.*.self_attn.v_proj",),
    "o": ("model.decoder.layers.*.self_attn.out_proj",),
    "up": ("model.decoder.layers.*.fc1",),
    "down": ("model.decoder.layers.*.fc2",),
}


def _t5(name):
    """T5 attends to itself in both stacks and to the encoder in the decoder."""
    sublayers = ("encoder.block.*.layer.0.SelfAttention", "decoder.block.*.layer.0.SelfAttention")
    return tuple(f"{place}.{name}" for place in (*sublayers, "decoder.block.*.layer.1.EncDecAttention"))


def _t5_mlp(*names):
    places = ("encoder.block.*.layer.1.DenseReluDense", "decoder.block.*.layer.2.DenseReluDense")
    return tuple(f"{place}.{name}" for place in places for name in names)


_T5 = {
    "embedding": ("shared",),
    "q": _t5("q"),
    "k": _t5("k"),
    "v": _t5("v"),
    "o": _t5("o"),
    "gate": _t5_mlp("wi_1"),  # gated variants only
    "up": _t5_mlp("wi", "wi_0"),
    "down": _t5_mlp("wo"),
}

FAMILIES = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "bert": _BERT,
    "opt": _OPT,
    "t5": _T5,
}

# A role may stand for several; a family answers with those that it has.
GROUPS = {
    "attention": ("q", "k", "v", "qkv", "o"),
    "mlp": ("gate", "up", "down"),
    "linear": ("q", "k", "v", "qkv", "o", "gate", "up", "down"),
}
ROLES = (*GROUPS, "embedding", "q", "k", "v", "qkv", "o", "gate", "up", "down", "pooler")
_STAND_INS = {"qkv": ("q", "k", "v"), "up": ("gate", "up")}  # what another family calls the same work


def patterns(model_type, role):
    """Patterns of the modules that play `role` in a family; () if the family, or the role in it, is unknown."""
    family = FAMILIES.get(model_type, {})
    return tuple(p for single in GROUPS.get(role, (role,)) for p in family.get(single, ()))


def translate(pattern, from_type, to_type):
    """The patterns in one family for the work that `pattern` does in another; () when there is no such role."""
    for role, places in FAMILIES.get(from_type, {}).items():
        if pattern in places:
            target = FAMILIES.get(to_type, {})
            stand_ins = _STAND_INS.get(role, (role,)) if role not in target or role == "up" else (role,)
            return tuple(p for single in stand_ins for p in target.get(single, ()))
    return ()
