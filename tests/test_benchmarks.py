"""The harness of tests/benchmarks: how ratios are formed, who is caught, what is written. No claim on time itself."""

import argparse
import json

import harness
import layers
import peers
import pytest
import reexpressed
import report
import torch
from harness import Contestant, Unavailable, race
from suite import Record
from torch import nn

import tnlib as tn

pytestmark = pytest.mark.usefixtures("one_thread")
ENTRY = 3  # calls of a contestant before its first round


def fine(answer):
    return None


class Clock:
    """A machine that is `pace[k]` times slower in round k; a contestant is a cost in seconds."""

    def __init__(self, monkeypatch, pace):
        self.now, self.pace, self.order = 0.0, pace, []
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)

    def contestant(self, name, cost, **more):
        calls = []

        def call():
            calls.append(name)
            number = len(calls) - 1 - ENTRY
            self.order.append((number, name))
            self.now += cost * (self.pace[number] if number >= 0 else 100)

        return Contestant(name, lambda: (call, fine), **more)


def test_ratios_are_formed_within_a_round(monkeypatch):
    clock = Clock(monkeypatch, [1, 30, 2, 7])
    field = [clock.contestant("dense", 1.0), clock.contestant("dense again", 1.0), clock.contestant("double", 2.0)]
    rows = race(field, "dense", rounds=4, share=1e6, computed={"floor": lambda seconds: seconds["double"] / 8})
    assert [rows[name]["ratio"] for name in ("dense", "dense again", "double", "floor")] == pytest.approx(
        [1, 1, 2, 0.25]
    )
    assert rows["double"]["low"] == rows["double"]["high"] == pytest.approx(2)
    assert rows["double"]["rounds"] == 4
    assert rows["double"]["ms"] == pytest.approx(2e3 * 4.5)
    orders = [[name for at, name in clock.order if at == number] for number in range(4)]
    assert all(len(order) == 3 for order in orders)
    assert len(set(map(tuple, orders))) > 1, "shuffled"


def test_a_sample_is_many_calls_where_one_is_short(monkeypatch):
    calls = []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: 2**-13 * len(calls))
    rows = race([Contestant("dense", lambda: (lambda: calls.append(1), fine))], "dense", rounds=2)
    assert rows["dense"]["calls"] == 17, "of 0.12 ms, for 2 ms"
    assert len(calls) == 1 + 5 + 2 * 17


def test_who_cannot_be_measured_stays_with_the_reason(monkeypatch):
    clock, broken = Clock(monkeypatch, [1] * 9), []

    def missing():
        raise Unavailable("pip install it")

    def later():
        broken.append(1)
        if len(broken) > ENTRY + 1:
            raise MemoryError("no room\nsecond line")
        clock.now += 1

    field = [
        clock.contestant("dense", 1.0),
        Contestant("wrong", lambda: (lambda: 7, lambda answer: f"{answer} is not 6")),
        Contestant("failed", lambda: (lambda: [][0], fine)),
        Contestant("missing", missing),
        Contestant("later", lambda: (later, fine)),
        clock.contestant("slow", 3.0),
        clock.contestant("tired", 1.2),
    ]
    rows = race(field, "dense", rounds=6, share=200.0)
    assert {name: row["status"] for name, row in rows.items() if row["status"] != "ok"} == {
        "wrong": "wrong", "failed": "failed", "missing": "missing", "later": "failed", "slow": "slow"
    }  # fmt: skip
    said = [rows[name]["reason"] for name in ("wrong", "failed", "missing", "later", "slow")]
    assert said == [
        "7 is not 6",
        "IndexError: list index out of range",
        "pip install it",
        "MemoryError: no room",
        "a call takes 300 s",
    ]
    assert all("ratio" not in rows[name] for name in ("wrong", "failed", "missing", "later", "slow"))
    assert (rows["dense"]["rounds"], rows["tired"]["rounds"]) == (6, 6)


