"""Makes transformers know the checkpoints of tnlib, in whichever order the two are imported.

transformers finds a quantizer by name in a registry, and has no entry points: somebody must import tnlib. But `import
tnlib` must not import transformers, which takes seconds. So it waits: the moment that transformers' registry is imported,
tnlib.checkpoint is too, and registers itself; if it is there already, at once.
"""

import importlib
import sys
from importlib.machinery import PathFinder

REGISTRY, OURS = "transformers.quantizers.auto", "tnlib.checkpoint"


class _Finder:
    """Finds one module as Python would, and has OURS imported behind it."""

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == REGISTRY else None
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader:
    """A loader that imports OURS when its module is complete."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        importlib.import_module(OURS)


def register():
    """Called by `import tnlib`."""
    if REGISTRY in sys.modules:
        importlib.import_module(OURS)
    else:
        sys.meta_path.insert(0, _Finder())
