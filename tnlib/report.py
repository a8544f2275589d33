"""The index page of a run: one file that needs nothing else, not even a network, and may be mailed.

It is rewritten whenever something happens, each time as a whole, and asks the browser to reload it until the run is over.
"""

import base64
import json
import re
import time
from html import escape
from pathlib import Path

from tnlib.records import write_atomic

REFRESH = 5  # seconds
ABOUT = ("recipe", "budget", "seed", "versions", "device", "threads", "commit", "time")
STATUSES = ("ok", "running", "failed", "interrupted", "pending")
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --paper: #fff; --card: #f6f8fa;
  --ok: #1a7f37; --running: #0969da; --failed: #cf222e; --interrupted: #9a6700; --pending: #6e7781; --on: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --line: #343b43; --paper: #0f1318;
  --card: #181d24; --ok: #56d364; --running: #6cb6ff; --failed: #ff8078; --interrupted: #e3b341; --pending: #9da7b1;
  --on: #0f1318 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1120px; padding: 24px 20px 80px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px } h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 }
p { margin: 4px 0 } a { color: var(--running); text-underline-offset: 2px }
code, pre { font: 13px/1.45 ui-monospace, Menlo, monospace }
.soft { color: var(--soft); font-size: .9rem } .bar { display: flex; gap: 2px; margin: 12px 0 20px }
.bar i { flex: 1; height: 8px; border-radius: 2px; background: var(--line) }
.badge { background: var(--pending); color: var(--on); border-radius: 10px; padding: 1px 9px; font-size: .8rem; font-weight: 600 }
.ok { background: var(--ok) !important } .running { background: var(--running) !important }
.failed { background: var(--failed) !important } .interrupted { background: var(--interrupted) !important }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: 4px 0 } .wide { overflow-x: auto; max-width: 100% }
.tables { display: flex; flex-wrap: wrap; gap: 16px 48px; align-items: flex-start; margin: 14px 0 }
.chip { background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: 0 6px; overflow-wrap: anywhere }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600 } td.number, th.number { text-align: right; white-space: nowrap }
.contents { width: 100%; margin-bottom: 28px } .contents td:nth-child(-n+2) { width: 1%; white-space: nowrap }
section { border: 1px solid var(--line); border-radius: 8px; padding: 16px 20px; margin: 16px 0; scroll-margin-top: 8px }
.head { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: baseline } .head h2 { flex: 1 1 20rem }
.figures { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); margin: 12px 0 }
figure { margin: 0 }
figure img { display: block; width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 6px }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 10px; overflow-x: auto; margin: 8px 0 }
.error { border-left: 4px solid var(--failed); padding-left: 10px; overflow-wrap: anywhere } summary { cursor: pointer }
progress { width: 100%; max-width: 320px; accent-color: var(--running) }
details pre { white-space: pre-wrap; overflow-wrap: anywhere }
@media (max-width: 600px) { .contents td:nth-child(3) { display: none } body { padding: 14px 10px 60px } section { padding: 12px } }
"""


def write_index(out, outcomes, heading, seconds, finished, rows=()):
    """Write index.html of the run in folder `out`.

    outcomes: one record a notebook, in order (job.Outcome); heading: what the run is called; seconds: since its start
    rows: a table above the notebooks, as dictionaries
    Exact: a reader sees the page before or the page after, never a part.
    """
    write_atomic(Path(out) / "index.html", page(Path(out), outcomes, heading, seconds, finished, rows))


def page(out, outcomes, heading, seconds, finished, rows=()):
    """The page as text; everything that came out of a notebook is escaped."""
    refresh = "" if finished else f'<meta http-equiv="refresh" content="{REFRESH}">'
    counts = [(status, sum(o.status == status for o in outcomes)) for status in STATUSES]
    told = " · ".join(f"{count} {'done' if status == 'ok' else status}" for status, count in counts if count)
    bar = "".join(f'<i class="{o.status}"></i>' for o in outcomes)
    contents = "".join(
        f'<tr><td>{_badge(o)}</td><td><a href="#{escape(o.label)}">{escape(o.label)}</a></td>'
        f'<td>{escape(_title(o))}</td><td class="number">{_duration(o)}</td></tr>'
        for o in outcomes
    )
    ended = "Stopped" if any(o.status in ("pending", "interrupted") for o in outcomes) else "Finished"
    state = ended if finished else "Running"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{refresh}'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(heading)}</title>'
        f"<style>{STYLE}</style></head><body><main>\n<h1>{escape(heading)}</h1>"
        f"<p>{state}: {told} of {len(outcomes)} · {span(seconds)}</p>"
        f'<p class="soft">Written {time.strftime("%Y-%m-%d %H:%M:%S")}</p><div class="bar" aria-hidden="true">{bar}</div>\n'
        f'<div class="wide"><table class="contents"><tbody>{contents}</tbody></table></div>\n'
        + (f'<div class="tables">{_rows(rows)}</div>' if rows else "")
        + "\n".join(_section(out, o) for o in outcomes)
        + "\n</main></body></html>\n"
    )


def span(seconds):
    """Seconds as people say them: 34 s, 3 min 12 s, 1 h 02 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours = seconds // 60, seconds // 3600
    return f"{minutes} min {seconds % 60:02} s" if not hours else f"{hours} h {minutes % 60:02} min"


