"""One slider, one question: what does this rank, bond dimension or number of terms cost me?

An Explorer redraws a picture when its slider comes to rest; `fit_explorer` asks the question of one weight and one family
of forms, `bit_explorer` of one tensor and the integer grids of quant.py. The picture is a PNG inside a widget, so it works in JupyterLab, survives export and is tested without a kernel.
"""

import asyncio
import io

import ipywidgets
import torch

from tnlib.audit import audit
from tnlib.low_rank import low_rank_errors
from tnlib.quant import STARTS, FakeQuantize, Quantize


class Explorer(ipywidgets.VBox):
    """A slider over `values`, the picture that draw(value) makes, and one sentence below it.

    draw: value -> (matplotlib figure, sentence); called once a value, the picture is kept
    delay: seconds that the slider must rest before a redraw; fast key presses draw once (needs a running event loop,
        as every kernel has; without one a change draws at once)
    choices: {label: options} of further controls, rows of buttons; draw then gets the tuple (value, option, …)
    """

    def __init__(self, draw, values, label, start=None, delay=0.15, choices=None):
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
        self.buttons = [
            ipywidgets.ToggleButtons(options=list(options), description=name, style={"button_width": "6em"})
            for name, options in (choices or {}).items()
        ]
        self.picture = ipywidgets.Image(format="png", layout={"max_width": "100%"})
        self.sentence = ipywidgets.HTML()
        super().__init__([self.slider, *self.buttons, self.picture, self.sentence])
        for control in (self.slider, *self.buttons):
            control.observe(lambda change: self._schedule(), "value")
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
        if self.buttons:
            value = (value, *(row.value for row in self.buttons))
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


class BitExplorer(Explorer):
    """What a grid makes of one tensor; see `bit_explorer`."""

    def __init__(self, tensor, values, scales, starts, start=4, delay=0.15):
        self.tensor, self.bits = tensor.detach().float(), list(values)
        self.noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        self._tables = {}
        choices = {"scales": scales, "start": starts}
        super().__init__(self.figure, self.bits, "bits", start, delay, choices)

    def table(self, scales, start):
        """The plotted numbers as columns: bits, error, error of Gaussian noise of the same shape."""
        if (scales, start) not in self._tables:
            found = {"error": self.tensor, "noise error": self.noise}
            rows = {name: [_grid_error(x, b, scales, start) for b in self.bits] for name, x in found.items()}
            self._tables[scales, start] = {"bits": self.bits, "scales": str(scales), "start": start} | rows
        return self._tables[scales, start]

    def figure(self, position):
        """The static figure for (bits, scales, start), and its sentence: (figure, text)."""
        import matplotlib.pyplot as plt

        bits, scales, start = position
        figure, (histogram, curve) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(1.5, 1))
        table, fake = self.table(scales, start), _grid(self.tensor, bits, scales, start)
        error, null = (table[name][self.bits.index(bits)] for name in ("error", "noise error"))
        self._histogram(histogram, fake)
        curve.semilogy(self.bits, table["error"], label="this tensor")
        curve.semilogy(self.bits, table["noise error"], "--", label="Gaussian noise, same shape")
        curve.plot([bits], [error], "o", color="black", markersize=9, fillstyle="none")
        curve.set(xlabel="bits", ylabel="relative error", title=f"{bits} bits: {error:.3f}")
        curve.legend(fontsize=8)
        stored = bits + 32 * fake.scale.numel() / self.tensor.numel()
        text = f"{bits} bits, scales: {scales}, start: {start}. {stored:.2f} bits a number are stored, "
        return figure, text + f"{error:.3f} of the tensor is missed; of noise of the same shape: {null:.3f}."

    def _histogram(self, axis, fake):
        """The tensor's numbers, and the grid of its first scale."""
        axis.hist(self.tensor.flatten().numpy(), bins=200, color="#bbbbbb")
        grid = float(fake.scale[0]) * torch.arange(-(2 ** (fake.bits - 1)), 2 ** (fake.bits - 1))
        axis.vlines(grid, 0, 1, transform=axis.get_xaxis_transform(), color="#0072B2", linewidth=0.6)
        which = "The grid" if fake.scale.numel() == 1 else f"The first of {fake.scale.numel():,} grids"
        axis.set(
            yscale="log", xlabel="number", ylabel="how many", title=f"{which}, points {grid[1] - grid[0]:.2g} apart"
        )
        axis.grid(False)


def bit_explorer(tensor, bits=range(2, 9), scales=("tensor", "channel", 64), starts=STARTS):
    """A slider over bits, and buttons for scales and their start: the grid on the tensor's histogram, and its error.

    Returns: BitExplorer. `.figure((4, "tensor", "mse"))` is one picture as a plain matplotlib figure
    Exact: the error in the sentence is that of FakeQuantize(tensor, Quantize(bits=…, scales=…, start=…)).
    """
    return BitExplorer(tensor, bits, scales, starts)


def _grid(tensor, bits, scales, start):
    return FakeQuantize(tensor, Quantize(bits=bits, scales=scales, start=start, learn="frozen"))


def _grid_error(tensor, bits, scales, start):
    with torch.no_grad():
        return float((_grid(tensor, bits, scales, start)(tensor) - tensor).norm() / tensor.norm())


def _error(rho):
    return (1 - min(1.0, rho) ** 2) ** 0.5
