"""A labeled task as padded token ids, one example a row, with a label for each text or for each word."""

import itertools

import torch

from tnlib.losses import IGNORE


def encode_task(task, tokenizer, max_length=128):
    """Token ids of a task's examples, as heal() and predict() take them.

    max_length: pieces an example, special tokens included; what is longer is cut, and a word cut off has no label
    Returns: dict of int64: input_ids, attention_mask, token_type_ids if the tokenizer gives them, each (n, context), context
        being the longest example's; labels (n,), at level "token" (n, context): a word's label on its first piece, else -100
    Raises: ValueError for a tokenizer that cannot pad, or at level "token" one that is slow or makes no piece of a word
    Source: Devlin et al. 2019, section 5.3; words are read with a space between them, so their pieces are those of the sentence.
    Exact: where nothing is cut there are as many labels other than -100 as words, each on a piece that begins its word.
    """
    where, words = f"encode_task({task.name!r}, {type(tokenizer).__name__})", task.level == "token"
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{where}: the tokenizer has no padding token; needed one for texts of unlike length. "
            "Set tokenizer.pad_token = tokenizer.eos_token, and the model's config.pad_token_id to match"
        )
    if words and not tokenizer.is_fast:
        raise ValueError(f"{where}: a slow tokenizer does not tell where a piece stands; needed a fast one. Load that.")
    texts = [" ".join(text) for text in task.texts] if words else list(task.texts)
    columns = [texts] if isinstance(texts[0], str) else [list(column) for column in zip(*texts)]
    more = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
    found = tokenizer(*columns, return_offsets_mapping=words, **more)
    labels = torch.full_like(found["input_ids"], IGNORE) if words else torch.tensor(task.labels)
    for row, own in enumerate(task.labels if words else ()):
        places = _first_pieces(where, found, row, task.texts[row])
        labels[row, places] = torch.tensor(own[: len(places)])
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in found]
    return {name: found[name] for name in names} | {"labels": labels}


def _first_pieces(where, found, row, words):
    """Place of each word's first piece; fewer places than words where the row was cut."""
    owner = [number for number, word in enumerate(words) for _ in f"{word} "]  # word of each character of the sentence
    spaces = set(
        itertools.accumulate(len(word) + 1 for word in words)
    )  # ends of a piece that is a space only, or empty
    places = {}
    for place, (start, end) in enumerate(found["offset_mapping"][row].tolist()):
        if (
            start < end and end not in spaces
        ):  # byte-level pieces may begin with the space before them: the end tells the word
            places.setdefault(owner[end - 1], place)
    whole = max(places, default=-1) + 1 if found.encodings[row].overflowing else len(words)
    if lost := [words[number] for number in range(whole) if number not in places]:
        raise ValueError(
            f"{where}, example {row}: the tokenizer makes no piece of the word {lost[0]!r}; needed one for its label. Leave it out."
        )
    return list(places.values())
