"""Corpora as text, and text as token windows: contiguous, of equal length, without padding.

The default corpus is English from the web page, not from a benchmark: plots of films and one-sentence reviews. Its documents
are put in the order of their SHA-256, which is a fixed shuffle on every platform, and cut 80/10/10 once; language-model
text and sentiment task share that cut, so a student healed on one never saw the other's test documents.
"""

import bz2
import csv
import functools
import hashlib
import html
import io
import itertools
import re
from pathlib import Path

import torch

from tnlib.assets import AssetError, fetch

SPLITS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0), "all": (0.0, 1.0)}
HUB = {  # name: repository, configuration, column of the text
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1", "text"),
    "openwebtext": ("Skylion007/openwebtext", None, "text"),
    "lambada": ("EleutherAI/lambada_openai", "default", "text"),
}
_ALIASES = {"train": {"train"}, "validation": {"validation", "valid", "val", "dev"}, "test": {"test"}}
_PIECE = 1 << 18  # characters tokenized at once


def load_text(dataset="rotten-tomatoes", split="train", max_chars=None):
    """Text of a corpus for language modeling, documents separated by a blank line.

    dataset: "rotten-tomatoes"; a text file, cut 80/10/10 at line ends; a folder with train, validation (valid, val, dev)
        and test files; a name in HUB; or a hub repository "owner/name" or "owner/name:configuration"
    split: a key of SPLITS
    max_chars: keep this many characters from the start; hub corpora are then streamed
    Raises: ValueError for an unknown split; AssetError if the corpus cannot be had
    Source: ASSETS["rotten-tomatoes"], HUB. No document, and no line of a file, is in two of train, validation and test.
    """
    parts, size = [], 0
    for part in stream_text(dataset, split, streaming=max_chars is not None):
        parts.append(part)
        size += len(part)
        if max_chars is not None and size >= max_chars:
            break
    return "".join(parts)[:max_chars]


def stream_text(dataset="rotten-tomatoes", split="train", streaming=True):
    """The text of load_text in parts, so that a hub corpus larger than memory can be read through.

    dataset, split, Raises: as for load_text; streaming: read a hub corpus from the network as it goes, else download it first
    Yields: str. Exact: joined, they are load_text(dataset, split).
    """
    if split not in SPLITS:
        raise ValueError(f"load_text({str(dataset)!r}): split {split!r} is unknown; needed one of {', '.join(SPLITS)}")
    path = Path(dataset).expanduser()
    if path.is_dir():
        yield _read(_split_file(path, split))
    elif path.is_file():
        yield "".join(_cut(_read(path).splitlines(keepends=True), split))
    elif dataset == "rotten-tomatoes":
        yield "\n\n".join(text for _, text in _cut(_documents(), split))
    else:
        yield from _hub_text(str(dataset), split, streaming)


def load_reviews(split="train"):
    """Sentiment task: reviews of films, as many fresh as rotten ones.

    split: a key of SPLITS
    Returns: texts, a list of str; labels, a list of int: 1 fresh (liked), 0 rotten
    Raises: ValueError for an unknown split; AssetError if the asset cannot be had
    Source: ASSETS["rotten-tomatoes"]; duplicates dropped, the larger class cut to the smaller. sum(labels) == len / 2.
    """
    if split not in SPLITS:
        raise ValueError(f"load_reviews: split {split!r} is unknown; needed one of {', '.join(SPLITS)}")
    found = _cut(_documents(), split)
    fresh, rotten = ([text for kind, text in found if kind == wanted] for wanted in ("fresh", "rotten"))
    pairs = list(zip(fresh, rotten))  # stops at the end of the shorter list; fresh and rotten alternate
    return [text for pair in pairs for text in pair], [1, 0] * len(pairs)


def token_windows(text, tokenizer, context, max_tokens=None):
    """Token ids of `text` as contiguous windows; no special tokens, and the tail that fills no window is dropped.

    text: str, or an iterable of its parts as from stream_text
    context: tokens in a window
    max_tokens: use no more than this many tokens from the start
    Returns: (windows, context), int64
    Raises: ValueError if the text is shorter than one window
    Source: the packing of GPT-2 and of most perplexity tables. Flattened, it is a prefix of the text's token stream.
    """
    if context < 2:
        raise ValueError(f"token_windows: context {context}; needed at least 2, one token to read and one to predict")
    found, size = [], 0
    for ids in tokenized(text, tokenizer):
        found.append(torch.tensor(ids, dtype=torch.int64))
        size += len(ids)
        if max_tokens is not None and size >= max_tokens:
            size = max_tokens
            break
    windows = count_windows(size, context, max_tokens)
    return torch.cat(found)[: windows * context].view(windows, context)


def byte_windows(text, context, max_bytes=None):
    """UTF-8 bytes of `text` as contiguous windows: a vocabulary of 256 that needs no tokenizer.

    context: bytes in a window; max_bytes: use no more than this many from the start
    Returns: (windows, context), int64
    Raises: ValueError if the text is shorter than one window
    Exact: flattened, it is a prefix of text.encode(); nats a byte over ln 2 are bits a byte, whatever the tokenizer.
    """
    raw = bytearray(text.encode()[:max_bytes])
    used = count_windows(len(raw), context, max_bytes) * context
    return torch.frombuffer(raw, dtype=torch.uint8)[:used].long().view(-1, context)


