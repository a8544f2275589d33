"""What a layer in evaluation keeps from one call to the next: matrices in the layout of a plan, or the whole weight."""

from torch import is_autocast_enabled, is_grad_enabled

POLICIES = ("auto", "never", "always")
SHAPES = 8  # of x, for which calls are ready: a prompt's, and those of decoding


class Kept:
    """Results of building, by name, valid as long as the tensors that they were built from are the same and unchanged.

    Copies and pickles of a layer start without them.
    """

    def __init__(self):
        self.plans = {}  # chosen for so many tokens, by what the choice depends on
        self.clear()

    def clear(self):
        """Forget what was built."""
        self._built, self._sizes, self._sources, self._stamp = {}, {}, (), None
        self.again = {}  # Again by shape of x

    @property
    def numbers(self):
        """Numbers kept, of factors themselves not counted."""
        return sum(self._sizes.values())

    def fetch(self, name, sources, numbers, room, build):
        """build(), kept under `name`.

        sources: the tensors that build() reads; held, so that no other can take their place in memory
        numbers: how many build() makes; room: how many may be kept in all. What was kept before makes room
        """
        if not self.current(sources):
            self.clear()
            self._sources, self._stamp = tuple(sources), _stamp(sources)
        found = self._built.get(name)
        if found is None:
            if self.numbers + numbers > room:
                self._built, self._sizes, self.again = {}, {}, {}
            found = self._built[name] = build()
            self._sizes[name] = numbers
        return found

    def repeat(self, x, sources, through):
        """Have an Again ready for calls of this shape."""
        if len(self.again) >= SHAPES:
            self.again = {}
        self.again[x.shape] = Again(x, sources, through)

    def current(self, sources):
        """Whether what is kept was built from these tensors as they are now."""
        return self._stamp == _stamp(sources)

    def __deepcopy__(self, memo):
        return Kept()

    def __reduce__(self):
        return (Kept, ())


class Again:
    """A call without gradients, ready to be done again: for x of the same shape, as long as nothing it depends on has changed.

    A small layer's time is what Python does, and beside a large one Python is slow: its objects have left the caches. So a call
    that repeats an earlier one asks no more than this.
    """

    def __init__(self, x, sources, through):
        """through: (x, bias) -> y; sources: all else that it depends on, by name"""
        self.dtype, self.device, self.through = x.dtype, x.device.type, through
        self.sources = [(name, tensor, tensor._version, tensor.data_ptr()) for name, tensor in sources.items()]

    def fits(self, x, parameters, buffers):
        """Whether `through` gives what a call with x of the same shape would; parameters, buffers: the layer's own."""
        if x.dtype is not self.dtype or is_grad_enabled() or is_autocast_enabled(self.device):
            return False
        for name, tensor, version, place in self.sources:
            now = parameters.get(name) if name in parameters else buffers.get(name)
            if now is not tensor or tensor._version != version or tensor.data_ptr() != place:
                return False
        return True


def _stamp(sources):
    return [(id(source), source._version, source.data_ptr()) for source in sources]
