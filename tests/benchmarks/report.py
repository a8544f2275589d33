"""What a suite's record says: NAME.md (summary, tables, who was not timed), and NAME.png, .svg and .csv."""

import math
import os
import statistics
import tempfile
import textwrap
from pathlib import Path

from tnlib.records import write_atomic

OURS = ("tnlib", "plan: ", "low rank")
NO_PEERS = (*OURS, "dense", "floor", "GEMM", "copy", "calls", "products")
VERSUS = """## tnlib against the best of each cell

Geometric means over cells (and the worst cell) of tnlib's time, as it chooses by itself, over that of the fastest peer, of
tnlib's own fastest plan, and of the floor.""".splitlines()
ROUNDS = """Medians of ratios formed inside shuffled rounds, and their quartiles. How far the second entry of the baseline ("again") is
from 1 says which differences mean nothing.""".splitlines()
REACH = """## By family and tokens: how far ahead, and how far anyone could be

Geometric means over layer shapes and ranks of the fastest peer's time over tnlib's, as layers start and by the best of its
settings (two of which keep something in evaluation); over the floor, which is the most that is to be had against these peers without
keeping anything; over the floor and a small nn.Linear for each factor, about what a layer at the floor would have; and over the products
of a plan alone, which is the most for whoever has torch multiply. Last: cells in which a peer is ahead by more than 5 %.""".splitlines()
SAME_ERROR = 1e-3
UNSHOWN = ("status", "reason", "low", "high", "calls", "probe", "rounds")


def layers(record):
    """Medians by table, tnlib against the best peer and against its own best plan, and a picture of the first layer."""
    cells = list(record.cells.values())
    lines = [*_versus(cells, "layer", "mode"), *_reach(cells), *_by_column(cells, "tokens")]
    first = next((c["facts"]["layer"] for c in cells), "")
    shown = [c for c in cells if c["facts"]["layer"] == first and c["facts"]["mode"] == "forward"]
    panels = {}
    for cell in shown:
        rows, form = cell["rows"], cell["facts"]["form"]
        best = _best(rows, _is_peer)
        panel = panels.setdefault(f"tokens: {cell['facts']['column']}", {})
        for series, name in (("tnlib", "tnlib"), ("best peer", best), ("floor", "floor")):
            if name is not None and "ratio" in rows.get(name, {}):
                panel.setdefault(series, []).append((form, rows[name]["ratio"]))
    _write(record, "Layers: time over that of a dense nn.Linear", lines, panels, "time / dense")


def embedding(record):
    """As layers."""
    cells = list(record.cells.values())
    panels = {}
    for cell in cells:
        panel = panels.setdefault(cell["facts"]["table"], {})
        for name, row in cell["rows"].items():
            if "ratio" in row and not row.get("probe") and not name.startswith(("dense", "plan")):
                panel.setdefault(name, []).append((f"tokens: {cell['facts']['column']}", row["ratio"]))
    lines = [*_versus(cells, "form", "mode"), *_by_column(cells, "tokens")]
    _write(record, "Embedding: time over that of nn.Embedding", lines, panels, "time / nn.Embedding")


def decompositions(record):
    """A table a case; the picture has time over tnlib's, of those whose error is tnlib's or less."""
    panel = {}
    for cell in record.cells.values():
        bound = cell["rows"].get("tnlib", {}).get("error", 0.0) + SAME_ERROR
        for name, row in cell["rows"].items():
            if "ratio" in row and not name.startswith(("tnlib", "copy")) and row["error"] < bound:
                panel.setdefault(name, []).append((cell["facts"]["case"], row["ratio"]))
    lines, panels = _by_metric(record.cells.values()), {"": panel} if panel else {}
    _write(record, "Decompositions: time over tnlib's, at equal error", lines, panels, "time / tnlib's")


