"""Checkpoints in processes of their own: with tnlib imported before or after transformers they load, without it they never do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_checkpoint import KINDS
from test_surgery import IDS
from tiny import logits, tiny

import tnlib

WAYS = {
    "before": "import tnlib, transformers",
    "after": "import transformers; transformers.AutoModelForCausalLM; import tnlib",
    "config first": "import tnlib; tnlib.TNConfig(); import transformers",
    "unaware": "import transformers",
}
WORK = """
import json, os, sys, traceback
import scipy.optimize, torch, torch._dynamo, torch.distributed.tensor  # what takes transformers long to import

def work(way, start):
    assert not {"tnlib", "transformers"} & sys.modules.keys()
    exec(start)
    import transformers
    found, ids = {}, torch.tensor(json.loads(sys.argv[2]))
    if way == "config first":  # a model takes seconds more to import
        found = "tnlib" in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
    for kind in () if way == "config first" else ("tied", "quantized", "dense in 8 bits", "dequantized"):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{kind}")
            with torch.no_grad():
                found[kind] = model(ids).logits.tolist()
        except Exception as error:
            found[kind] = f"{type(error).__name__}: {error}"
    assert ("tnlib" in sys.modules) == (way != "unaware")
    with open(f"{sys.argv[1]}/{way}.json", "w") as file:
        json.dump(found, file)

for way, start in json.loads(sys.argv[3]).items():
    if not os.fork():
        torch.set_num_threads(1)
        code = 1
        try:
            work(way, start)
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    assert os.wait()[1] == 0, way
"""


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """Logits here, what each of the processes found, and their log: a process forks them, before it imports transformers."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    folder, wanted = tmp_path_factory.mktemp("checkpoints"), {}
    for kind in ("tied", "quantized", "dense in 8 bits"):
        model = tiny("llama", torch.float32)
        KINDS[kind](model)
        model.save_pretrained(folder / kind)
        wanted[kind] = logits(model, IDS).tolist()
    model.dequantize()
    model.save_pretrained(folder / "dequantized")
    wanted["dequantized"] = logits(model, IDS).tolist()
    done = _python(WORK, folder, json.dumps(IDS.tolist()), json.dumps(WAYS))
    assert done.returncode == 0, done.stderr[-3000:]
    return wanted, {way: json.loads((folder / f"{way}.json").read_text()) for way in WAYS}, done.stderr


def _python(work, *arguments):
    path = os.pathsep.join([str(Path(tnlib.__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", work, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )


def test_import_tnlib_imports_nothing_heavy():
    done = _python("import sys, tnlib; print({'torch', 'transformers', 'numpy'} & sys.modules.keys())")
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.parametrize("way", ["before", "after"])
def test_tnlib_may_be_imported_before_or_after_transformers(worked, way):
    wanted, found, _ = worked
    assert found[way] == wanted
    assert found["config first"]


def test_a_process_without_tnlib_fails_instead_of_drawing_weights(worked):
    """Trap: transformers only warns of an unknown method, and would go on with random weights; and it has no entry points."""
    _, found, log = worked
    for kind in ("tied", "quantized", "dense in 8 bits"):
        assert found["unaware"][kind].startswith("RuntimeError: You set `ignore_mismatched_sizes` to `False`")
    assert "Unknown quantization type, got tnlib" in log


def test_a_dequantized_checkpoint_needs_no_tnlib(worked):
    wanted, found, _ = worked
    assert found["unaware"]["dequantized"] == wanted["dequantized"]