def export_html(path):
    """Write NAME.html beside the executed notebook NAME.ipynb: readable offline, except that formulas need MathJax.

    Returns: None, or the reason why it could not; a run does not fail for it. Widgets become their last text: their
    manager would be loaded from a server.
    """
    from nbconvert.exporters import HTMLExporter

    drop = ["html_head_js_requirejs", "html_head_js_mermaidjs", "jupyter_widgets"]
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if not any("$" in "".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"):
            drop.append("html_head_js_mathjax")
        blocks = "".join(f"{{%- block {name} -%}}{{%- endblock {name} -%}}" for name in drop)
        body, _ = HTMLExporter(raw_template="{% extends 'lab/index.html.j2' %}" + blocks).from_filename(str(path))
    except Exception as error:  # a template, a broken output, a file that never came to be
        return f"{type(error).__name__}: {error}"
    write_atomic(path.with_suffix(".html"), body)


# -------------------------------------------------------------------------------------------- one notebook


def _section(out, outcome):
    name, base, label = escape(outcome.name), out / outcome.folder, escape(outcome.label)
    at = f"{escape(outcome.folder)}/" if outcome.folder else ""
    links = [("notebook", f"{at}{name}.ipynb"), ("as a page", f"{at}{name}.html"), ("log", f"{at}logs/{name}.log")]
    shown = " · ".join(f'<a href="{href}">{text}</a>' for text, href in links if (out / href).exists())
    given = " ".join(
        f'<code class="chip">{escape(f"{key} = {value!r}")}</code>' for key, value in outcome.parameters.items()
    )
    figures = "".join(_figure(base, at, figure) for figure in outcome.figures)
    parts = [
        f'<section id="{label}"><div class="head"><h2>{escape(_title(outcome))}</h2>'
        f'{_badge(outcome)}<span class="soft">{_duration(outcome)}</span></div>',
        f'<p class="soft">{label}{" · " * bool(shown)}{shown}</p>',
        f'<p class="soft">with {given}</p>' if given else "",
        _progress(outcome),
        _error(outcome),
        f'<div class="figures">{figures}</div>' if figures else "",
        *(_record(base / "results" / f"{record}.json") for record in outcome.records),
    ]
    return "".join(parts) + "</section>"


def _progress(outcome):
    if outcome.status != "running":
        return ""
    return f'<p>cell {outcome.cell} of {outcome.cells} <progress max="{outcome.cells}" value="{outcome.cell}"></progress></p>'


def _error(outcome):
    if not outcome.message:
        return ""
    at = "" if outcome.at in outcome.message else f" ({outcome.at})"
    text = f"<p class='error'><b>{escape(outcome.error or outcome.status)}</b>: {escape(outcome.message)}{at}</p>"
    lines = re.sub(r"\x1b\[[0-9;]*m", "", outcome.traceback or "").splitlines()
    return text + (f"<pre>{escape(chr(10).join(lines[-20:]))}</pre>" if lines else "")


def _figure(base, at, name):
    path = base / "figures" / f"{name}.png"
    if not path.exists():  # the notebook has just been started again
        return ""
    name, png = escape(name), base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{name}" src="data:image/png;base64,{png}"><figcaption class="soft">{name} '
        f'(<a href="{at}figures/{name}.svg">svg</a>, <a href="{at}figures/{name}.csv">numbers</a>)</figcaption></figure>'
    )


def _record(path):
    """A record's metrics as tables, and what they were measured on, folded."""
    if not path.exists():
        return ""
    record = json.loads(path.read_text(encoding="utf-8"))
    single, tables = flatten(record.get("metrics") or {})
    parts = [_table(["metric", record["name"]], [[key, value] for key, value in single.items()])] if single else []
    for caption, rows in tables.items():
        parts.append(_rows(rows, caption))
    listed = "\n".join(
        f"{key}: {json.dumps(record[key], ensure_ascii=False)}" for key in ABOUT if record.get(key) is not None
    )
    folded = f'<details class="soft"><summary>measured on</summary><pre>{escape(listed)}</pre></details>'
    return f'<div class="tables">{"".join(parts)}</div>' * bool(parts) + folded


def flatten(tree, prefix=""):
    """Nested dicts as {"a.b": value}, and apart from them the lists of dicts, which are tables."""
    single, tables = {}, {}
    for key, value in tree.items():
        if isinstance(value, dict):
            inner, rows = flatten(value, f"{prefix}{key}.")
            single, tables = single | inner, tables | rows
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            tables[f"{prefix}{key}"] = [flatten(row)[0] for row in value]
        else:
            single[f"{prefix}{key}"] = value
    return single, tables


def _rows(rows, caption=""):
    """A table of dictionaries; a key that one of them lacks is an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return _table(columns, [[row.get(column) for column in columns] for row in rows], caption)


def _table(columns, rows, caption=""):
    numeric = [any(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    kind = ['class="number"' if flag else "" for flag in numeric]
    head = "".join(f"<th {kind[i]}>{escape(column)}</th>" for i, column in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(f"<td {kind[i]}>{escape(_cell(value))}</td>" for i, value in enumerate(row)) + "</tr>"
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value):
    """Four significant digits for measured numbers, whole numbers in full."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    if isinstance(value, list):
        shown = [_cell(item) for item in value] if len(value) <= 8 else [_cell(value[0]), "…", _cell(value[-1])]
        return ", ".join(shown) + (f" ({len(value)} values)" if len(value) > 8 else "")
    return str(value)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _badge(outcome):
    return f'<span class="badge {outcome.status}">{outcome.status}</span>'


def _duration(outcome):
    if outcome.seconds is not None:
        return span(outcome.seconds) + (", earlier" if outcome.kept else "")
    return span(time.time() - outcome.started) if outcome.status == "running" else ""


def _title(outcome):
    return re.sub(r"[`*]", "", outcome.title or outcome.name)
