"""What all commands share: --json and --debug, errors as sentences, exit codes, and progress that a log can hold.

    0 done   1 failed, in whole or in part   2 asked for what is not there or does not fit   130 stopped by Ctrl-C
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import re
import sys
import time
import traceback
from dataclasses import dataclass

import click

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 130
SAY_EVERY = 20  # seconds between two lines of one progress bar, where there is no terminal to write in place
NOTEBOOKS = ("ipykernel", "joblib", "nbconvert", "nbformat", "papermill", "psutil", "yaml")
CLUSTER = ("distributed",)


@dataclass(frozen=True)
class Answer:
    """What a command found: `data` for --json, `text` for people, and the exit code."""

    data: object
    text: str = ""
    code: int = DONE


def command(resumes=False):
    """Turn a function that returns an Answer into a command's body: options --json and --debug, errors, exit code.

    resumes: whether the same command goes on after Ctrl-C, and says so
    Exact: with --json, standard output is one JSON value, errors included; all else goes to standard error.
    """

    def wrap(run):
        """The command's body: `run` with its options, its answer printed, and its exit code."""

        @functools.wraps(run)
        def body(as_json, debug, **given):
            answer = _outcome(lambda: run(**given), as_json, debug, resumes)
            if as_json:
                click.echo(json.dumps(plain(answer.data), indent=1, ensure_ascii=False, allow_nan=False))
            elif answer.text:
                click.echo(answer.text)
            raise SystemExit(answer.code)

        body = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(body)
        return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, all else on stderr.")(body)

    return wrap


def _outcome(run, as_json, debug, resumes):
    """The Answer of run(), or that of its error, which has then been told on standard error."""
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext(), bars_as_lines():
            return run()
    except KeyboardInterrupt:
        code, said = STOPPED, "stopped; the same command goes on from here" if resumes else "stopped"
        click.echo(said, err=True)
        return Answer({"error": {"kind": "Stopped", "message": said, "code": code}}, code=code)
    except click.ClickException:
        raise  # click shows it, with the command's usage
    except Exception as error:
        code = USAGE if isinstance(error, ValueError) else FAILED
        if debug:
            traceback.print_exc()
        click.echo(f"error: {_sentence(error)}", err=True)
        return Answer({"error": {"kind": type(error).__name__, "message": str(error), "code": code}}, code=code)


def _sentence(error):
    """The error's own words; where they are not meant for people, its name and where to look."""
    meant = isinstance(error, (ValueError, OSError, ImportError, ArithmeticError)) or type(error).__module__.startswith("tnlib")
    if meant and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}. Nothing was meant to end so; --debug shows where it came from"


def needs(extra, packages):
    """Refuse a command whose packages are not installed. Raises: ImportError that says what to install"""
    lost = [name for name in packages if importlib.util.find_spec(name) is None]
    if lost:
        raise ImportError(
            f"this command needs {', '.join(lost)}, which {'is' if len(lost) == 1 else 'are'} not installed.\n"
            f"  Needed: the extra {extra!r}. Run: pip install 'tnlib[{extra}]'"
        )


def plain(value):
    """`value` as JSON data: records become dictionaries, paths text, numbers that are not finite null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.repr}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def device_of(named):
    """The device that an option names; by default the GPU where there is one."""
    import torch

    return named or ("cuda" if torch.cuda.is_available() else "cpu")


def say(line):
    """A line of progress, on standard error."""
    click.echo(line, err=True)


@contextlib.contextmanager
def bars_as_lines():
    """Progress bars as they are on a terminal; elsewhere one plain line each now and then, and one at the end."""
    if sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(Lines(sys.stderr)):
        yield


class Lines:
    """Standard error for a log: what a bar would write over itself is written every SAY_EVERY seconds, without the bar."""

    def __init__(self, to):
        self.to, self.said, self.bar, self.last = to, time.monotonic(), False, None

    def write(self, text):
        """Write text; of a bar's refreshes, which begin with a carriage return, only those that are due."""
        if not text.startswith("\r"):
            ends, self.bar = self.bar and text == "\n", False  # a bar's own end of line
            return 0 if ends or not text else self.to.write(text)
        self.bar = True
        line, over = re.sub(r"\|.*?\| ?", " ", text.strip("\r\n ")), re.search(r"\b(\d+)/\1\b", text)
        short = line.partition("[")[0]  # without its times: a bar at its end is drawn twice
        if line and short != self.last and (over or time.monotonic() - self.said > SAY_EVERY):
            self.said, self.last = time.monotonic(), short
            self.to.write(line + "\n")
        return len(text)

    def __getattr__(self, name):
        return getattr(self.to, name)
