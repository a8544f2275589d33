"""A model run one block at a time: the hidden states between blocks are held, and nothing else of the model's work.

The model's own forward pass prepares what each block is called with (positions, masks); the blocks before the one that is
wanted are covered and do nothing, and the pass stops behind it. So a text costs one run of each block, and the memory is one
hidden state a token, however large the model.
"""

from contextlib import suppress
from functools import partial

import torch

from tnlib.depth import block_stack
from tnlib.modes import covered, eval_mode
from tnlib.moments import runner

CACHES = ("past_key_values", "past_key_value", "layer_past")


class Walk:
    """The hidden states of a text on their way through the blocks of a model.

    model: with one stack of equal blocks, in any mode; it runs in eval mode without gradients
    windows: (windows, context) int64 or int32; batch: windows a forward pass; tracks: how many hidden states are held for each
        token, e.g. one of the dense model and one of the compressed one; where: the caller, for its errors
    Raises: ShapeError for a model without one such stack
    Exact: after all blocks the states are those of the model's own forward pass.
    """

    def __init__(self, model, windows, batch=4, tracks=1, where="calibrate"):
        self.model, (self.stack, self.blocks) = model, block_stack(model, where)
        self.ids, self.tracks = windows.split(batch), tracks
        self.states = [[None] * tracks for _ in self.ids]  # (batch, context, width) each; None before the first block
        self.tuples = {}  # what a block returns behind its hidden state, by block

    def through(self, number, visit, names=()):
        """Bring every batch to block `number` and call visit(at, run): run(track, block) gives the new state of that track.

        Blocks are visited in order. `run` may be called any number of times, with any block of the same interface; what the
        states become is said by `keep`. number: len(blocks) for a pass in which no block is run; visit is then not called
        names: modules outside the blocks that must be run, such as the head
        """
        for at, ids in enumerate(self.ids):
            with covered(self._covers(at, number, visit)), eval_mode(self.model), torch.no_grad():
                self._call(ids, names)

    def keep(self, at, track, state):
        """The state of a batch behind the present block."""
        self.states[at][track] = state

    def _call(self, ids, names):
        device = next(self.model.parameters()).device
        device = ids.device if device.type == "meta" else device  # offloaded: hooks bring inputs to where weights are
        with suppress(_Arrived):
            runner(self.model, names, cache=False)(ids.to(device))

    def _covers(self, at, number, visit):
        """Blocks before `number` give back what stands for them, block `number` calls `visit` and ends the pass."""
        covers = [(block, partial(self._pass, at, k)) for k, block in enumerate(self.blocks[:number])]
        if number < len(self.blocks):
            block = self.blocks[number]
            own = block.__dict__.get("forward", block.forward)
            covers.append((block, partial(self._arrive, at, number, own, visit)))
        return covers

    def _pass(self, at, number, *args, **kwargs):
        """In place of a block that is behind us: nothing is computed."""
        last = number == len(self.blocks) - 1
        state = self.states[at][-1] if last else _given(args, kwargs)
        rest = self.tuples[number]
        return state if rest is None else (state, *rest)

    def _arrive(self, at, number, own, visit, *args, **kwargs):
        """In place of the block that is wanted: lets `visit` run it, and ends the pass."""
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHES}
        visit(at, partial(self._run, at, number, own, args, kwargs))
        raise _Arrived

    def _run(self, at, number, own, args, kwargs, track=0, other=None):
        """The new state of a track, by the block itself or by `other`."""
        call = own if other is None or other is self.blocks[number] else other  # the block itself is covered
        state = self.states[at][track]
        state = _given(args, kwargs) if state is None else state
        found = call(state, *args[1:], **kwargs) if args else call(**kwargs | {"hidden_states": state})
        self.tuples[number] = None if isinstance(found, torch.Tensor) else (None,) * (len(found) - 1)
        return found if isinstance(found, torch.Tensor) else found[0]


def _given(args, kwargs):
    return args[0] if args else kwargs["hidden_states"]


class _Arrived(Exception):
    """The block that was wanted is done: the rest of the forward pass is not needed."""