def tokenized(text, tokenizer, first=0):
    """Token ids of a text, a list for each piece of it from the `first` one on; see token_windows."""
    for piece in itertools.islice(_pieces([text] if isinstance(text, str) else text), first, None):
        # verbose=False: a text longer than the model's context is what windows are for, no cause for a warning
        yield tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]


def count_windows(tokens, context, max_tokens=None):
    """Whole windows in so many tokens. Raises: ValueError if there is none"""
    if tokens < context:
        raise ValueError(
            f"token_windows: the text has {tokens} tokens{'' if max_tokens is None else f' (max_tokens {max_tokens})'}, "
            f"needed at least one window of context {context}; give a longer text or a smaller context"
        )
    return tokens // context


def batches(windows, batch, seed=None):
    """Iterate over `windows` in batches; the last one may be smaller.

    windows: (windows, context)
    batch: windows in a batch
    seed: shuffles the windows; None keeps their order
    Yields: (<= batch, context)
    Raises: ValueError if batch < 1
    Source: torch.randperm with its own generator. Every window comes exactly once.
    """
    if batch < 1:
        raise ValueError(f"batches: batch {batch}; needed at least 1 window")
    order = torch.arange(len(windows))
    if seed is not None:
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    for some in order.split(batch):
        yield windows[some]


@functools.cache
def _documents():
    """Tuple of (category, text): "fresh", "rotten" or "plot"; one line each, no duplicates, in the order of their hash."""
    raw = next(fetch("rotten-tomatoes").glob("*.csv.bz2")).read_bytes()
    unique = {}
    for row in csv.DictReader(io.StringIO(bz2.decompress(raw).decode("utf-8"), newline="")):
        text = " ".join(html.unescape(row["text"]).split())  # some plots hold &amp;, reviews hard line breaks
        # The same review is listed under several films, and once or twice with other punctuation.
        if key := re.sub(r"\W+", "", text).casefold():
            unique.setdefault(key, (row["category"], text))
    return tuple(unique[key] for key in sorted(unique, key=lambda key: hashlib.sha256(key.encode()).digest()))


def _cut(items, split):
    """The part of a sequence that belongs to `split`."""
    first, last = (round(fraction * len(items)) for fraction in SPLITS[split])
    return items[first:last]


def _pieces(parts):
    """A text in pieces of like size, cut before a space, where byte-level BPE and WordPiece start a new token anyway."""
    left = ""
    for part in parts:
        for start in range(0, len(part), _PIECE):  # a long part is not copied again for every piece
            left += part[start : start + _PIECE]
            while len(left) > _PIECE:
                space = left.rfind(" ", 1, _PIECE)
                end = space if space > 0 else _PIECE
                yield left[:end]
                left = left[end:]
    if left:
        yield left


def _read(file):
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {file}: byte {error.start} is not UTF-8; needed UTF-8, save it as that") from None


def _split_file(folder, split):
    """The one text file of `folder` that is named for `split`: valid.txt, wiki.valid.raw, ..."""
    texts = sorted(file for file in folder.iterdir() if file.suffix in {".txt", ".raw", ".tokens"})
    found = [file for file in texts if _ALIASES.get(split, set()) & set(file.name.split("."))]
    if len(found) != 1:
        raise AssetError(
            f"split {split!r} of folder {folder}: {len(found)} files match among "
            f"{', '.join(file.name for file in texts) or 'no text files'}; needed exactly one such as {split}.txt. "
            "Rename the files, choose another split, or give the path of one file"
        )
    return found[0]


def _hub_text(dataset, split, streaming):
    """Rows of a hub data set, a blank line between them, as in published WikiText perplexities."""
    if dataset not in HUB and "/" not in dataset:
        raise AssetError(
            f"dataset {dataset!r}: neither a local path nor a known name; needed rotten-tomatoes (no hub needed), "
            f"{', '.join(HUB)}, a hub repository owner/name, or the path of a text file or folder"
        )
    repository, _, configuration = dataset.partition(":")
    repository, configuration, column = HUB.get(dataset, (repository, configuration or None, "text"))
    split = "+".join(_ALIASES) if split == "all" else split
    try:
        import datasets

        rows = datasets.load_dataset(repository, configuration, split=split, streaming=streaming)
        for number, row in enumerate(rows):
            yield f"\n\n{row[column]}" if number else row[column]
    except Exception as error:  # datasets, the hub client, httpx and the file system each raise their own
        reason = next(iter(str(error).splitlines()), "")
        raise AssetError(
            f"dataset {dataset!r}, split {split!r}: the hub gave {type(error).__name__}: {reason}. Needed: a network "
            f"that reaches {repository} on the Hugging Face hub, and a split and column {column!r} that it has; "
            "else give the path of a local text file or folder, or use rotten-tomatoes"
        ) from error
