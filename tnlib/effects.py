"""An effect with its interval and the border from which on it speaks for a claim; ways to make one from a record's rows."""

import statistics
from dataclasses import dataclass

NATS, BITS, SHARE = "nats a token", "bits a byte", "share"


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A number, how far it may be off, and from which border on it speaks for the claim."""

    value: float
    unit: str
    of: str  # what was compared, in the record's own names
    low: float | None = None  # None: the record holds no interval
    high: float | None = None
    interval: str = "no interval in the record"
    border: float = 0.0
    favors: int = 1  # +1: above the border for the claim, -1: below it

    def toward(self, number=None):
        """A number, by default the value itself, as its distance from the border; positive speaks for the claim."""
        return (self.favors * ((self.value if number is None else number) - self.border)) + 0.0

    def __str__(self):
        value, low, high = (
            None if x is None else f"{round(x, 4) + 0.0:.3g}" for x in (self.value, self.low, self.high)
        )
        return f"{value} {self.unit}" if low is None else f"{value} ({low} to {high}) {self.unit}"


def only(rows, **wanted):
    """The one row of a table with these values."""
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()):
            return row
    raise LookupError(f"no row with {wanted}")


def over_cases(values, what, **more):
    """Median and range over cases that differ, such as matrices or settings."""
    values = list(values)
    low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
    said = f"median and range over {len(values)} {what}" if len(values) > 1 else f"one of {what}"
    return Effect(value=statistics.median(values), low=low, high=high, interval=said, **more)


def over_seeds(values, **more):
    """Mean and range over seeds."""
    values = list(values)
    if len(values) < 2:
        return Effect(value=statistics.fmean(values), **more)
    said = f"range over {len(values)} seeds"
    return Effect(value=statistics.fmean(values), low=min(values), high=max(values), interval=said, **more)


def paired(value, stderr, low, high, seeds, windows, **more):
    """A paired difference: its range over seeds where there are several, else 95 % over the windows of text."""
    if seeds > 1:
        return Effect(value=value, low=low, high=high, interval=f"range over {seeds} seeds", **more)
    from scipy.special import stdtrit

    half = float(stdtrit(windows - 1, 0.975)) * stderr
    return Effect(value=value, low=value - half, high=value + half, interval=f"95 % over {windows} windows", **more)


def counted(hits, total, of, border=0.5, level=0.05):
    """A share of cases with its exact binomial interval, as if the cases had been drawn. Clopper & Pearson 1934."""
    from scipy.special import betaincinv

    low = float(betaincinv(hits, total - hits + 1, level / 2)) if hits else 0.0
    high = float(betaincinv(hits + 1, total - hits, 1 - level / 2)) if hits < total else 1.0
    said = f"95 %, binomial, {hits} of {total}"
    return Effect(value=hits / total, low=low, high=high, unit=SHARE, of=of, interval=said, border=border)
