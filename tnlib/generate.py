"""Greedy text of a causal language model, many prompts at a time."""

import torch
from tqdm.auto import tqdm

from tnlib.modes import eval_mode
from tnlib.windows import check_windows


def generate(model, tokenizer, prompt, max_new_tokens=40, chat=False, batch=8, progress=False):
    """Greedy continuation of a prompt, or of each prompt of a list, without the prompt; it ends at the model's end of text.

    prompt: str, or a list of them
    chat: put each prompt through the tokenizer's chat template as the user's turn
    batch: prompts a forward pass, the longest first; shorter ones are padded on the left and their padding is masked
    Returns: str, or a list of them in the order of the prompts
    Raises: ValueError for an empty prompt or list, or for prompt and text together longer than the model's context
    Source: transformers' generate, do_sample=False. Exact: but for rounding a text does not depend on `batch`.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    rows = [_encode(tokenizer, text, chat) for text in prompts]
    if not rows or not all(rows):
        what = f"prompt {rows.index([])} of {len(rows)} has no tokens" if rows else "no prompts"
        raise ValueError(f"generate: {what}; needed at least one token in each. Leave empty texts out.")
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    check_windows(
        "generate", model, torch.tensor([token for row in rows for token in row]), len(rows[order[0]]) + max_new_tokens
    )
    found = {}
    with eval_mode(model), torch.inference_mode(), tqdm(total=len(rows), desc="generate", disable=not progress) as bar:
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            found |= zip(some, _continue(model, tokenizer, [rows[row] for row in some], max_new_tokens))
            bar.update(len(some))
    return found[0] if isinstance(prompt, str) else [found[row] for row in range(len(rows))]


def _encode(tokenizer, text, chat):
    """Token ids of a prompt. The template holds its own special tokens."""
    if not chat:
        return tokenizer(text)["input_ids"]
    turn = [{"role": "user", "content": text}]
    written = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return tokenizer(written, add_special_tokens=False)["input_ids"]


def _continue(model, tokenizer, rows, max_new_tokens):
    """Texts that follow the token ids of `rows`, a list of lists of unlike length."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest, device = max(map(len, rows)), next(model.parameters()).device
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)  # (batch, longest)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    more = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad}
    out = model.generate(input_ids=ids, attention_mask=mask, **more)  # (batch, <= longest + max_new_tokens)
    return tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
