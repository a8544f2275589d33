"""Forest plots: one row a verdict, its effect as a dot with an interval, its verdict as color and marker."""

from tnlib.claims import CONFIRMED, MIXED, REFUTED, UNDECIDED, UNTESTED, VERDICTS
from tnlib.effects import BITS, NATS

# Okabe & Ito 2008, safe for the color-blind; the marker says the same to a grey printer.
LOOKS = {CONFIRMED: ("#0072B2", "o"), MIXED: ("#CC79A7", "D"), REFUTED: ("#D55E00", "s"), UNDECIDED: ("#000000", "^")}
LOOKS |= {UNTESTED: ("#999999", "X")}
_PANELS = {NATS: "nats a token", BITS: "bits a byte", "points": "points, or percent of perplexity"}
_PANELS["% perplexity a byte"] = _PANELS["points"]
_LINEAR_WITHIN = {_PANELS[NATS]: 0.1, _PANELS["points"]: 1.0}  # beyond it the axis is logarithmic
_OTHER = "share, correlation, relative error or ratio"


def claims_figure(judgments):
    """All claims in one picture, a panel a unit: right of the line speaks for a claim, left against it.

    judgments: as judge() returns them. Solid: the parts that decide, at the deciding scale; open and small: the same
        parts at the next smaller scale
    Returns: a matplotlib figure. x is the distance from the border that the claim sets, logarithmic at the ends for nats and points
    """
    import matplotlib.pyplot as plt

    panels = _panels(judgments)
    heights = [len(rows) + 1.2 for rows in panels.values()]
    size = (8.6, 0.235 * sum(heights) + 0.8)
    figure, axes = plt.subplots(len(panels), 1, figsize=size, height_ratios=heights, squeeze=False)
    for axis, (unit, rows) in zip(axes[:, 0], panels.items()):
        for place, (row, smaller) in enumerate(rows):
            if smaller is not None and smaller.effect is not None:
                _dot(axis, place + 0.24, smaller, smaller.effect.toward, solid=False)
            _dot(axis, place, row, None if row.effect is None else row.effect.toward)
        if unit in _LINEAR_WITHIN:
            axis.set_xscale("symlog", linthresh=_LINEAR_WITHIN[unit])
            axis.xaxis.set_major_formatter("{x:g}")
        axis.axvline(0, color="black", linewidth=0.8, linestyle="-", marker="")
        _rows(axis, [row.part for row, _ in rows])
        axis.set_xlabel(f"← against the claim    {unit}    for the claim →", fontsize=8)
    count = {verdict: sum(j.verdict == verdict for j in judgments) for verdict in VERDICTS}
    axes[0, 0].set_title(
        f"{len(judgments)} claims: " + "; ".join(f"{number} {verdict}" for verdict, number in count.items() if number),
        fontsize=10,
    )
    _legend(figure)
    return figure


def claim_figure(judgment):
    """One claim: every row of the records with its effect in the record's own units.

    Returns: a matplotlib figure. Dotted: the border that the claim sets; the shaded side speaks for it. Open: variants
        that do not count
    """
    import matplotlib.pyplot as plt

    units = {}
    for row in judgment.rows:
        units.setdefault(row.effect.unit if row.effect else "not in the record", []).append(row)
    units = units or {"no record": []}
    heights = [len(rows) + 1.2 for rows in units.values()]
    size = (8.6, 0.32 * sum(heights) + 0.7)
    figure, axes = plt.subplots(len(units), 1, figsize=size, height_ratios=heights, squeeze=False)
    for axis, (unit, rows) in zip(axes[:, 0], units.items()):
        for place, row in enumerate(rows):
            _dot(
                axis,
                place,
                row,
                row.effect and (lambda number=None, e=row.effect: e.value if number is None else number),
                row.counts,
            )
        _rows(axis, [f"{row.part} · {row.scale}" for row in rows])
        axis.set_xlabel(unit, fontsize=8)
        if rows and rows[0].effect:
            _border(axis, rows[0].effect)
        else:
            axis.set_xticks([])
    axes[0, 0].set_title(f"{judgment.claim.key}, {judgment.claim.paper.name}: {judgment.verdict}")
    _legend(figure)
    return figure


def _panels(judgments):
    """{unit: [(row at the deciding scale, the same part at the next smaller one or None)]}"""
    panels = {}
    for judgment in judgments:
        here = [row for row in judgment.rows if row.counts and row.scale == judgment.scale]
        unit = next((row.effect.unit for row in here if row.effect), "")
        for row in here:
            same = (row.part, row.notebook)
            rows = [o for o in judgment.rows if (o.part, o.notebook) == same and o.scale != row.scale]
            panel = _PANELS.get(row.effect.unit if row.effect else unit, _OTHER)
            below = rows and judgment.rows.index(rows[0]) > judgment.rows.index(row)
            panels.setdefault(panel, []).append((row, rows[0] if below else None))
    return {panel: panels[panel] for panel in (*dict.fromkeys(_PANELS.values()), _OTHER) if panel in panels}


def _dot(axis, place, row, at, solid=True):
    """One row: its dot and interval at `at(number)`, or the verdict in words where there is no number."""
    color, marker = LOOKS[row.verdict]
    if row.effect is None:
        axis.text(
            0.5,
            place,
            f"{row.verdict}; no number in the record",
            transform=axis.get_yaxis_transform(),
            fontsize=7,
            va="center",
            backgroundcolor="white",
            color=color,
        )
        return
    if row.effect.low is not None:
        ends = [at(row.effect.low), at(row.effect.high)]
        axis.plot(
            ends,
            [place, place],
            "-",
            color=color,
            linewidth=1.6 if solid else 0.8,
            marker="|",
            markersize=5 if solid else 3,
        )
    axis.plot(
        [at()],
        [place],
        linestyle="none",
        color=color,
        marker=marker,
        markersize=6 if solid else 4,
        fillstyle="full" if solid else "none",
    )


def _rows(axis, names):
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="x", labelsize=8)


def _border(axis, effect):
    """The border of a claim, and the side that speaks for it."""
    axis.margins(x=0.08)
    low, high = axis.get_xlim()
    low, high = min(low, effect.border), max(high, effect.border)
    room = 0.04 * (high - low)
    low, high = low - room, high + room
    axis.axvline(effect.border, color="black", linewidth=1, linestyle=":", marker="")
    axis.axvspan(
        *((effect.border, high) if effect.favors > 0 else (low, effect.border)),
        color="#0072B2",
        alpha=0.07,
        linewidth=0,
    )
    axis.set_xlim(low, high)


def _legend(figure):
    from matplotlib.lines import Line2D

    shown = [
        Line2D([], [], linestyle="none", color=color, marker=marker, label=verdict)
        for verdict, (color, marker) in LOOKS.items()
    ]
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown), fontsize=8)
