"""Run the notebooks, strictly: `python -m tnlib.run --preset laptop`.

Every notebook runs in its own process with its own kernel; what an earlier call has finished is kept, so a killed run
goes on where it was. Results, figures, executed notebooks and one index page go to runs/PRESET.
"""

import argparse
import errno
import hashlib
import json
import shutil
import signal
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from tnlib.job import GRACE, STOP, Job, Outcome, is_done, products, read_state, run_one, write_state
from tnlib.presets import find_notebooks, literal, load_preset, resolve, scale_of
from tnlib.progress import Monitor
from tnlib.records import record, repo_root, require_recordable

MIN_FREE_MB = 200  # less than this and a run is likely to end half-way with nothing readable
LIBRARY = Path(__file__).parent
RUNNER = ("run", "job", "execute", "progress", "report", "presets", "cli")  # these files cannot change a result


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
    _require_space(out)
    STOP.clear()
    for name, book in books.items():
        write_state(out, Outcome(name, book.title, parameters=given[name]))
    monitor = Monitor(out, list(books), set(every), f"tnlib notebooks, scale {scale}")
    monitor.start()
    try:
        for wave in _waves(books):
            _run_wave([_job(books[name], given[name], scale, out, timeout, every) for name in wave], jobs, force)
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
            kept = _kept(job)
            write_state(job.out, kept)
    at_once = min(joblib.effective_n_jobs(jobs), len(todo) or 1)
    todo = [Job(**asdict(job) | {"threads": max(1, joblib.cpu_count() // at_once)}) for job in todo]
    joblib.Parallel(n_jobs=at_once, prefer="threads", pre_dispatch=at_once)(
        joblib.delayed(run_one)(job) for job in todo
    )


def _kept(job):
    stamp = json.loads(Path(job.out, "stamps", f"{job.name}.json").read_text(encoding="utf-8"))
    figures, records = products(job.out, job.name)
    return Outcome(
        job.name, job.title, "ok", True, job.parameters, seconds=stamp["seconds"], figures=figures, records=records
    )


def _job(book, parameters, scale, out, timeout, every):
    """The Job of one notebook. Its stamp covers all that can change its results: code, parameters, library, versions,
    and the records it reads."""
    library = sorted(path for path in LIBRARY.glob("*.py") if path.stem not in RUNNER)
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


def _require_space(out):
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


# -------------------------------------------------------------------------------------------- command line


def main(argv=None):
    """The command; returns the exit code: 0 all done, 1 a notebook failed, 2 asked for what is not there, 130 stopped."""
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: stop the children, leave the page in order
    try:
        return _obey(options)
    except ValueError as error:  # PresetError among them
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = f"Needed: {MIN_FREE_MB} MB. Free some space, or give --out another disk; the same command then goes on from here"
        print(f"error: the disk is full ({error}).\n  {needed}", file=sys.stderr)
        return 1


def _obey(options):
    given = {name: literal(text, f"-p {name}") for name, text in options.parameter}
    if options.list or options.dry_run:
        return _preview(options, given)
    scale = scale_of(options.preset)
    if options.record:
        require_recordable(scale)  # not after an hour of running
    wanted = {key: getattr(options, key) for key in ("preset", "jobs", "timeout", "force", "out", "folder")}
    outcomes = run_notebooks(options.notebooks, parameters=given, **wanted)
    if any(outcome.status != "ok" for outcome in outcomes):
        return 1
    if options.record:
        written = record(options.out or repo_root() / "runs" / scale, scale, [outcome.name for outcome in outcomes])
        print(f"recorded {len(written)} files in {repo_root() / 'figures'}")
    return 0


def _preview(options, given):
    folder = Path(options.folder or repo_root() / "notebooks")
    every = find_notebooks(folder)
    books = find_notebooks(folder, options.notebooks)
    resolved = {} if options.list else resolve(books, load_preset(folder, options.preset), given, every)
    for name, book in books.items():
        shown = [f"{key}={value!r}" for key, value in resolved.get(name, book.defaults).items()]
        print(f"{name}  {book.title}\n    {', '.join(shown) or '(defaults)'}")
        if not options.list and "HEAL_TOKENS" in book.defaults:
            _print_forecast(book.defaults | resolved[name])
    return 0


def _print_forecast(parameters):
    """What a healing run needs, before it is started: plan, data, hours, memory."""
    from tnlib.forecast import from_parameters

    found = from_parameters(parameters)
    texts = [parameters.get(key) for key in ("HEAL_DATASET", "DATASET")] + list(parameters.get("ALSO_TESTED", []))
    runs = len(parameters.get("RUNS", [1])) * len(parameters.get("HEAL_SEEDS", [1]))
    lines = [f"data: {', '.join(dict.fromkeys(filter(None, texts)))}", f"each healing run, {found}"]
    lines += [f"{runs} runs: {runs * found.hours:,.1f} hours"] if runs > 1 else []
    print("\n".join(f"    {line}" for line in [*str(found.plan).splitlines(), *lines]))


def _parser():
    parser = argparse.ArgumentParser(
        "python -m tnlib.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("notebooks", nargs="*", metavar="NOTEBOOK", help="in full or by number, as 02_van_loan or 02; by default all")
    add(
        "--preset",
        default="laptop",
        metavar="NAME",
        help="smoke, laptop, long, gpu, paper, or the path of a YAML file (laptop)",
    )
    add(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="override a parameter",
    )
    add("--jobs", type=int, default=1, metavar="N", help="notebooks at a time; they share the cores (1)")
    add("--timeout", type=float, default=1800, metavar="S", help="seconds for one whole notebook (1800)")
    add("--force", action="store_true", help="run also what is done already")
    add("--out", metavar="DIR", help="the run's folder (runs/PRESET)")
    add("--folder", metavar="DIR", help="where the notebooks are (notebooks)")
    add("--record", action="store_true", help="then copy figures and results into figures/, as NAME_PRESET.*")
    add("--dry-run", action="store_true", help="print what would run, with its parameters")
    add("--list", action="store_true", help="print the notebooks and their default parameters")
    return parser


if __name__ == "__main__":
    sys.exit(main())