def end_to_end(record):
    """A table a measure."""
    panels = {
        cell["facts"]["table"]: {"model": [(n, r["ratio"]) for n, r in cell["rows"].items() if "ratio" in r]}
        for cell in record.cells.values()
    }
    _write(record, "End to end: SmolLM2-135M", _by_metric(record.cells.values()), panels, "time or memory / dense")


def _is_peer(name):
    return not name.startswith(NO_PEERS)


def _best(rows, wanted):
    """Name of the fastest that is `wanted`, None where there is none."""
    found = {name: row["ratio"] for name, row in rows.items() if wanted(name) and "ratio" in row}
    return min(found, key=found.get, default=None)


def _versus(cells, *keys):
    """Geometric means over cells: tnlib's default against the best peer of the cell, and against tnlib's own best plan."""
    groups = {}
    for cell in cells:
        rows, facts = cell["rows"], cell["facts"]
        mine, peer, plan = (_best(rows, w) for w in ("tnlib".__eq__, _is_peer, lambda n: n.startswith("plan: ")))
        kind = tuple(facts[key] for key in keys) + (facts["form"].split(" ")[0],) * ("form" not in keys)
        group = groups.setdefault(kind, ([], [], []))
        for found, other in zip(group, (peer, plan, "floor" if "floor" in rows else None)):
            if mine and other and "ratio" in rows[other]:
                found.append(rows[mine]["ratio"] / rows[other]["ratio"])
    table = [[", ".join(kind), *(_mean(found) for found in group)] for kind, group in groups.items()]
    return [*VERSUS, "", *_table(["", "/ best peer", "/ best plan", "/ floor"], table)]


def _reach(cells):
    """The fastest peer over tnlib and over the floors, by family of forms and token count."""
    groups = {}
    for cell in cells:
        rows, facts = cell["rows"], cell["facts"]
        if (peer := _best(rows, _is_peer)) and "ratio" in rows["tnlib"]:
            any_setting = _best(rows, lambda name: name.startswith("tnlib"))
            others = ("tnlib", any_setting, "floor", "floor and calls", "products alone")
            found = [rows[peer]["ratio"] / rows[name]["ratio"] for name in others]
            family = facts["form"].split(" ")[0]
            for kind in ((family, facts["mode"], facts["column"]), (family, "both", "all")):
                groups.setdefault(kind, []).append(found)
    head = ["", "mode", "tokens", "peer / tnlib", "best setting", "/ floor", "/ floor and calls", "/ products alone", "behind"]
    table = []
    for kind, found in sorted(groups.items(), key=lambda item: item[0][2] == "all"):
        means = [f"{math.exp(statistics.fmean(map(math.log, column))):.2f}" for column in zip(*found)]
        table.append([*kind, *means, f"{sum(mine < 0.95 for mine, *_ in found)} of {len(found)}"])
    return [*REACH, "", *_table(head, table)]


def _mean(ratios):
    if not ratios:
        return ""
    return f"{math.exp(statistics.fmean(map(math.log, ratios))):.2f} ({max(ratios):.2f}; {len(ratios)} cells)"


def _by_column(cells, unit):
    """One table for each of the cells' `table`, contestants by columns; median ratio and quartiles."""
    lines, tables = [], {}
    for cell in cells:
        tables.setdefault(cell["facts"]["table"], {})[cell["facts"]["column"]] = cell
    for title, columns in tables.items():
        names = dict.fromkeys(n for cell in columns.values() for n, r in cell["rows"].items() if not r.get("probe"))
        rows = [[name, *(_ratio(cell["rows"].get(name)) for cell in columns.values())] for name in names]
        some = next(iter(columns.values()))
        kept = f", kept {some['facts']['kept']:.3g}" if "kept" in some["facts"] else ""
        dense = [cell["rows"]["dense"].get("ms") for cell in columns.values()]
        rows.append(["dense, ms", *("" if ms is None else f"{ms:.3g}" for ms in dense)])
        lines += [f"## {title}{kept}", "", *_table([unit, *columns], rows)]
    return lines


