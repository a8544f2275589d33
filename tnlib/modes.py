"""Run a model in eval mode, or with other functions in place of some modules, and leave it as it was."""

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


@contextmanager
def covered(covers):
    """(module, function) pairs: the modules are called as these functions; afterwards each has its own `forward` again.

    What accelerate's hooks put in a module's `forward` is covered and comes back, too.
    """
    before = [(module, module.__dict__.get("forward")) for module, _ in covers]
    try:
        for module, function in covers:
            module.forward = function
        yield
    finally:
        for module, forward in before:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward
