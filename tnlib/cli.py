"""The command `tnlib`. Each command's body is in the cli_ file that its name leads to; --help imports none of them.

    tnlib plan gpt2 --recipe krony-81m
"""

import importlib
import os
import signal
import sys

import click

import tnlib
from tnlib.console import DONE, FAILED, STOPPED

COMMANDS = {  # name: (module that holds the command, its line in --help)
    "recipes": ("cli_look", "The papers' recipes, or one of them in full."),
    "plan": ("cli_look", "What a recipe will do to a model; no weights are read."),
    "assets": ("cli_look", "Models and texts that come from the package registry."),
    "compress": ("cli_make", "Factorize a checkpoint into a folder."),
    "heal": ("cli_make", "Train a compressed model back."),
    "eval": ("cli_judge", "Perplexity, size and benchmarks of a model."),
    "bench": ("cli_judge", "Speed of a model beside its dense one's."),
    "run": ("cli_run", "Run the notebooks."),
    "sweep": ("cli_sweep", "Run a notebook over a grid of parameters."),
}


class Lazy(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx):
        """Names in the order of work."""
        return list(COMMANDS)

    def get_command(self, ctx, name):
        """The command; None for a name that there is not."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"tnlib.{COMMANDS[name][0]}")
        return getattr(module, "evaluate" if name == "eval" else name)

    def format_commands(self, ctx, formatter):
        """The list in --help, from COMMANDS alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group("tnlib", cls=Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(tnlib.__version__, prog_name="tnlib")
def group():
    """Kronecker, tensor-train and MPO compression of transformers.

    MODEL is a folder, an asset (tnlib assets) or a hub name; RECIPE is a name (tnlib recipes) or a JSON file. Exit codes: 0 done,
    1 failed in whole or in part, 2 asked for what is not there or does not fit, 130 stopped by Ctrl-C.
    """


def main(argv=None):
    """Run a command line; returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: stop the children, leave the page in order
    try:
        return group.main(argv, prog_name="tnlib", standalone_mode=False) or DONE
    except SystemExit as ended:
        return ended.code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return STOPPED
    except BrokenPipeError:  # the reader, `head` say, has enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  Python flushes it once more
        return FAILED
