"""What a model is worth: perplexity, next-word accuracy, divergence from its teacher; each estimate with its error bar.

The measures of what it costs are in cost.py and can be imported from here too.
"""

import itertools
import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from tnlib.compare import Comparison, compare
from tnlib.cost import flops_per_token, latency, peak_memory_mb, size
from tnlib.modes import eval_mode
from tnlib.windows import check_windows

__all__ = [
    "Comparison",
    "Divergence",
    "Perplexity",
    "compare",
    "flops_per_token",
    "kl_to_teacher",
    "latency",
    "logits",
    "peak_memory_mb",
]
__all__ += ["perplexity", "size"]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp(nll) on `tokens` predicted tokens; stderr is the standard error of `value` over windows.

    accuracy: share of the same tokens that are the arg max of their logits, with its standard error over windows
    losses: nats per token of each window. Two models are compared by the differences of theirs: what a window itself
        adds, the largest part of stderr, cancels
    accuracies: accuracy in each window, to be compared in the same way
    """

    value: float
    stderr: float
    nll: float  # nats per token
    accuracy: float
    accuracy_stderr: float
    tokens: int
    windows: int
    context: int
    stride: int
    losses: tuple = field(default=(), repr=False)
    accuracies: tuple = field(default=(), repr=False)

    def __str__(self):
        how = f"{self.tokens:,} tokens, context {self.context}, stride {self.stride}"
        return f"{self.value:.2f} ± {self.stderr:.2g} ({how})"


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Mean forward KL(teacher || student) in nats per token; agreement, the share of tokens with one arg max for both."""

    value: float
    stderr: float  # over windows
    agreement: float
    agreement_stderr: float
    tokens: int
    windows: int

    def __str__(self):
        return f"{self.value:.4g} ± {self.stderr:.2g} nats per token ({self.tokens:,} tokens)"


def perplexity(model, windows, context=None, stride=None, batch=4, max_windows=None, progress=False):
    """Perplexity of a causal language model, exp of the mean next-token NLL over all predicted tokens, and its accuracy on them.

    windows: (windows, context) int64 or int32, as from token_windows; or a stream (tokens,), which then needs `context`
    stride: tokens from one window to the next. None or context: disjoint windows, each predicting context - 1 tokens.
        Smaller: overlapping windows, each scoring only the tokens that no earlier one scored; the last may score fewer
    batch: windows a forward pass; memory is (batch, context, vocabulary) logits, upcast to float32 a window at a time
    Returns: Perplexity; stderr by the delta method with windows as clusters, tokens of a window not being independent
    Raises: ValueError for a stream shorter than one window, ids or context beyond the model's, or an NLL not finite
    Source: windows as in Hugging Face's guide "Perplexity of fixed-length models". On one window equal to exp(loss).
        Of equal logits the first is the arg max: a uniform model is right where the next token is 0.
    """
    stream, starts, first, context = _windows(windows, context, stride)
    starts, first = starts[:max_windows], first[:max_windows]
    check_windows("perplexity", model, stream, context)
    sums, hits = [], []
    with _evaluating(model):
        for some in _progress(torch.arange(len(starts)).split(batch), progress, "perplexity"):
            ids = stream[starts[some, None] + torch.arange(context)]  # (batch, context)
            for row, target, begin in zip(_logits(model, ids), ids, first[some].tolist()):
                scored = row[begin - 1 : -1].float()  # (context - begin, vocabulary)
                target = target[begin:].to(row.device).long()  # (context - begin,)
                sums.append(F.cross_entropy(scored, target, reduction="sum"))
                hits.append((scored.argmax(-1) == target).sum())
    sums, hits = _finite(sums, model, "perplexity"), torch.stack(hits).double().cpu()
    nll, stderr = _mean(sums, context - first)
    accuracy, accuracy_stderr = _mean(hits, context - first)
    value = math.exp(min(nll, 700.0))  # exp overflows at 710
    return Perplexity(
        value=value,
        stderr=value * stderr,
        nll=nll,
        accuracy=accuracy,
        accuracy_stderr=accuracy_stderr,
        tokens=int((context - first).sum()),
        windows=len(starts),
        context=context,
        stride=context if stride is None else stride,
        losses=tuple((sums / (context - first)).tolist()),
        accuracies=tuple((hits / (context - first)).tolist()),
    )


def logits(model, windows, batch=2):
    """What the model says of the next token at every position of a text, (windows, context, vocabulary), in the model's dtype.

    windows: (windows, context) int64 or int32. All of it stays on the model's device: 4 bytes x vocabulary a token in float32
    Raises: ValueError for ids or context beyond the model's
    Exact: kl_to_teacher against these equals kl_to_teacher against the model.
    """
    check_windows("logits", model, windows)
    with _evaluating(model):
        return torch.cat([_logits(model, ids) for ids in windows.split(batch)])


