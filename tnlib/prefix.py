"""A causal language model run again from a block on: the blocks before it give back what they gave the first time.

A matrix of block b changes nothing before block b, so a profile over all matrices runs half of the blocks on average.
"""

from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch

from tnlib.depth import block_stack
from tnlib.modes import covered, eval_mode
from tnlib.shapes import ShapeError
from tnlib.windows import check_windows

PIECE = 2**18  # logits scored at a time: 1 MB of float32 stays in a core's cache, which halves the time


class Scores(NamedTuple):
    """What the model makes of each window, float64 on the CPU; both as in evaluate.py."""

    loss: torch.Tensor  # (windows,) nats per predicted token
    kl: torch.Tensor  # (windows,) nats per token, every position, from the dense model


class Prefix:
    """The outputs of all blocks of a model on some windows, and its log-probabilities, held for later runs.

    model: with one stack of equal blocks and a language-model head, in any mode; it runs in eval mode without gradients
    windows: (windows, context) int64 or int32; batch: windows a forward pass
    Memory: windows * context * (blocks * width + vocabulary) numbers; at 1,024 tokens of SmolLM2-135M 0.27 GB
    Raises: ShapeError for a model that is no causal language model or has no such stack; ValueError for ids and contexts
        that it cannot read and for logits that are not finite
    Exact: scores_from(b) equals a run of all blocks as long as the blocks before b are as they were.
    """

    def __init__(self, model, windows, batch=4):
        self.model, self.blocks = model, block_stack(model, "sensitivity")[1]
        if not getattr(model, "can_generate", lambda: False)():
            raise ShapeError(
                f"sensitivity: got {type(model).__name__}; needed a causal language model with its head, whose loss is that of "
                "the next token. Load it with task='causal-lm'."
            )
        check_windows("sensitivity", model, windows)
        self.ids = windows.to(next(model.parameters()).device).long().split(batch)
        self.outputs, self.at = [[] for _ in self.blocks], 0
        self.log_probs = []  # one (context, vocabulary) a window
        losses = self._first_run()
        self.losses = _finite(torch.stack(losses).double().cpu())  # (windows,), of the dense model

    def scores_from(self, block):
        """Scores of the model as it is now, run from `block` on. Raises: ValueError for logits that are not finite."""
        found = []
        with self._played_back(block), self._evaluating():
            for number, ids in enumerate(self.ids):
                self.at = number
                for logits, target in zip(self._logits(ids), ids):
                    found.append(score_window(logits, target, self.log_probs[len(found)]))
        return Scores(*(_finite(torch.stack(some).double().cpu()) for some in zip(*found)))

    def _first_run(self):
        losses = []
        with ExitStack() as hooks, self._evaluating():
            for block, kept in zip(self.blocks, self.outputs):
                handle = block.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
                hooks.callback(handle.remove)
            for ids in self.ids:
                for logits, target in zip(self._logits(ids), ids):
                    self.log_probs.append(_wide(logits).log_softmax(-1))
                    losses.append(score_window(logits, target, self.log_probs[-1])[0])
        return losses

    def _logits(self, ids):
        return self.model(ids, use_cache=False).logits  # (batch, context, vocabulary)

    @contextmanager
    def _evaluating(self):
        with eval_mode(self.model), torch.inference_mode():
            yield

    def _played_back(self, block):
        """The blocks before `block` answer with their first output."""
        earlier = zip(self.blocks[:block], self.outputs)
        return covered([(module, lambda *args, kept=kept, **kwargs: kept[self.at]) for module, kept in earlier])


def score_window(logits, ids, log_probs):
    """Loss of one window and its KL from the distributions `log_probs`: two numbers, nats per token.

    logits, log_probs: (context, vocabulary), at least float32 in effect; ids: (context,)
    Exact: KL is zero where log_probs = log_softmax(logits), to rounding of each difference and not of the logits.
    """
    size = max(1, PIECE // logits.shape[-1])
    loss = divergence = 0.0
    following = ids.roll(-1)  # (context,); what follows the last token is not known: it is taken out below
    for z, p, target in zip(logits.split(size), log_probs.split(size), following.split(size)):
        q = _wide(z).log_softmax(-1)  # (piece, vocabulary)
        last = -q.gather(-1, target[:, None]).double()  # (piece, 1)
        loss = loss + last.sum()
        divergence = divergence - torch.linalg.vecdot(p.exp(), q.sub_(p)).double().sum()
    return (loss - last[-1, 0]) / (len(ids) - 1), divergence / len(ids)


def _wide(logits):
    return logits if logits.dtype == torch.float64 else logits.float()


def _finite(values):
    if not bool(values.isfinite().all()):
        first = int((~values.isfinite()).nonzero()[0])
        raise ValueError(
            f"sensitivity: window {first} of {len(values)} gave {float(values[first])}; needed finite logits. Repair the weights, "
            "or load the model in float32."
        )
    return values