def _ratio(row):
    if row is None:
        return ""
    return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})" if "ratio" in row else row["status"]


def _by_metric(cells):
    """One table a cell: contestants by what was measured of them."""
    lines = []
    for cell in cells:
        known = dict.fromkeys(key for row in cell["rows"].values() for key in row if key not in UNSHOWN)
        rows = [[name, *(_number(row, key) for key in known)] for name, row in cell["rows"].items()]
        lines += [f"## {cell['facts']['table']}", "", *_table(["", *known], rows)]
    return lines


def _number(row, key):
    if key == "ratio":
        return _ratio(row)
    value = row.get(key, "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def _write(record, title, lines, panels, axis):
    record.save()
    facts, settings = record.facts, record.facts["settings"]
    versions = {**facts["versions"], **facts.get("peers", {})}
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    where = f"{facts['device']['cpu']}, {settings['threads']} threads, {facts['time'][:10]}; {known}."
    head = [f"# {title}", "", where, "", *ROUNDS, ""]
    write_atomic(record.asked.out / f"{record.name}.md", "\n".join([*head, *lines, *_absent(record)]).rstrip() + "\n")
    if panels:
        _picture(record, title, panels, axis)


def _absent(record):
    """Who was not timed, and why."""
    found = {}
    for cell in record.cells.values():
        for name, row in cell["rows"].items():
            if row["status"] != "ok":
                found.setdefault((name, row["status"], row["reason"]), []).append(cell["facts"])
    rows = [[*key, f"{len(cells)}, such as {cells[0]['table']}"] for key, cells in found.items()]
    return ["## Not timed", "", *_table(["contestant", "", "reason", "cells"], rows)] if rows else []


def _picture(record, title, panels, axis):
    """Dots on a logarithmic axis, one panel a key; saved as tnlib saves its figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    from tnlib.figures import label, save_figure, use_style

    use_style()
    names = list(dict.fromkeys(y for panel in panels.values() for dots in panel.values() for y, _ in dots))
    size = (3.2 + 2.4 * len(panels), 1.6 + 0.3 * len(names))
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    series = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    columns = {"panel": [], "series": [], "what": [], "ratio": []}
    for ax, (heading, panel) in zip(axes[0], panels.items()):
        for name, dots in panel.items():
            look = f"C{series.index(name) % 7}"
            ax.plot([x for _, x in dots], [names.index(y) for y, _ in dots], linestyle="none", color=look,
                    marker="os^DvPX<>*hd"[series.index(name) % 12], label=name)  # fmt: skip
            for y, x in dots:
                for key, value in zip(columns, (heading, name, y, x)):
                    columns[key].append(value)
        ax.axvline(1, color="#888888", linewidth=1, linestyle="-", marker="")
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        steps = (1, 2, 5) if high > 5 * low else (1, 1.2, 1.5, 2, 3, 4, 6, 8)
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=steps, numticks=8))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())
        ax.tick_params(axis="x", labelrotation=90)
        ax.set_ylim(-0.5, len(names) - 0.5)
        ax.set_yticks(range(len(names)), names)
        label(ax, textwrap.fill(heading, 26), axis, "")
    axes[0][0].invert_yaxis()
    if len(series) > 1:
        handles = {text: handle for ax in axes[0] for handle, text in zip(*ax.get_legend_handles_labels())}
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    fig.suptitle(title)
    _save(fig, record, columns, save_figure)


def _save(fig, record, columns, save_figure):
    """save_figure writes into a run's folder: a scratch one here, out of which the three files are taken."""
    before = os.environ.get("TNLIB_RESULTS")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TNLIB_RESULTS"] = scratch
        try:
            save_figure(fig, record.name, columns)
        finally:
            os.environ.pop("TNLIB_RESULTS")
            if before is not None:
                os.environ["TNLIB_RESULTS"] = before
        for path in Path(scratch, "figures").iterdir():
            write_atomic(record.asked.out / path.name, path.read_bytes())