def kl_to_teacher(student, teacher, windows, batch=2, max_windows=None, progress=False):
    """Mean KL(teacher || student) of the next-token distributions, and how often their arg max is one, over every position.

    teacher: a model; or its `logits` on the same windows, which spares its runs where many students are judged
    windows: (windows, context) int64 or int32
    Returns: Divergence in nats per token, stderr over windows
    Raises: ValueError if the vocabularies differ, ids or context are beyond the models', or a KL is not finite
    Source: Hinton et al. 2015, at temperature 1; agreement as in Stanton et al. 2021. Of a model with itself: 0 and 1.
    """
    windows = windows[:max_windows]
    check_windows("kl_to_teacher, student", student, windows)
    parts = windows.split(batch)
    if isinstance(teacher, torch.Tensor):
        said = _said_of(windows, teacher[:max_windows]).split(batch)
    else:
        check_windows("kl_to_teacher, teacher", teacher, windows)
        said = (_logits(teacher, ids) for ids in parts)  # asked when it is its turn
    sums, hits = [], []
    with _evaluating(student), _evaluating(teacher):
        for ids, theirs in zip(_progress(parts, progress, "KL to teacher"), said):
            ours = _logits(student, ids)  # (batch, context, vocabulary), as theirs
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"kl_to_teacher: student logits {tuple(ours.shape)}, teacher logits {tuple(theirs.shape)} (batch, "
                    "context, vocabulary); needed one vocabulary. Take the teacher the student was made from"
                )
            for row, wanted in zip(ours, theirs):
                hits.append((row.argmax(-1) == wanted.to(row.device).argmax(-1)).sum())
                wanted = wanted.to(row.device).float().log_softmax(-1)
                sums.append(F.kl_div(row.float().log_softmax(-1), wanted, reduction="sum", log_target=True))
    counts = torch.full((len(windows),), windows.shape[1])
    value, stderr = _mean(_finite(sums, student, "kl_to_teacher"), counts)
    agreement, agreement_stderr = _mean(torch.stack(hits).double().cpu(), counts)
    return Divergence(
        value=value,
        stderr=stderr,
        agreement=agreement,
        agreement_stderr=agreement_stderr,
        tokens=windows.numel(),
        windows=len(windows),
    )


def _windows(windows, context, stride):
    """The token stream, where each window starts (windows,), its first scored position (windows,), and the context."""
    if windows.dim() == 2:
        context = windows.shape[1] if context is None else context
    stride = context if stride is None else stride
    if context is None or not 1 <= stride <= context or context < 2:
        raise ValueError(
            f"perplexity: tokens {tuple(windows.shape)}, context {context}, stride {stride}; needed context >= 2 (a "
            "stream must be given one) and 1 <= stride <= context"
        )
    stream = windows.flatten().cpu()
    if len(stream) < context:
        raise ValueError(
            f"perplexity: {len(stream)} tokens are less than one window of context {context}; needed at least one. "
            "Give a longer text or a smaller context"
        )
    last = len(stream) - context
    starts = torch.arange(0, last + 1, stride)
    if stride < context and starts[-1] < last:  # one more window, so that the tail is scored too
        starts = torch.cat([starts, torch.tensor([last])])
    # A window scores what lies behind the end of the one before it; position 0 can never be predicted.
    first = (context - starts.diff(prepend=starts[:1] - context)).clamp(min=1)
    return stream, starts, first, context


def _finite(sums, model, where):
    """Sums over windows in float64, or an error that names the first bad window and the parameters to suspect."""
    sums = torch.stack(sums).double().cpu()
    bad = (~sums.isfinite()).nonzero().flatten().tolist()
    if bad:
        suspects = [name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
        cause = f"not finite: parameter {suspects[0]}" if suspects else "parameters are finite: an overflow on the way"
        raise ValueError(
            f"{where}: window {bad[0]} of {len(sums)} gave {sums[bad[0]].item()} ({cause}); needed finite logits. "
            "Repair the weights, or evaluate in float32"
        )
    return sums


def _mean(sums, counts):
    """Mean per token and its standard error, windows as clusters of unequal size: a ratio estimator."""
    mean, windows = (sums.sum() / counts.sum()).item(), len(sums)
    spread = (sums - mean * counts).square().sum().item()
    stderr = math.sqrt(spread * windows / (windows - 1)) / counts.sum().item() if windows > 1 else math.nan
    return mean, stderr


def _said_of(windows, said):
    """A teacher's logits, if they can be of these windows."""
    if said.dim() != 3 or said.shape[:2] != windows.shape:
        raise ValueError(
            f"kl_to_teacher: teacher logits {tuple(said.shape)}, windows {tuple(windows.shape)}; needed (windows, context, "
            "vocabulary) of the same windows. Call logits(teacher, windows)"
        )
    return said


def _logits(model, ids):
    """(batch, context, vocabulary) in the model's own dtype."""
    out = model(ids.to(_device(model)))
    return getattr(out, "logits", out)


def _device(model):
    return next((t.device for t in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))


def _progress(steps, shown, what):
    from tqdm.auto import tqdm

    return tqdm(steps, desc=what, disable=not shown)


@contextmanager
def _evaluating(model):
    """Eval mode without gradients; logits are in no mode."""
    with nullcontext() if isinstance(model, torch.Tensor) else eval_mode(model), torch.inference_mode():
        yield
