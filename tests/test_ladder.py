"""The ladder of design: a module imports only from rungs below it. Read from the source, so that late imports count too."""

import ast
from pathlib import Path

import pytest

import tnlib

ROOT = Path(tnlib.__file__).parent
RUNGS = [
    ["shapes", "links", "kept", "triton_programs", "families", "records", "wheel", "cost", "losses", "treatment", "modes", "windows", "quant", "compare", "prose", "ties", "metric", "claims", "effects", "registration", "experts", "bars"],
    ["spectrum", "one_token", "figures", "assets", "evaluate", "history", "resume", "examples", "assign", "depth", "moments", "gradients", "packing", "between", "generate", "speed", "hub", "harness", "readings_trains", "forest", "slots"],
    ["contract", "chain", "readings"],
    ["lookup", "machine", "assemble", "evidence"],
    ["choose"],
    ["applied"],
    ["form", "explain", "data", "teacher", "encode", "score", "checkpoint_files"],
    ["van_loan", "sweeps", "token_file", "tasks", "predict", "rouge", "summaries"],
    ["arrange"],
    ["permute"],
    ["low_rank", "block_low_rank", "kronecker", "tensor_train"],
    ["tt_matrix", "weighted_kronecker"],
    ["weighted_train", "weighted_low_rank", "tensor_ring"],
    ["weighted"],
    ["factorized", "audit"],
    ["layers", "recipe"],
    ["papers", "plan", "explore", "schedule", "layer_fit", "walk", "layer_data"],
    ["fit_store", "profile", "prefix", "native"],
    ["objective", "hand_rules", "build"],
    ["keeper"],
    ["surgery", "trainer", "forecast", "hidden", "local", "quantize", "sensitivity", "allocate"],
    ["heal", "calibrate", "sequential", "baselines", "quantized_size", "torchao_kernels", "triton_kernels", "peft_lora", "proxies", "hybrid_tt", "on_load", "rebuild"],
    ["checkpoint"],
    ["model_card"],
    ["stages", "stream", "saving", "named"],
    ["presets", "report", "saved"],
    ["job", "cluster"],
    ["execute", "progress"],
    ["run", "sweep_page"],
    ["sweep"],
    ["console"],
    ["cli_look", "cli_make", "cli_judge", "cli_run", "cli_sweep"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(RUNGS) for name in names}
MODULES = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in ("__init__", "__main__"))


def imported(module):
    """tnlib modules that a module imports anywhere in its source."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tnlib."):
            found.add(node.module.split(".")[1])
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tnlib.")}
    return found


def test_every_module_has_a_rung():
    assert set(MODULES) == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_downward(module):
    upward = {other for other in imported(module) if LEVEL[other] >= LEVEL[module]}
    assert not upward, f"{module} (rung {LEVEL[module]}) imports {upward}; move the shared part down a rung"


def test_public_names_exist():
    for name in tnlib.__all__:
        assert getattr(tnlib, name) is not None
