"""Windows of token ids, (n, context): whether a model can read them."""


def check_windows(where, model, ids, context=None):
    """Refuse ids and contexts that would be an index error, which CUDA reports late and elsewhere.

    ids: (n, context), or with `context` given of any shape; a model whose config names no limits takes all
    Raises: ValueError
    """
    config, context = getattr(model, "config", None), ids.shape[1] if context is None else context
    vocabulary, longest = (getattr(config, name, None) for name in ("vocab_size", "max_position_embeddings"))
    if vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"{where}: token ids {int(ids.min())}..{int(ids.max())} with a vocabulary of {vocabulary}; needed ids in it. "
            "Tokenize with the model's own tokenizer."
        )
    if longest is not None and context > longest:
        raise ValueError(
            f"{where}: context {context}, but the model has {longest} positions; needed no more. Make shorter windows."
        )
