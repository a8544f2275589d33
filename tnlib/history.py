"""The course of a healing: one row every few steps, in memory, in history.csv, and as a curve in a notebook."""

import csv
import io
import sys
import time
from pathlib import Path

from tnlib.records import write_atomic


class History:
    """Rows of a healing, oldest first.

    rows: dictionaries with step, tokens, loss and every loss term by name (means over the steps since the row before),
        learning_rate, seconds (of work so far, interruptions not counted), and validation_nll, None where not evaluated
    """

    def __init__(self, rows=()):
        self.rows = list(rows)

    @property
    def tokens_per_second(self):
        """Tokens trained on a second, evaluations and checkpoints included; None before the first row."""
        return self.rows[-1]["tokens"] / self.rows[-1]["seconds"] if self.rows else None

    def frame(self):
        """The rows as a pandas DataFrame, NaN where there was no evaluation."""
        import pandas as pd

        return pd.DataFrame(self.rows).astype({"validation_nll": float} if self.rows else {})

    def figure(self):
        """A matplotlib figure of the loss, its terms where there are several, and the validation loss, over steps."""
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(6, 3))
        steps = [row["step"] for row in self.rows]
        for name in self.terms() if len(self.terms()) > 1 else []:
            axis.plot(steps, [row[name] for row in self.rows], linewidth=0.8, label=name)
        axis.plot(steps, [row["loss"] for row in self.rows], color="black", label="loss")
        seen = [(row["step"], row["validation_nll"]) for row in self.rows if row["validation_nll"] is not None]
        if seen:
            axis.plot(*zip(*seen), "o--", markersize=4, label="validation, nats a token")
        axis.set(xlabel="step", ylabel="loss")
        axis.legend(fontsize=8)
        return figure

    def terms(self):
        """Names of the loss terms."""
        fixed = {"step", "tokens", "loss", "learning_rate", "seconds", "validation_nll", "stage"}
        return [name for name in (self.rows[0] if self.rows else {}) if name not in fixed]

    def __len__(self):
        return len(self.rows)

    def __repr__(self):
        if not self.rows:
            return "History(empty)"
        first, last = self.rows[0], self.rows[-1]
        return (
            f"History({last['step']} steps, {last['tokens']:,} tokens, loss {first['loss']:.4g} -> {last['loss']:.4g}, "
            f"{self.tokens_per_second:.0f} tokens a second)"
        )


class Log(History):
    """A History that is also appended to a CSV file, line by line.

    path: the file, or None; step: keep the rows up to this step of an earlier, interrupted run and drop what came later
    """

    def __init__(self, path=None, step=0):
        kept = [row for row in read_history(path).rows if row["step"] <= step] if path is not None and step else []
        super().__init__(kept)
        self.path = path
        if path is not None:
            write_atomic(path, _lines(self.rows))

    def add(self, row):
        """Append one row, in memory and in the file."""
        self.rows.append(row)
        if self.path is not None:
            if len(self.rows) == 1:
                return write_atomic(self.path, _lines(self.rows))
            try:
                with Path(self.path).open("a", encoding="utf-8", newline="") as file:
                    file.write(_lines([row], header=False))
            except OSError as error:
                raise OSError(
                    f"heal: {self.path} could not be written ({error}); needed room and leave to write. Make room and call "
                    "again: the run goes on from its last checkpoint."
                ) from error


def read_history(path):
    """The History that history.csv holds; a last line that was cut off by a crash is left out, a missing file is empty."""
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    rows = [{name: _number(name, cell) for name, cell in row.items()} for row in csv.DictReader(io.StringIO(whole))]
    return History(rows)


def _lines(rows, header=True):
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(
        {k: "" if v is None else repr(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows
    )
    return text.getvalue()


def _number(name, cell):
    return int(cell) if name in ("step", "tokens") else None if cell == "" else float(cell)


class Curve:
    """The history's figure in a notebook, redrawn in place, at most every `pause` seconds; elsewhere it does nothing."""

    def __init__(self, history, shown, pause=2.0):
        self.history, self.pause, self.drawn, self.handle = history, pause, 0.0, None
        self.shown = in_notebook() and (is_interactive() if shown is None else shown)

    def draw(self, last=False):
        """Redraw if it is time; `last`: in any case."""
        if not self.shown or not self.history.rows or (not last and time.monotonic() - self.drawn < self.pause):
            return
        import matplotlib.pyplot as plt
        from IPython.display import display

        figure = self.history.figure()
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        plt.close(figure)
        self.drawn = time.monotonic()


def in_notebook():
    """Whether a Jupyter kernel runs this."""
    return _kernel() is not None


def is_interactive():
    """Whether someone watches: a terminal, or a notebook front end that could answer a question; papermill could not."""
    kernel = _kernel()
    return bool(getattr(kernel, "_allow_stdin", False)) if kernel is not None else sys.stderr.isatty()


def _kernel():
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None)