def test_who_has_used_its_share_sits_out(monkeypatch):
    clock = Clock(monkeypatch, [1] * 5)
    rows = race([clock.contestant("dense", 0.001), clock.contestant("long", 0.9)], "dense", rounds=5, share=95.0)
    assert rows["long"]["rounds"] == 5
    clock = Clock(monkeypatch, [50] * 5)
    rows = race([clock.contestant("dense", 0.001), clock.contestant("long", 0.9)], "dense", rounds=5, share=95.0)
    assert (rows["dense"]["rounds"], rows["long"]["rounds"]) == (5, 3)


SHAPE = (24, 36)
LAYERS = [
    (tn.Kronecker(right=(2, 3), terms=2), reexpressed.KRONECKER),
    (tn.TensorTrain(order=3, max_rank=5), reexpressed.TRAIN),
    (tn.MPO(order=3, max_rank=6), reexpressed.MPO),
]


@pytest.mark.parametrize("mode", layers.MODES)
@pytest.mark.parametrize(("form", "others"), LAYERS, ids=["Kronecker", "TT", "MPO"])
def test_all_contestants_of_a_cell_pass_its_checks(form, others, mode):
    cell = layers.Cell(form.resolve(SHAPE), SHAPE, 5, mode)
    makes = layers.modules(cell)
    assert {"dense", "dense again", "tnlib", *others} <= set(makes)
    assert any(name.startswith("plan: ") for name in makes)
    for name, make in makes.items():
        try:
            call, check = cell.build(make)
        except Unavailable:
            continue
        assert check(call()) is None, name


@pytest.mark.parametrize("mode", layers.MODES)
def test_a_wrong_layer_is_caught(mode):
    cell = layers.Cell(tn.Kronecker(right=(2, 3)).resolve(SHAPE), SHAPE, 5, mode)
    call, check = cell.build(lambda: layers.dense(cell.weight * 1.001))
    assert "relative error 1" in check(call()) or "gradient of weight" in check(call())

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Parameter(cell.weight.clone()), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x @ self.used.T

    call, check = cell.build(Idle)
    assert check(call()) == ("no gradient of idle" if cell.training else None)


def test_a_missing_peer_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r'tednet is not installed: .* -e "\.\[bench\]"'):
        peers.need("tednet")
    assert set(peers.versions()) == set(peers.PACKAGES.values())


def test_slow_contestants_are_left_out_at_many_tokens(tmp_path):
    asked = argparse.Namespace(quick=False, out=tmp_path, fresh=True, only="", threads=1, rounds=1, seconds=0, share=1)
    record = Record("bench_layers", asked)
    rows = {
        "dense": {"status": "ok", "ratio": 1},
        "peer": {"status": "ok", "ratio": 51.2},
        "plan: a": {"status": "ok", "ratio": 7.9},
    }
    record.put(layers.name_of("fc", "MPO", "forward", 512), {"tokens": 512}, rows, 0.0)
    assert layers.known_slow(record, "fc", "MPO", "forward", 4096) == {"peer": "51 times dense at 512 tokens"}
    assert layers.known_slow(record, "fc", "MPO", "forward", 512) == {}
    assert layers.known_slow(record, "proj", "MPO", "forward", 4096) == {}


def test_a_quick_run_writes_its_files_and_goes_on(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--quick", "--threads", "1", "--out", str(tmp_path), "--only", "TT forward, 1 tokens"]
    layers.main(arguments)
    names = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(names) == {".json", ".md", ".png", ".svg", ".csv"}
    assert {path.stem for path in names.values()} == {"bench_layers_quick"}
    record = json.loads(names[".json"].read_text())
    (cell,) = record["cells"].values()
    assert cell["rows"]["dense"]["ratio"] == 1
    assert {"dense again", "tnlib", "low rank", "floor", *reexpressed.TRAIN} <= set(cell["rows"])
    page = names[".md"].read_text()
    assert "| tnlib |" in page
    assert "tnlib against the best of each cell" in page
    assert "floor and calls" in page
    assert "products alone" in page
    probes = [name for name, row in cell["rows"].items() if row.get("probe")]
    assert len(probes) == 4
    assert not any(report._is_peer(name) for name in probes)
    assert capsys.readouterr().out.count("measured") == 1
    layers.main(arguments)
    assert capsys.readouterr().out == "", "the cell was there"
