"""What a sweep shows while it runs and leaves behind: lines, index.html, and one table as CSV and JSON."""

import csv
import io
import json
import time
from pathlib import Path

from tnlib.job import products
from tnlib.progress import Monitor
from tnlib.records import write_atomic
from tnlib.report import flatten, write_index

NUMBERS_SHOWN = 12  # columns of metrics on the page; the files have all


class SweepMonitor(Monitor):
    """The Monitor of points: each is looked at in its own folder. The only writer of index.html."""

    def __init__(self, out, points, heading):
        self.points = {point.label: point for point in points}
        super().__init__(out, list(self.points), set(), heading)

    def _state(self, name):
        return self.points[name].state

    def _write(self, finished):
        for outcome in self.outcomes:
            if outcome.status == "running":
                outcome.figures, outcome.records = products(self.out / outcome.folder, outcome.name)
        rows = [row_of(self.points[outcome.label], outcome) for outcome in self.outcomes]
        write_index(self.out, self.outcomes, self.heading, time.time() - self.began, finished, _shown(rows, self.points))
        self.written = time.time()


def row_of(point, outcome):
    """One row of the table: the point, how it went, its parameters, and every number of its records."""
    row = {"point": point.label, "status": outcome.status, "seconds": outcome.seconds, "error": outcome.error}
    return row | point.given | (numbers(point.job.out, outcome.records) if outcome.status == "ok" else {})


def numbers(folder, records):
    """{name: number} of a run's records; names have the record in front where there are several.

    Exact: every number in a record's metrics is there once; a table's are called table[words of the row].column.
    """
    found = {}
    for record in records:
        metrics = json.loads((Path(folder) / "results" / f"{record}.json").read_text("utf-8")).get("metrics") or {}
        prefix = f"{record}." if len(records) > 1 else ""
        single, tables = flatten(metrics)
        for name, rows in tables.items():
            words = [", ".join(value for value in row.values() if isinstance(value, str)) for row in rows]
            places = words if len(set(words)) == len(words) and all(words) else range(len(rows))
            for place, row in zip(places, rows):
                single |= {f"{name}[{place}].{key}": value for key, value in row.items()}
        found |= {f"{prefix}{name}": value for name, value in single.items() if isinstance(value, (int, float))}
    return found


def write_table(out, points, grid):
    """Write table.csv and table.json of a sweep's folder; returns the rows."""
    rows = [row_of(point, point.state) for point in points]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomic(out / "table.csv", text.getvalue())
    about = {"notebook": points[0].job.name, "scale": points[0].job.scale, "grid": grid, "rows": rows}
    write_atomic(out / "table.json", json.dumps(about, indent=1) + "\n")
    return rows


def _shown(rows, points):
    """The rows with as many columns as a page can hold: no cells of tables, and the first few numbers."""
    own = {"point", "status", "seconds", *(name for point in points.values() for name in point.given)}
    metrics = [key for row in rows for key in row if key not in own and key != "error" and "[" not in key]
    shown = own | set(list(dict.fromkeys(metrics))[:NUMBERS_SHOWN])
    return [{key: value for key, value in row.items() if key in shown} for row in rows]
