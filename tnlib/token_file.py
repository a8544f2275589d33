"""Token windows of corpora larger than memory: written once to a file, then mapped from it.

OpenWebText is 9 billion tokens, 36 GB as int32, and training reads a few windows of it at a time. The text is streamed and
tokenized piece by piece; beside the growing file stands how many pieces it holds, so a stopped call goes on where it was.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from tnlib.assets import AssetError, cache_dir
from tnlib.data import count_windows, stream_text, token_windows, tokenized
from tnlib.records import write_atomic
from tnlib.resume import only_one

IN_MEMORY = 1 << 24  # tokens up to which windows are made in memory: 134 MB
SAVED_EVERY = 64  # pieces of 256 thousand characters


def load_windows(dataset, tokenizer, context, split="train", max_tokens=None, progress=None):
    """Token windows of a corpus: in memory where they are few, else from a file in the cache that is written on first use.

    dataset, split: as for load_text; tokenizer, context: as for token_windows
    max_tokens: use no more than this many tokens from the start; above IN_MEMORY, and for None, there is a file
    progress: a bar while the file is written (default: where someone watches)
    Returns: (windows, context); int64 in memory, int32 mapped from the file. heal takes both
    Raises: as load_text and token_windows; AssetError for a file that cannot be written, which keeps what is there
    Exact: equals token_windows(load_text(dataset, split), tokenizer, context, max_tokens).
    """
    if max_tokens is not None and max_tokens <= IN_MEMORY:
        return token_windows(stream_text(dataset, split), tokenizer, context, max_tokens)
    file = _written(dataset, tokenizer, split, max_tokens, progress)
    windows = count_windows(file.stat().st_size // 4, context, max_tokens)
    return torch.from_file(str(file), size=windows * context, dtype=torch.int32).view(windows, context)


def _written(dataset, tokenizer, split, max_tokens, progress):
    """The file that holds all token ids, int32; made, or gone on with, if it is not there."""
    file = cache_dir() / "tokens" / f"{_key(dataset, tokenizer, split, max_tokens)}.int32"
    part, state = file.with_suffix(".part"), file.with_suffix(".json")
    try:
        with only_one(file.with_suffix(""), wait=-1):
            if not file.exists():
                _write(
                    part, state, tokenizer, stream_text(dataset, split), max_tokens, _bar(dataset, max_tokens, progress)
                )
                os.replace(part, file)
                state.unlink()
    except OSError as error:
        raise AssetError(
            f"tokens of {dataset}, split {split}: {file} could not be written ({error}); needed room for 4 bytes a token. "
            "Make room, or set TNLIB_CACHE to another disk, and call again: it goes on where it was"
        ) from error
    return file


def _write(part, state, tokenizer, text, max_tokens, bar):
    """Append to `part` all that is not in it yet; `state` says what is."""
    done = json.loads(state.read_text()) if state.exists() and part.exists() else {"pieces": 0, "tokens": 0}
    with open(part, "r+b" if done["tokens"] else "wb") as out, bar:
        out.truncate(4 * done["tokens"])  # a stop may have left more than was counted
        out.seek(0, os.SEEK_END)
        bar.update(done["tokens"])
        for ids in tokenized(text, tokenizer, done["pieces"]):
            ids = torch.tensor(ids, dtype=torch.int32)
            if max_tokens is not None:
                ids = ids[: max_tokens - done["tokens"]]
            out.write(ids.numpy().tobytes())
            done = {"pieces": done["pieces"] + 1, "tokens": done["tokens"] + len(ids)}
            bar.update(len(ids))
            if done["pieces"] % SAVED_EVERY == 0:
                _save(out, state, done)
            if done["tokens"] == max_tokens:
                break
        _save(out, state, done)


def _save(out, state, done):
    out.flush()
    os.fsync(out.fileno())
    write_atomic(state, json.dumps(done))


def _key(dataset, tokenizer, split, max_tokens):
    """What the tokens depend on; of a local corpus its place, size and time, too."""
    words = getattr(tokenizer, "backend_tokenizer", None)
    words = words.to_str() if words is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    path = Path(dataset).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    facts = json.dumps([str(dataset), stamps, split, max_tokens, words])
    return f"{path.name}-{split}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


def _bar(dataset, max_tokens, progress):
    from tqdm.auto import tqdm

    hide = not (sys.stderr.isatty() if progress is None else progress)
    return tqdm(desc=f"tokens of {dataset}", total=max_tokens, unit="tok", unit_scale=True, disable=hide)
