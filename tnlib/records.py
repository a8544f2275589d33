"""Results of a run, as JSON records that say what was measured, by what, and on what machine.

    save_result("10_krony_pt", recipe=recipe, budget=budget, seed=SEED, metrics={"ppl_healed": 31.2})
    load_result("10_krony_pt")["metrics"]["ppl_healed"]

A run writes into its own folder: what TNLIB_RESULTS names (the runner sets it), else runs/SCALE. `record` copies a
finished run into figures/, where the results of record live under version control as NAME_SCALE.{svg,png,csv,json}.
"""

import dataclasses
import datetime
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

SCALES = ("smoke", "laptop", "long", "gpu", "paper")  # in rising order of trust
VERSIONS_OF = ("torch", "transformers", "numpy", "tnlib")


def save_result(name, *, metrics, recipe=None, budget=None, seed=None, scale=None, params=None):
    """Write results/NAME.json: what was measured, by what, on what.

    metrics: dict of numbers, nested as you like; a list of equal dicts is shown as a table. numpy and torch scalars
        are converted
    recipe, budget: dataclasses (or anything with `to_dict()`), stored as plain data; params: the notebook's parameters
    Returns: None
    Raises: ValueError naming the key of a NaN, an infinity or a value that JSON cannot hold
    Exact: load_result(name)["metrics"] == metrics for plain Python numbers, to the last bit.
    """
    scale = scale or _scale()
    given = {"recipe": recipe, "budget": budget, "seed": seed, "params": params, "metrics": metrics}
    record = {"name": plain_name(name), "scale": scale}
    record |= {key: _plain(value, key, f"save_result({name!r})") for key, value in given.items()}
    record |= _provenance()
    write_atomic(run_folder(scale) / "results" / f"{name}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")


def load_result(name, scale=None):
    """The record NAME: of this run, or of record in figures/; without `scale`, of the largest scale there is.

    Returns: dict with name, scale, recipe, budget, seed, params, metrics, versions, device, threads, commit, time
    Raises: ValueError, listing the records that exist
    """
    found = {}
    for path in [*(repo_root() / "figures").glob(f"{name}_*.json"), run_folder(scale) / "results" / f"{name}.json"]:
        if path.exists() and (path.parent.name == "results" or path.stem.removeprefix(f"{name}_") in SCALES):
            record = json.loads(path.read_text(encoding="utf-8"))
            found[record["scale"]] = record  # the run's own comes last: it wins over the committed one of its scale
    if scale is None and found:
        return max(found.values(), key=lambda record: trust(record["scale"]))
    if scale in found:
        return found[scale]
    have = sorted(path.stem for path in (repo_root() / "figures").glob("*.json"))
    have += sorted(f"{path.stem} (this run)" for path in (run_folder(scale) / "results").glob("*.json"))
    raise ValueError(
        f"load_result({name!r}): no record{f' at scale {scale!r}' if scale else ''}.\n"
        f"  There is: {', '.join(have) or 'none at all'}.\n"
        f"  Make it: tnlib run {name} --preset {scale or 'laptop'}"
    )


def load_results(name):
    """Every record of NAME that counts, by scale: those in figures/, and in their place those of your own in runs/.

    Returns: {scale: (record, path)}, the smallest scale first; smoke is never among them
    Exact: load_result(name, scale) is the record of each scale, unless you have one in another run's folder.
    """
    found = {}
    for scale in SCALES[1:]:
        own = [folder / "results" / f"{name}.json" for folder in (repo_root() / "runs" / scale, run_folder(scale))]
        for path in (repo_root() / "figures" / f"{name}_{scale}.json", *own):
            if path.exists() and (made := json.loads(path.read_text(encoding="utf-8")))["scale"] == scale:
                found[scale] = (made, path)
    return found


