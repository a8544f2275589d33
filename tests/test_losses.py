"""Each loss against an independent formula, its exact properties, and its behavior under counts and masks."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tnlib import losses

B, T, V, D = 3, 7, 11, 5


def pair(*shape, scale=2.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def categorical(logits, temperature=1.0):
    return torch.distributions.Categorical(logits=logits / temperature)


def test_next_token_is_the_cross_entropy_of_shifted_logits():
    logits, labels = pair(B, T, V)[0], torch.randint(0, V, (B, T))
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(losses.next_token(logits, labels), wanted, atol=1e-12)
    ignored = labels.clone()
    ignored[0, 3:] = losses.IGNORE
    rows = torch.cat([logits[0, :2], logits[1:, :-1].flatten(0, 1)])
    targets = torch.cat([labels[0, 1:3], labels[1:, 1:].flatten()])
    assert torch.allclose(losses.next_token(logits, ignored), F.cross_entropy(rows, targets), atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_logits_kl_against_torch_distributions(temperature, reverse):
    student, teacher = pair(B, T, V)
    ours, theirs = categorical(student, temperature), categorical(teacher, temperature)
    kl = torch.distributions.kl_divergence(*((ours, theirs) if reverse else (theirs, ours)))
    found = losses.logits_kl(student, teacher, temperature=temperature, reverse=reverse)
    assert torch.allclose(found, temperature**2 * kl.mean(), atol=1e-12)
    assert float(losses.logits_kl(teacher, teacher, temperature=temperature, reverse=reverse)) == 0.0


def test_gradient_of_the_forward_kl_is_the_difference_of_probabilities():
    student, teacher = pair(B, T, V)
    student.requires_grad_()
    losses.logits_kl(student, teacher, count=1).backward()
    assert torch.allclose(student.grad, student.detach().softmax(-1) - teacher.softmax(-1), atol=1e-12)


@given(st.integers(1, V), st.floats(0.5, 4.0), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_top_logits_are_a_lower_bound_and_exact_when_all_are_kept(top, temperature, reverse, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(B, T, V, generator=generator, dtype=torch.float64) for _ in range(2))
    best = (teacher / temperature).log_softmax(-1).topk(top)
    options = {"temperature": temperature, "reverse": reverse}
    coarse = losses.logits_kl_top(student, best.values, best.indices, **options)
    full = losses.logits_kl(student, teacher, **options)
    assert coarse <= full + 1e-4  # a tail below 1e-7 is rounded up to that
    if top == V:
        assert torch.allclose(coarse, full, atol=1e-12)


def test_top_logits_are_exact_when_the_student_divides_the_tail_alike():
    student, teacher = pair(B, T, V)
    best = teacher.log_softmax(-1).topk(3)
    alike = teacher.log_softmax(-1).scatter(
        -1, best.indices, student.gather(-1, best.indices)
    )  # other heads, same tail
    found = losses.logits_kl_top(alike, best.values, best.indices)
    assert torch.allclose(found, losses.logits_kl(alike, teacher), atol=1e-10)


def test_hidden_losses():
    student, teacher = pair(B, T, D)
    assert torch.allclose(losses.mean_square(student, teacher), F.mse_loss(student, teacher), atol=1e-12)
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (student, teacher)]
    assert torch.allclose(losses.cosine(student, teacher), 1 - (unit[0] * unit[1]).sum(-1).mean(), atol=1e-12)
    assert float(losses.cosine(3 * teacher, teacher)) == pytest.approx(0, abs=1e-12)
    assert float(losses.cosine(-teacher, teacher)) == pytest.approx(2, abs=1e-12)


def test_attention_kl_is_a_mean_over_queries_not_over_keys():
    student, teacher = (x.softmax(-1) for x in pair(B, 2, T, T))
    kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(probs=p) for p in (teacher, student)))
    assert torch.allclose(losses.attention_kl(student, teacher), kl.mean(), atol=1e-10)  # (batch, heads, queries)
    causal = torch.tril(torch.ones(T, T, dtype=torch.float64))
    a, b = (p * causal / (p * causal).sum(-1, keepdim=True) for p in (student, teacher))
    assert torch.isfinite(losses.attention_kl(a, b))
    assert float(losses.attention_kl(b, b)) == 0.0


TERMS = {
    "logits_kl": (losses.logits_kl, (B, T, V)),
    "mean_square": (losses.mean_square, (B, T, D)),
    "cosine": (losses.cosine, (B, T, D)),
    "attention_kl": (lambda a, b, *rest: losses.attention_kl(a.softmax(-1), b.softmax(-1), *rest), (B, 2, T, T)),
}


@pytest.mark.parametrize("name", TERMS)
def test_parts_with_a_common_count_add_up_to_the_whole(name):
    loss, shape = TERMS[name]
    student, teacher = pair(*shape)
    parts = [loss(student[k : k + 1], teacher[k : k + 1], None, B * T) for k in range(B)]
    assert torch.allclose(sum(parts), loss(student, teacher), atol=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_masked_positions_do_not_count(name):
    loss, shape = TERMS[name]
    student, teacher = pair(*shape)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1:] = False
    assert torch.allclose(loss(student, teacher, mask), loss(student[:1], teacher[:1]), atol=1e-12)


def test_half_precision_is_summed_in_float32():
    student, teacher = (x.bfloat16() for x in pair(B, T, V))
    assert losses.logits_kl(student, teacher).dtype == torch.float32
    assert losses.mean_square(student, teacher).dtype == torch.float32
    assert losses.next_token(student, torch.zeros(B, T, dtype=torch.long)).dtype == torch.float32
