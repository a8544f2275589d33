"""Run a model in eval mode and leave it as it was."""

from contextlib import contextmanager


@contextmanager
def eval_mode(model):
    """Eval mode; afterwards each submodule is in the mode it was in, a frozen one included. Gradients are the caller's affair."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
