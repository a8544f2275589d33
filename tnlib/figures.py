"""Figures: saved as svg, png and the plotted numbers, shown once, readable in grey.

    use_style()
    fig, ax = plt.subplots()
    ax.plot(ranks, errors)
    label(ax, "Rank 16 keeps nine tenths of the norm", "rank", "relative error")
    save_figure(fig, "10_error_vs_rank", {"rank": ranks, "error": errors})

A figure's name starts with its notebook's number. `records` has what belongs to the numbers: save_result, load_result.
matplotlib is imported on first use, so that `import tnlib` stays quick.
"""

import csv
import io
import json
import sys

from tnlib.records import (
    SCALES,
    load_result,
    plain_name,
    record,
    repo_root,
    run_folder,
    save_result,
    trust,
    write_atomic,
)

__all__ = ["label", "load_result", "record", "save_figure", "save_result", "show_record", "use_style"]

# Okabe & Ito 2008, safe for the color-blind; yellow is left out because it vanishes on white. Color alone never
# carries meaning: line style and marker change with it, so that a figure survives a grey printer.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def use_style():
    """Set the one style of the project's figures: readable in grey, title at the left, 6.4 x 3.8 inches."""
    import matplotlib
    from cycler import cycler

    matplotlib.rcParams.update({
        "axes.prop_cycle": cycler(color=PALETTE) + cycler(linestyle=DASHES) + cycler(marker=MARKERS),
        "figure.figsize": (6.4, 3.8), "figure.dpi": 120, "savefig.dpi": 120, "figure.constrained_layout.use": True,
        "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 11, "axes.labelsize": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "grid.color": "#dddddd", "grid.linewidth": 0.6, "lines.linewidth": 1.6, "lines.markersize": 4.5,
        "legend.frameon": False, "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9,
        "svg.fonttype": "none",  # text stays text: searchable, and small in a diff
    })  # fmt: skip


def label(ax, title, x, y):
    """Give `ax` its title (the finding, not the topic) and both axis labels (with units)."""
    ax.set_title(title)
    ax.set_xlabel(x)
    ax.set_ylabel(y)


def save_figure(fig, name, data, scale=None):
    """Write NAME.svg, NAME.png and NAME.csv, and show the figure once.

    fig: a matplotlib figure
    name: the notebook's number, then what is shown, such as "10_error_vs_rank"
    data: the plotted numbers, a dict of equally long columns or a DataFrame; a single number fills its column
    scale: smoke, laptop, long, gpu or paper; by default TNLIB_SCALE, else smoke
    Returns: None, so that a cell may end in this call. The same figure writes the same bytes each time.
    Raises: ValueError for a name that is not a plain file name, or columns of different lengths
    """
    import matplotlib

    folder = run_folder(scale) / "figures"
    table = _csv(plain_name(name), data)
    drawn = {}
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):  # else each SVG gets random ids
        for ext, facts in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
            buffer = io.BytesIO()
            fig.savefig(buffer, format=ext, dpi=120, bbox_inches="tight", metadata=facts)
            drawn[ext] = _fewer_colors(buffer) if ext == "png" else buffer.getvalue()
    for ext, content in {**drawn, "csv": table}.items():
        write_atomic(folder / f"{name}.{ext}", content)
    _show_once(fig, drawn["png"])


def _fewer_colors(png):
    """The same picture in 256 colors: a quarter of the bytes, in the repository and in notebooks."""
    from PIL import Image

    small = io.BytesIO()
    picture = Image.open(png).convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    picture.save(small, "png", optimize=True, dpi=(120, 120))
    return small.getvalue()


def _show_once(fig, png):
    """Show the saved picture itself, whatever the backend, unless an earlier cell has shown the figure."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    number = getattr(fig, "number", None)  # None: made without pyplot, so nothing else will show it
    shown = number is not None and not (pyplot.fignum_exists(number) and pyplot.figure(number) is fig)
    if pyplot is not None:
        pyplot.close(fig)  # else the inline backend shows it again at the end of the cell
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and hasattr(shell, "kernel") and not shown:
        from IPython.display import Image, display

        display(Image(png))


def _csv(name, data):
    """The plotted numbers as csv text, nine significant digits."""
    if hasattr(data, "columns"):  # a DataFrame, without importing pandas
        data = {column: data[column] for column in data.columns}
    columns = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in data.items()}
    columns = {key: list(value) if isinstance(value, list | tuple | range) else value for key, value in columns.items()}
    lengths = {key: len(value) for key, value in columns.items() if isinstance(value, list)}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"save_figure({name!r}): the columns of data have different lengths, {lengths}.\n"
            "  Needed: one length for all. For curves on different x values, write one row a point: "
            "{'curve': [...], 'x': [...], 'y': [...]}"
        )
    n_rows = max(lengths.values(), default=1)
    columns = {key: value if isinstance(value, list) else [value] * n_rows for key, value in columns.items()}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(columns)
    for row in zip(*columns.values()):
        rows.writerow([f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row])
    return text.getvalue()


def show_record(name, scale=None):
    """Show the committed figure NAME of a larger run, captioned from that run's record; or say that there is none.

    name: a figure or a record, such as "10_healing"; without `scale`, the largest one recorded
    Returns: an IPython Image, or Markdown when nothing is recorded
    """
    from IPython.display import Image, Markdown, display

    folder = repo_root() / "figures"
    scales = [scale] if scale else sorted(SCALES, key=trust, reverse=True)
    found = next((s for s in scales if (folder / f"{name}_{s}.png").exists()), None)
    if found is None:
        wanted = f"at scale {scale}" if scale else "at any scale"
        return Markdown(
            f"*No figure `{name}` has been recorded {wanted} yet. To record one, from the repository's root: "
            f"`tnlib run {name.split('_')[0]} --preset {scale or 'laptop'} --record`*"
        )
    records = sorted(folder.glob(f"{name.split('_')[0]}_*_{found}.json"))
    facts = json.loads(records[0].read_text(encoding="utf-8")) if records else {}
    device = facts.get("device") or {}
    words = [device.get("gpu") or device.get("cpu"), facts.get("time", "")[:10]]
    words += [f"{key} {value}" for key, value in facts.get("versions", {}).items() if key in ("torch", "transformers")]
    display(Markdown(f"**Recorded run**, scale `{found}`: " + ", ".join(word for word in words if word)))
    return Image((folder / f"{name}_{found}.png").read_bytes())
