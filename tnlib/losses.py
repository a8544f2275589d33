"""What a student is trained on: each loss a pure function of tensors, a sum over positions divided by a given count.

The count is that of all micro-batches of an optimizer step, on all processes, so that accumulating gradients and
distributing batches leave loss and gradient as they are. Without a count each function is a mean over its own positions.
"""

import torch
import torch.nn.functional as F

IGNORE = -100  # label of a position that predicts nothing


def next_token(logits, labels, count=None):
    """Cross entropy of each token given those before it, nats.

    logits: (batch, context, vocabulary); labels: (batch, context), IGNORE where nothing is predicted; the first never is
    count: divisor; None: the number of predicted tokens
    Source: Radford et al. 2019. Exact: equals F.cross_entropy of logits[:, :-1] against labels[:, 1:].
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # shifting the labels spares a copy of the logits
    count = (targets != IGNORE).sum() if count is None else count
    flat = _wide(logits.flatten(0, -2))  # (batch*context, vocabulary)
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE, reduction="sum") / count


def logits_kl(student, teacher, mask=None, count=None, temperature=1.0, reverse=False):
    """KL divergence of next-token distributions at a temperature T, times T squared, nats.

    student, teacher: logits (batch, context, vocabulary); mask: (batch, context) bool, positions that count; None: all
    reverse: False: KL(teacher || student), which covers all that the teacher says; True: KL(student || teacher), which
        avoids what the teacher would not say
    Source: Hinton et al. 2015 (T squared keeps the gradient's size); reverse: Gu et al. 2024.
    Exact: zero for equal logits; at T = 1 the forward gradient in the logits is softmax(student) - softmax(teacher).
    """
    ours = (_wide(student) / temperature).log_softmax(-1)
    theirs = (_wide(teacher) / temperature).log_softmax(-1)
    given, taken = (theirs, ours) if reverse else (ours, theirs)
    each = F.kl_div(given, taken, reduction="none", log_target=True).sum(-1)  # (batch, context)
    return temperature**2 * _sum(each, mask) / _count(each, mask, count)


def logits_kl_top(student, values, indices, mask=None, count=None, temperature=1.0, reverse=False):
    """logits_kl against a teacher of whom only the `top` largest probabilities are known.

    student: logits (batch, context, vocabulary)
    values, indices: (batch, context, top), the teacher's log-probabilities at this very temperature, and their tokens
    All other tokens are one bucket, for both models: the divergence of the two coarser distributions, a lower bound of
    the full one, equal to it where the student divides its tail as the teacher does.
    Exact: never above logits_kl, and equal to it when top is the vocabulary.
    """
    ours = (_wide(student) / temperature).log_softmax(-1).gather(-1, indices)  # (batch, context, top)
    theirs = _wide(values)
    if values.shape[-1] < student.shape[-1]:
        ours, theirs = _with_tail(ours), _with_tail(theirs)  # (batch, context, top + 1)
    given, taken = (theirs, ours) if reverse else (ours, theirs)
    each = F.kl_div(given, taken, reduction="none", log_target=True).sum(-1)  # (batch, context)
    return temperature**2 * _sum(each, mask) / _count(each, mask, count)


def _with_tail(log_probabilities):
    """Append log(1 - sum of the given probabilities): (…, top) -> (…, top + 1)."""
    tail = (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp_min(1e-7).log()  # 1e-7: rounding of the sum
    return torch.cat([log_probabilities, tail], dim=-1)


def mean_square(student, teacher, mask=None, count=None):
    """Squared distance of two activations, a mean over features: (batch, context, width) each.

    Exact: equals F.mse_loss without mask and count.
    """
    each = (_wide(student) - _wide(teacher)).square().mean(-1)  # (batch, context)
    return _sum(each, mask) / _count(each, mask, count)


def cosine(student, teacher, mask=None, count=None):
    """1 - cosine similarity of two activations (batch, context, width). Exact: 0 for positive multiples of each other."""
    each = 1 - F.cosine_similarity(_wide(student), _wide(teacher), dim=-1)  # (batch, context)
    return _sum(each, mask) / _count(each, mask, count)


def attention_kl(student, teacher, mask=None, count=None):
    """KL(teacher || student) of attention maps: a sum over keys, a mean over heads and queries.

    student, teacher: probabilities (batch, heads, queries, keys)
    Source: Yang et al. 2023, section 3; their code averages over keys too, which makes the term vanish.
    Exact: zero for equal maps.
    """
    taken = _wide(teacher)
    gap = taken.clamp_min(1e-12).log() - _wide(student).clamp_min(1e-12).log()  # masked keys: both 0, no contribution
    each = (taken * gap).sum(-1).mean(1)  # (batch, queries); keys summed, heads averaged
    return _sum(each, mask) / _count(each, mask, count)


def _wide(x):
    """At least float32: half precision is not summed in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _sum(each, mask):
    return each.sum() if mask is None else (each * mask).sum()


def _count(each, mask, count):
    if count is not None:
        return count
    return each.numel() if mask is None else mask.sum()
