"""Run the notebooks, strictly; `tnlib run` is this on the command line.

Every notebook runs in its own process with its own kernel; what an earlier call has finished is kept, so a killed run
goes on where it was. Results, figures, executed notebooks and one index page go to runs/PRESET.
"""

import errno
import hashlib
import json
import shutil
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from tnlib.job import GRACE, STOP, Job, Outcome, is_done, products, read_state, run_one, write_state
from tnlib.presets import find_notebooks, load_preset, resolve, scale_of
from tnlib.progress import Monitor
from tnlib.records import repo_root

MIN_FREE_MB = 200  # less than this and a run is likely to end half-way with nothing readable
LIBRARY = Path(__file__).parent
RUNNER = ("run", "job", "execute", "progress", "report", "presets", "console", "sweep", "sweep_page", "slots", "cluster")
# these files cannot change a result, nor can the commands, cli_*


def run_notebooks(
    names=None, preset="laptop", parameters=None, jobs=1, timeout=1800, force=False, out=None, folder=None
):
    """Execute notebooks, keep what is done already, and return how each went.

    names: notebooks in full or by number, by default all; folder: where they are, by default notebooks/
    preset: a name in FOLDER/presets or the path of a YAML file; parameters: {name: value}, stronger than the preset
    jobs: how many at a time; they share the machine's cores. timeout: seconds for one whole notebook
    force: run also what is done; out: the run's folder, by default runs/PRESET
    Returns: list of Outcome, in order. A notebook's failure is an outcome and not an exception.
    Raises: PresetError before anything runs, for a notebook, preset or parameter that does not exist or fit
    """
    folder = Path(folder or repo_root() / "notebooks").resolve()
    every = find_notebooks(folder)
    books = {name: every[name] for name in find_notebooks(folder, names)}
    given = resolve(books, load_preset(folder, preset), parameters, every)
    scale = scale_of(preset)
    out = Path(out or repo_root() / "runs" / scale).resolve()
    require_space(out)
    STOP.clear()
    for name, book in books.items():
        write_state(out, Outcome(name, book.title, parameters=given[name]))
    monitor = Monitor(out, list(books), set(every), f"tnlib notebooks, scale {scale}")
    monitor.start()
    try:
        for wave in _waves(books):
            _run_wave([job_of(books[name], given[name], scale, out, timeout, every) for name in wave], jobs, force)
    except BaseException:
        _stop_all(out, books)
        raise
    finally:
        monitor.finish()
    return monitor.outcomes


def _run_wave(wave, jobs, force):
    """Run those that are not done, `jobs` at a time. Each is a process already, so threads suffice to wait for them;
    inside `joblib.parallel_config("dask")` they go to the cluster instead."""
    import joblib

    todo = [job for job in wave if force or not is_done(job.out, job.name, job.stamp)]
    for job in wave:
        if job not in todo:
            kept = kept_outcome(job)
            write_state(job.out, kept)
    at_once = min(joblib.effective_n_jobs(jobs), len(todo) or 1)
    todo = [Job(**asdict(job) | {"threads": max(1, joblib.cpu_count() // at_once)}) for job in todo]
    joblib.Parallel(n_jobs=at_once, prefer="threads", pre_dispatch=at_once)(
        joblib.delayed(run_one)(job) for job in todo
    )


def kept_outcome(job):
    stamp = json.loads(Path(job.out, "stamps", f"{job.name}.json").read_text(encoding="utf-8"))
    figures, records = products(job.out, job.name)
    return Outcome(
        job.name, job.title, "ok", True, job.parameters, seconds=stamp["seconds"], figures=figures, records=records
    )


def job_of(book, parameters, scale, out, timeout, every):
    """The Job of one notebook. Its stamp covers all that can change its results: code, parameters, library, versions,
    and the records it reads."""
    library = sorted(path for path in LIBRARY.glob("*.py") if path.stem not in RUNNER and not path.stem.startswith("cli"))
    sources = [hashlib.sha256(path.read_bytes()).hexdigest() for path in [*library, *_inputs(book, every, out)]]
    versions = [sys.version, *(metadata.version(package) for package in ("torch", "transformers"))]
    facts = json.dumps([book.code, parameters, scale, sources, versions], sort_keys=True)
    return Job(
        book.name, book.title, str(book.path), str(out), parameters, scale, hashlib.sha256(facts.encode()).hexdigest(),
        cells=len(book.code) + bool(parameters), records=any("save_result(" in code for code in book.code),
        timeout=timeout, threads=1,
    )  # fmt: skip


def _inputs(book, every, out):
    """The records that a notebook may read: this run's, those of record and those of your other runs."""
    shelves = [(out, "results"), (repo_root(), "figures"), (repo_root(), "runs/*/results")]
    found = [
        sorted(root.glob(f"{folder}/{name.split('_')[0]}_*.json"))
        for name in _before(book, every)
        for root, folder in shelves
    ]
    return [path for paths in found for path in paths]


def _before(book, every):
    """Names of the notebooks whose records `book` reads; never itself or a later one, so there is no cycle."""
    earlier = [name for name in every if name < book.name]
    return [name for name in earlier if book.reads is None or name.split("_")[0] in book.reads]


def _waves(books):
    """Notebook names in groups: each reads only the records of groups before it."""
    level = {}
    for name, book in books.items():
        level[name] = max((level[other] + 1 for other in _before(book, books)), default=0)
    return [[name for name in books if level[name] == depth] for depth in sorted(set(level.values()))]


def require_space(out):
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free // 2**20
    if free < MIN_FREE_MB:
        raise OSError(errno.ENOSPC, f"got {free} MB free", str(out))


def _stop_all(out, names):
    """Let the threads stop their children, and wait until they have."""
    STOP.set()
    deadline = time.monotonic() + GRACE + 5
    while any(read_state(out, name).status == "running" for name in names) and time.monotonic() < deadline:
        time.sleep(0.1)
