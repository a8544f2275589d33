"""One slider, one question: what does this rank, bond dimension or number of terms cost me?

An Explorer redraws a picture when its slider comes to rest; `fit_explorer` asks the question of one weight and one family
of forms. The picture is a PNG inside a widget, so it works in JupyterLab, survives export and is tested without a kernel.
"""

import asyncio
import io

import ipywidgets
import torch

from tnlib.audit import audit
from tnlib.low_rank import low_rank_errors


class Explorer(ipywidgets.VBox):
    """A slider over `values`, the picture that draw(value) makes, and one sentence below it.

    draw: value -> (matplotlib figure, sentence); called once a value, the picture is kept
    delay: seconds that the slider must rest before a redraw; fast key presses draw once (needs a running event loop,
        as every kernel has; without one a change draws at once)
    """

    def __init__(self, draw, values, label, start=None, delay=0.15):
        self.draw, self.delay, self.draws = draw, delay, 0
        self._kept, self._due = {}, None
        values = list(values)
        self.slider = ipywidgets.SelectionSlider(
            options=values,
            value=values[len(values) // 2] if start is None else start,
            description=label,
            continuous_update=False,
            style={"description_width": "initial"},
            layout={"width": "30em"},
        )
        self.picture = ipywidgets.Image(format="png", layout={"max_width": "100%"})
        self.sentence = ipywidgets.HTML()
        super().__init__([self.slider, self.picture, self.sentence])
        self.slider.observe(lambda change: self._schedule(), "value")
        self._show()

    def _schedule(self):
        """Redraw once the slider rests: each change puts the redraw off by `delay`."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return self._show()
        if self._due is not None:
            self._due.cancel()
        self._due = loop.call_later(self.delay, self._show)

    def _show(self):
        value = self.slider.value
        if value not in self._kept:
            self.draws += 1
            self._kept[value] = self._render(value)
        png, sentence = self._kept[value]
        self.picture.value = png
        self.sentence.value = f"<b>{sentence}</b>"  # after the picture, so that nobody reads it over the old one

    def _render(self, value):
        import matplotlib.pyplot as plt

        figure, sentence = self.draw(value)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
        plt.close(figure)
        return buffer.getvalue(), sentence


class FitExplorer(Explorer):
    """What one number (terms, rank, bond dimension) buys on one weight; see `fit_explorer`."""

    def __init__(self, weight, make_form, values, label, start=None, delay=0.15, corner=48):
        self.weight, self.make_form, self.label, self.corner = weight, make_form, label, corner
        self.fits = {value: audit(weight, make_form(value), seeds=1) for value in values}
        errors = low_rank_errors(weight)  # (min(out, in),)
        ranks = {value: int(fit.kept * weight.numel() / sum(weight.shape)) for value, fit in self.fits.items()}
        self.low_rank = {v: float(errors[min(r, len(errors)) - 1]) if r else None for v, r in ranks.items()}
        super().__init__(self.figure, values, label, start, delay)

    def table(self):
        """The plotted numbers as columns: value, kept, error, null error, low-rank error."""
        nan = float("nan")
        rows = [
            (v, f.kept, f.error, _error(f.null_rho), nan if b is None else b)
            for (v, f), b in zip(self.fits.items(), self.low_rank.values())
        ]
        return dict(zip((self.label, "kept", "error", "null error", "low-rank error"), map(list, zip(*rows))))

    def figure(self, value):
        """The static figure for one slider position, and its sentence: (figure, text)."""
        import matplotlib.pyplot as plt

        figure, (curve, before, after) = plt.subplots(1, 3, figsize=(10, 3.4), width_ratios=(1.7, 1, 1))
        table, fit = self.table(), self.fits[value]
        curve.plot(table["kept"], table["error"], label="this weight")
        curve.plot(table["kept"], table["null error"], "--", label="Gaussian noise, same shape")
        curve.plot(table["kept"], table["low-rank error"], label="low rank, same size")
        curve.plot([fit.kept], [fit.error], "o", color="black", markersize=9, fillstyle="none")
        curve.set(
            xlabel="stored numbers / dense", ylabel="relative error", ylim=(0, 1.02), title=f"{self.label} {value}"
        )
        curve.legend(fontsize=8)
        self._corners(before, after, value)
        low = self.low_rank[value]
        beside = "" if low is None else f"; low rank of that size: {low:.3f}"
        null = f"noise of the same shape: {_error(fit.null_rho):.3f}"
        return (
            figure,
            f"{self.label} {value} stores {fit.kept:.1%} and misses {fit.error:.3f} of the weight; {null}{beside}.",
        )

    def _corners(self, before, after, value):
        """The weight's upper left corner, and what the form makes of it, on one color scale."""
        shape = tuple(self.weight.shape)
        form = self.make_form(value).resolve(shape)
        with torch.no_grad():
            rebuilt = form.to_dense(form.decompose(self.weight)[0], shape)
        limit = 3 * float(self.weight.std())
        for axis, matrix, title in ((before, self.weight, "weight"), (after, rebuilt, "rebuilt")):
            axis.imshow(matrix[: self.corner, : self.corner].float().numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
            axis.set(title=f"{title}, corner", xticks=[], yticks=[])
            axis.grid(False)


def fit_explorer(weight, make_form, values, label, start=None):
    """A slider over `values`; make_form(value) is fitted to `weight` (out, in) and drawn beside noise and low rank.

    Returns: FitExplorer. `.figure(value)` is the same picture as a plain matplotlib figure, `.table()` its numbers
    Exact: the error in the sentence is audit(weight, make_form(value)).error.
    """
    return FitExplorer(weight, make_form, values, label, start)


def _error(rho):
    return (1 - min(1.0, rho) ** 2) ** 0.5
