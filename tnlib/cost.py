"""What a model costs: parameters, bytes, FLOPs, time and memory, every convention stated in the record."""

import statistics
import sys
import time
from dataclasses import dataclass

import torch

_POSITIONS = {"wpe", "embed_positions", "position_embeddings"}  # GPT-2; OPT and BART; BERT


@dataclass(frozen=True, kw_only=True)
class Size:
    """Parameters, a tied one counted once; `embedding`, `positions` and `head` are parts of `parameters`."""

    parameters: int  # quantized numbers too, however few bits they take
    embedding: int  # of tokens
    positions: int
    head: int  # 0 if tied or absent
    head_tied: bool | None  # None: the model has no output head
    bytes_by_dtype: dict[str, int]  # parameters and buffers, as held in memory

    @property
    def bytes(self):
        return sum(self.bytes_by_dtype.values())

    def __str__(self):
        head = {None: "no output head", True: "head tied, counted once", False: f"head {self.head / 1e6:.2f}M"}
        parts = f"token embedding {self.embedding / 1e6:.2f}M, positions {self.positions / 1e6:.2f}M"
        memory = ", ".join(f"{dtype} {size / 1e6:.1f}" for dtype, size in self.bytes_by_dtype.items())
        total = f"{self.parameters / 1e6:.2f}M parameters with positions"
        return f"{total} ({parts}, {head[self.head_tied]}); {self.bytes / 1e6:.1f} MB in memory ({memory})"


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Forward FLOPs per token, a multiply-add being 2; the two terms are apart because only one can be compressed."""

    weights: float  # matrix products with weights
    attention: float  # scores and values over the full context, no half for the causal mask
    uncounted: tuple[str, ...]  # modules with a matrix of their own that is none of the kinds counted

    def __str__(self):
        rest = f"; not counted: {', '.join(self.uncounted)}" if self.uncounted else ""
        return f"{self.weights / 1e6:.2f} MFLOPs per token in weights + {self.attention / 1e6:.2f} in attention{rest}"


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median and quartiles of wall-clock times."""

    median_ms: float
    low_ms: float  # 25 %
    high_ms: float  # 75 %
    repeats: int

    @classmethod
    def of(cls, times):
        """Of two or more times in ms."""
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median_ms=median, low_ms=low, high_ms=high, repeats=len(times))

    def __str__(self):
        return f"{self.median_ms:.3g} ms ({self.low_ms:.3g} to {self.high_ms:.3g}, {self.repeats} runs)"


def size(model):
    """Parameters and bytes of a model, with every convention in the record.

    model: a Hugging Face model, or any module (which then has neither embedding nor head)
    Returns: Size. Positions are found by module name (wpe, embed_positions, position_embeddings)
    Source: torch's parameters(), which names a shared tensor once, and the Packed ones; parameters is the sum over them.
    """
    inside, outside = (getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output"))
    embedding, head = (_named_numbers(part) if part is not None else {} for part in (inside, outside))
    named = _named_numbers(model)
    positions = sum(count for name, count in named.values() if _POSITIONS & set(name.split(".")))
    own = {key: found for key, found in head.items() if key not in embedding}
    held = {}
    for tensor in (*model.parameters(), *model.buffers()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        held[dtype] = held.get(dtype, 0) + tensor.numel() * tensor.element_size()
    return Size(
        parameters=sum(count for _, count in named.values()),
        embedding=sum(count for _, count in embedding.values()),
        positions=positions,
        head=sum(count for _, count in own.values()),
        head_tied=None if outside is None else len(own) < len(head),
        bytes_by_dtype=held,
    )


def _named_numbers(module):
    """Name and how many numbers, for each parameter and each Packed tensor (packing.py), by identity."""
    packed = ((name, part) for name, part in module.named_modules() if hasattr(part, "quantized_elements"))
    return {id(part): (name, part.quantized_elements) for name, part in packed} | {
        id(parameter): (name, parameter.numel()) for name, parameter in module.named_parameters()
    }


def flops_per_token(model, context):
    """Forward FLOPs per token at a given context length.

    context: tokens in the sequence, for attention and for modules whose cost depends on how many tokens share it
    Returns: Flops. A module with a method flops(tokens) is asked; Linear and Conv1D cost 2 per weight; lookups, biases,
        norms and activations cost 0; every module counts as run on every token, pooler and classifier too
    Source: 2 N and 4 L H Q T per token, Chowdhery et al. 2022 (PaLM) appendix B. Equal to torch's FlopCounterMode.
    """
    weights, uncounted, done = 0.0, [], ()
    for name, module in model.named_modules():
        if name.startswith(done):  # part of a module that is accounted for
            continue
        if callable(getattr(module, "flops", None)):
            weights += module.flops(context) / context
        elif isinstance(module, torch.nn.Linear) or any(kind.__name__ == "Conv1D" for kind in type(module).__mro__):
            weights += 2 * module.weight.numel()
        elif not isinstance(module, torch.nn.Embedding):
            grids = len(getattr(module, "parametrizations", ()))  # its factors are seen through
            if grids or any(p.dim() > 1 for p in module.parameters(recurse=False)):
                uncounted.append(name)
            if not grids:
                continue
        done += (f"{name}." if name else "",)
    attention, config = 0.0, getattr(model, "config", None)
    if (heads := getattr(config, "num_attention_heads", None)) is not None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        attention = 4.0 * config.num_hidden_layers * heads * head_dim * context
    return Flops(weights=float(weights), attention=attention, uncounted=tuple(uncounted))


def latency(fn, repeats=20, warmup=3):
    """Wall-clock time of fn(), the accelerator waited for before and after each run.

    Returns: Latency in ms
    Raises: ValueError if repeats < 2
    Source: time.perf_counter. fn runs warmup + repeats times; low_ms <= median_ms <= high_ms.
    """
    if repeats < 2:
        raise ValueError(f"latency: repeats {repeats}; needed at least 2 for quartiles")
    return Latency.of([elapsed_ms(fn) for _ in range(warmup + repeats)][warmup:])


def elapsed_ms(fn):
    """Wall-clock time of one fn() in ms, the accelerator waited for before and after."""
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    fn()
    wait()
    return 1e3 * (time.perf_counter() - start)


def peak_memory_mb():
    """Peak memory in MB: of CUDA since torch.cuda.reset_peak_memory_stats, else of the process since it started."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource  # not on Windows
    except ImportError:
        import psutil  # a dependency of accelerate

        return psutil.Process().memory_info().peak_wset / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
