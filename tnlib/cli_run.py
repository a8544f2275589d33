"""The command `tnlib run`."""

import errno
from dataclasses import asdict
from pathlib import Path

import click

from tnlib.console import DONE, FAILED, NOTEBOOKS, Answer, command, needs, say


@click.command()
@click.argument("notebooks", nargs=-1, metavar="[NOTEBOOK]...")
@click.option("--preset", default="laptop", show_default=True, metavar="NAME", help="smoke, laptop, long, gpu, paper, or the path of a YAML file.")
@click.option("-p", "--parameter", "parameters", nargs=2, multiple=True, metavar="NAME VALUE", help="Override a parameter; VALUE is YAML.")
@click.option("--jobs", default=1, show_default=True, metavar="N", help="Notebooks at a time; they share the cores.")
@click.option("--timeout", default=1800.0, show_default=True, metavar="S", help="Seconds for one whole notebook.")
@click.option("--force", is_flag=True, help="Run also what is done already.")
@click.option("--out", metavar="DIR", help="The run's folder.  [default: runs/PRESET]")
@click.option("--folder", metavar="DIR", help="Where the notebooks are.  [default: notebooks]")
@click.option("--record", is_flag=True, help="Then copy figures and results into figures/, as NAME_PRESET.*")
@click.option("--dry-run", is_flag=True, help="Print what would run, with its parameters.")
@click.option("--list", "listed", is_flag=True, help="Print the notebooks and their default parameters.")
@command(resumes=True)
def run(notebooks, preset, parameters, record, dry_run, listed, **wanted):
    """Run the notebooks, strictly, each in a process of its own; what an earlier call has finished is kept.

    NOTEBOOK is a name in full or a number, as 02_van_loan or 02; by default all of them run. Results, figures, executed
    notebooks and one index page go to runs/PRESET.
    """
    needs("notebooks", NOTEBOOKS)
    from tnlib.presets import literal
    from tnlib.records import require_recordable

    given = {name: literal(text, f"-p {name}") for name, text in parameters}
    if listed or dry_run:
        return _preview(notebooks, preset, given, wanted["folder"], listed)
    if record:
        from tnlib.presets import scale_of

        require_recordable(scale_of(preset))  # not after an hour of running
    return _executed(notebooks, preset, given, record, wanted)


def _executed(notebooks, preset, given, record, wanted):
    """Run them, and copy what they made if that was asked for."""
    from tnlib import records
    from tnlib.presets import scale_of
    from tnlib.run import MIN_FREE_MB, run_notebooks

    try:
        outcomes = run_notebooks(notebooks, preset, given, **wanted)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = f"Needed: {MIN_FREE_MB} MB. Free some space, or give --out another disk; the same command then goes on from here"
        raise OSError(f"the disk is full ({error}).\n  {needed}") from error
    failed = any(outcome.status != "ok" for outcome in outcomes)
    out = Path(wanted["out"] or records.repo_root() / "runs" / scale_of(preset)).resolve()
    data = {"index": str(out / "index.html"), "outcomes": [asdict(outcome) for outcome in outcomes], "recorded": []}
    if record and not failed:
        written = records.record(out, scale_of(preset), [outcome.name for outcome in outcomes])
        data["recorded"] = [str(path) for path in written]
        say(f"recorded {len(written)} files in {records.repo_root() / 'figures'}")
    return Answer(data, code=FAILED if failed else DONE)


def _preview(notebooks, preset, given, folder, listed):
    """What would run, with which parameters, and what healing will take."""
    from tnlib.presets import find_notebooks, load_preset, resolve
    from tnlib.records import repo_root

    folder = Path(folder or repo_root() / "notebooks")
    books, every = find_notebooks(folder, notebooks), find_notebooks(folder)
    resolved = {} if listed else resolve(books, load_preset(folder, preset), given, every)
    rows, lines = [], []
    for name, book in books.items():
        parameters = resolved.get(name, book.defaults)
        shown = [f"{key}={value!r}" for key, value in parameters.items()]
        lines.append(f"{name}  {book.title}\n    {', '.join(shown) or '(defaults)'}")
        rows.append({"name": name, "title": book.title, "parameters": parameters, "forecast": None})
        if not listed and "HEAL_TOKENS" in book.defaults:
            rows[-1]["forecast"] = _forecast(book.defaults | parameters)
            lines += [f"    {line}" for line in rows[-1]["forecast"]]
    return Answer(rows, "\n".join(lines))


def _forecast(parameters):
    """Lines that say what a healing run needs, before it is started: plan, data, hours, memory."""
    from tnlib.forecast import from_parameters

    found = from_parameters(parameters)
    texts = [parameters.get(key) for key in ("HEAL_DATASET", "DATASET")] + list(parameters.get("ALSO_TESTED", []))
    runs = len(parameters.get("RUNS", [1])) * len(parameters.get("HEAL_SEEDS", [1]))
    lines = [f"data: {', '.join(dict.fromkeys(filter(None, texts)))}", f"each healing run, {found}"]
    lines += [f"{runs} runs: {runs * found.hours:,.1f} hours"] if runs > 1 else []
    return [*str(found.plan).splitlines(), *lines]
