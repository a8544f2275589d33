"""The command `tnlib sweep`."""

import click

from tnlib.console import CLUSTER, DONE, FAILED, NOTEBOOKS, Answer, command, needs, say


@click.command()
@click.argument("notebook")
@click.option("--preset", default="laptop", show_default=True, metavar="NAME", help="As for tnlib run.")
@click.option("-p", "--parameter", "parameters", nargs=2, multiple=True, metavar="NAME VALUES", help="Values of a parameter, separated by commas; one is a grid of one.")
@click.option("--jobs", default=1, show_default=True, metavar="N", help="Points at a time on this machine; they share its cores.")
@click.option("--gpus", metavar="IDS", help="One GPU a point: of this machine, as 0,1 or all; with a cluster, all.")
@click.option("--scheduler", metavar="ADDRESS", help="Of a Dask scheduler, whose workers then run the points.")
@click.option("--slurm", metavar="FILE", help="YAML with the arguments of dask_jobqueue.SLURMCluster, and workers: N.")
@click.option("--timeout", default=1800.0, show_default=True, metavar="S", help="Seconds for one point.")
@click.option("--force", is_flag=True, help="Run also what is done already.")
@click.option("--out", metavar="DIR", help="The sweep's folder; all workers must reach it.  [default: runs/sweep_NOTEBOOK_PRESET]")
@click.option("--folder", metavar="DIR", help="Where the notebooks are.  [default: notebooks]")
@click.option("--dry-run", is_flag=True, help="Print the points and run none.")
@command(resumes=True)
def sweep(notebook, preset, parameters, jobs, gpus, scheduler, slurm, dry_run, **wanted):
    """Run NOTEBOOK at every point of a grid of parameters; what an earlier call has finished is kept.

    Each point is a run of its own, in a folder of its own. index.html, table.csv and table.json have one row a point:
    parameters, outcome, every number of its records. A point whose worker is lost is tried once more.
    """
    needs("notebooks", NOTEBOOKS)
    if scheduler or slurm:
        needs("cluster", CLUSTER + ("dask_jobqueue",) * bool(slurm))
    if scheduler and slurm:
        raise click.UsageError("--scheduler and --slurm: got both; needed one, as each says where workers are.")
    from tnlib.sweep import grid_of

    grid = grid_of(parameters)
    if dry_run:
        return _preview(notebook, grid, preset, wanted)
    return _swept(notebook, grid, preset, jobs, gpus, scheduler, slurm, wanted)


def _swept(notebook, grid, preset, jobs, gpus, scheduler, slurm, wanted):
    """Run the points here or on a cluster."""
    from tnlib.slots import gpu_ids
    from tnlib.sweep import plan_points, sweep

    _, out = plan_points(notebook, grid, preset, out=wanted["out"], folder=wanted["folder"])  # refuses before workers start
    if scheduler or slurm:
        from tnlib.cluster import connect

        with connect(scheduler, slurm, bool(gpus), say) as client:
            rows = sweep(notebook, grid, preset, gpus=gpus, client=client, **wanted)
    else:
        rows = sweep(notebook, grid, preset, jobs=jobs, gpus=gpu_ids(gpus) if gpus else None, **wanted)
    data = {"index": out / "index.html", "table": out / "table.csv", "rows": rows}
    return Answer(data, f"table: {out / 'table.csv'}", DONE if all(row["status"] == "ok" for row in rows) else FAILED)


def _preview(notebook, grid, preset, wanted):
    """The points, and which of them are done."""
    from tnlib.job import is_done
    from tnlib.sweep import plan_points

    points, out = plan_points(notebook, grid, preset, out=wanted["out"], folder=wanted["folder"])
    rows = [{"point": p.label, "done": is_done(p.job.out, p.job.name, p.job.stamp), "parameters": p.job.parameters} for p in points]
    lines = [f"{row['point']}  {'done' if row['done'] else 'to do'}" for row in rows]
    return Answer({"out": out, "points": rows}, "\n".join([f"{len(points)} points in {out}", *lines]))