def record(folder, scale, names=None, to=None):
    """Copy a finished run's figures and results into figures/ as NAME_SCALE.*, the results of record.

    folder: the run's folder; names: the notebooks whose figures and results to take, by default all
    to: the folder of record, by default figures/ of the repository
    Returns: the written paths
    Raises: ValueError for the smoke scale, and where a result says that it was made at another scale
    """
    require_recordable(scale)
    folder, to = Path(folder), Path(to or repo_root() / "figures")
    numbers = [name.split("_")[0] + "_" for name in names] if names is not None else [""]
    sources = [
        path for path in [*folder.glob("figures/*.*"), *folder.glob("results/*.json")] if not path.name.startswith(".")
    ]
    sources = sorted(path for path in sources if path.name.startswith(tuple(numbers)))
    for path in sources:
        made_at = json.loads(path.read_text(encoding="utf-8"))["scale"] if path.suffix == ".json" else scale
        if made_at != scale:
            raise ValueError(f"record: {path.name} was made at scale {made_at!r}, not {scale!r}. Record it as that.")
    written = [to / f"{path.stem}_{scale}{path.suffix}" for path in sources]
    for path, target in zip(sources, written):
        write_atomic(target, path.read_bytes())
    return written


def require_recordable(scale):
    """Raises: ValueError for a scale whose results are never kept."""
    if scale not in SCALES[1:]:
        raise ValueError(
            f"record: scale {scale!r} is never kept as a result of record.\n"
            f"  Needed: one of {', '.join(SCALES[1:])}. Run with --preset {SCALES[1]} --record"
        )


def repo_root():
    """The checkout that this file belongs to; the working directory where tnlib is installed without one."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").exists() else Path.cwd()


def run_folder(scale=None):
    """Where this run writes: TNLIB_RESULTS, which the runner sets, else runs/SCALE."""
    named = os.environ.get("TNLIB_RESULTS")
    return Path(named) if named else repo_root() / "runs" / (scale or _scale())


def write_atomic(path, content):
    """Write text or bytes so that a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _scale():
    return os.environ.get("TNLIB_SCALE") or SCALES[0]


def trust(scale):
    """Sort key: paper > gpu > long > laptop > a scale of your own > smoke."""
    return SCALES.index(scale) if scale in SCALES else 0.5


def plain_name(name):
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise ValueError(
            f"{name!r} is not a name for a figure or record.\n"
            "  Needed: letters, digits, _ . + - only; the folder is chosen for you. Such as '10_error_vs_rank'"
        )
    return name


def _plain(value, key, where):
    """`value` as JSON data: dataclasses become dicts, numpy and torch become numbers and lists."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        raise ValueError(
            f"{where}: {key} is {value}, and JSON has no NaN or infinity.\n"
            "  Needed: a finite number, or None where there is none. Find out why it is not finite, then store None."
        )
    if hasattr(value, "columns"):
        value = value.to_dict("records")  # a DataFrame: rows
    elif hasattr(value, "to_dict"):
        value = value.to_dict()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "tolist"):
        return _plain(value.tolist(), key, where)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{key}[{k!r}]", where) for k, v in value.items()}
    if isinstance(value, list | tuple | range | set | frozenset):
        return [_plain(v, f"{key}[{i}]", where) for i, v in enumerate(value)]
    if isinstance(value, os.PathLike) or type(value).__module__ == "torch":  # a dtype or a device
        return str(value)
    raise ValueError(
        f"{where}: {key} is a {type(value).__name__}, which JSON cannot hold.\n"
        "  Needed: numbers, strings, lists, dicts, dataclasses or arrays. Convert it, or store a summary of it."
    )


def _provenance():
    """Versions, device, threads, commit and time: what a reader needs to judge a number."""
    versions = {"python": platform.python_version()}
    for package in VERSIONS_OF:  # read from metadata: importing transformers for its version takes seconds
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    threads = torch.get_num_threads() if torch is not None else int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    facts = {"versions": versions, "device": {"cpu": _cpu(), "gpu": gpu}, "threads": threads, "commit": _commit()}
    return facts | {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def _cpu():
    """The processor's own name where the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit():
    """{"sha", "dirty"} of the checkout, None outside one."""
    root = repo_root()
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    asked = ["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]
    answers = [subprocess.run(["git", "-C", root, *words], capture_output=True, text=True) for words in asked]
    if any(answer.returncode for answer in answers):
        return None
    return {"sha": answers[0].stdout.strip(), "dirty": bool(answers[1].stdout.strip())}
