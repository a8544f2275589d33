"""What a layer in evaluation keeps from one call to the next: matrices in the layout of a plan, or the whole weight."""

POLICIES = ("auto", "never", "always")


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
        self.ready = {}  # by (tokens, dtype): the chain, and what goes straight through it or None, for calls in evaluation

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
                self._built, self._sizes, self.ready = {}, {}, {}
            found = self._built[name] = build()
            self._sizes[name] = numbers
        return found

    def current(self, sources):
        """Whether what is kept was built from these tensors as they are now."""
        return self._stamp == _stamp(sources)

    def __deepcopy__(self, memo):
        return Kept()

    def __reduce__(self):
        return (Kept, ())


def _stamp(sources):
    return [(id(source), source._version, source.data_ptr()) for source in sources]
