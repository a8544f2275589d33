"""Progress bars of transformers, where somebody sees them."""

import sys
from contextlib import contextmanager


@contextmanager
def bars_on_terminals():
    """Outside a terminal the bars of loading and saving are only noise: switch them off meanwhile."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
