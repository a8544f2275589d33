import json
import math
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tnlib import figures, records
from tnlib.figures import label, load_result, record, save_figure, save_result, show_record, use_style


@pytest.fixture
def run(tmp_path, monkeypatch):
    """An empty run folder, in a checkout of its own."""
    for module in (records, figures):
        monkeypatch.setattr(module, "repo_root", lambda: tmp_path)
    monkeypatch.setenv("TNLIB_RESULTS", str(tmp_path / "run"))
    monkeypatch.setenv("TNLIB_SCALE", "laptop")
    return tmp_path / "run"


@pytest.fixture
def plt():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context():
        use_style()
        yield plt
    plt.close("all")


def draw(plt):
    fig, ax = plt.subplots()
    ax.plot([1, 2, 4], [0.5, 0.25, 0.125], label="Kronecker")
    ax.plot([1, 2, 4], [0.6, 0.3, 0.15], label="low rank")
    ax.legend()
    label(ax, "The error halves", "rank", "relative error")
    return fig


# ------------------------------------------------------------------------------------------------ figures


def test_save_figure_writes_three_files_with_the_same_bytes_each_time(run, plt):
    data = {"rank": [1, 2, 4], "error": np.array([0.5, 0.25, 1 / 3]), "form": "Kronecker"}
    written = []
    for _ in range(2):
        assert save_figure(draw(plt), "10_error", data) is None
        written.append([(run / "figures" / f"10_error.{ext}").read_bytes() for ext in ("svg", "png", "csv")])
    assert written[0] == written[1]
    svg, _, csv = written[0]
    assert b"relative error</text>" in svg, "text must stay text"
    assert csv.decode() == "rank,error,form\n1,0.5,Kronecker\n2,0.25,Kronecker\n4,0.333333333,Kronecker\n"
    assert sorted(path.name for path in (run / "figures").iterdir()) == ["10_error.csv", "10_error.png", "10_error.svg"]
    assert plt.get_fignums() == [], "an open figure would be shown a second time"


def test_a_data_frame_and_tensors_are_columns_too(run, plt):
    pandas = pytest.importorskip("pandas")
    save_figure(draw(plt), "10_frame", pandas.DataFrame({"rank": [1, 2], "error": [0.5, math.nan]}))
    assert (run / "figures" / "10_frame.csv").read_text() == "rank,error\n1,0.5\n2,nan\n"
    save_figure(draw(plt), "10_tensor", {"error": torch.tensor([0.5, 0.25])})
    assert (run / "figures" / "10_tensor.csv").read_text() == "error\n0.5\n0.25\n"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("10_error", {"rank": [1, 2], "error": [1.0]}, "different lengths.*one row a point"),
        ("../10_error", {"rank": [1]}, "not a name.*the folder is chosen for you"),
        ("", {"rank": [1]}, "not a name"),
    ],
)
def test_save_figure_refuses(run, plt, name, data, words):
    with pytest.raises(ValueError, match="(?s)" + words):
        save_figure(draw(plt), name, data)
    assert not run.exists()


def test_lines_differ_in_dash_and_marker_not_only_in_color(plt):
    cycle = list(plt.rcParams["axes.prop_cycle"])
    assert len({(str(entry["linestyle"]), entry["marker"]) for entry in cycle}) == len(cycle) == 7
    assert len({str(entry["linestyle"]) for entry in cycle}) == len({entry["marker"] for entry in cycle}) == 7


def test_importing_figures_does_not_import_matplotlib():
    code = "import sys, tnlib.figures; print(sorted({'matplotlib', 'IPython', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ------------------------------------------------------------------------------------------------ results


@dataclass(frozen=True)
class Budget:
    steps: int
    shape: tuple


class Recipe:
    def to_dict(self):
        return {"name": "krony-81m", "rules": [Budget(1, (2, 2))]}


def test_save_and_load_a_result(run):
    metrics = {
        "ppl": {"dense": 1 / 3, 8: np.float32(0.5)},
        "n": torch.tensor(7),
        "rows": [{"a": 1, "b": None}],
        "ok": np.bool_(True),
    }
    save_result(
        "10_krony_pt", metrics=metrics, recipe=Recipe(), budget=Budget(100, (4, 2)), seed=3, params={"RANKS": (1, 2)}
    )
    loaded = load_result("10_krony_pt")
    assert loaded["metrics"] == {"ppl": {"dense": 1 / 3, "8": 0.5}, "n": 7, "rows": [{"a": 1, "b": None}], "ok": True}
    assert loaded["recipe"] == {"name": "krony-81m", "rules": [{"steps": 1, "shape": [2, 2]}]}
    assert (loaded["budget"], loaded["seed"], loaded["scale"]) == ({"steps": 100, "shape": [4, 2]}, 3, "laptop")
    assert loaded["params"] == {"RANKS": [1, 2]}
    assert loaded["versions"]["torch"]
    assert loaded["device"]["cpu"]
    assert loaded["threads"] == torch.get_num_threads()
    assert loaded["commit"] is None, "the folder is no git checkout"
    assert loaded["time"].endswith("+00:00")


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (
            {"ppl": {"healed": [1.0, math.nan]}},
            r"save_result\('10_x'\): metrics\['ppl'\]\['healed'\]\[1\] is nan.*store None",
        ),
        ({"ppl": np.float64("inf")}, r"metrics\['ppl'\] is inf"),
        ({"ppl": torch.tensor([math.nan])}, r"metrics\['ppl'\]\[0\] is nan"),
        ({"model": object()}, r"metrics\['model'\] is a object.*Convert it"),
    ],
)
def test_save_result_names_the_key_that_json_cannot_hold(run, metrics, words):
    with pytest.raises(ValueError, match="(?s)" + words):
        save_result("10_x", metrics=metrics)
    assert not (run / "results").exists()


def test_the_largest_recorded_scale_wins_unless_one_is_asked_for(run, tmp_path):
    save_result("10_x", metrics={"ppl": 1})  # this run, laptop
    for scale, ppl in (("laptop", 2), ("gpu", 3)):
        path = tmp_path / "figures" / f"10_x_{scale}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"scale": scale, "metrics": {"ppl": ppl}}))
    (tmp_path / "figures" / "10_x_y_paper.json").write_text(
        json.dumps({"scale": "paper", "metrics": {}})
    )  # record 10_x_y
    assert load_result("10_x")["metrics"]["ppl"] == 3
    assert load_result("10_x", "laptop")["metrics"]["ppl"] == 1, "this run's own beats the committed one of its scale"
    with pytest.raises(ValueError, match=r"(?s)no record at scale 'paper'.*10_x_gpu, 10_x_laptop.*10_x \(this run\)"):
        load_result("10_x", "paper")


def test_record_copies_a_run_but_never_a_smoke_run(run, plt, tmp_path):
    save_figure(draw(plt), "10_error", {"rank": [1]})
    save_result("10_x", metrics={"ppl": 2})
    save_result("11_y", metrics={"ppl": 2})
    with pytest.raises(ValueError, match=r"(?s)'smoke' is never kept.*--preset laptop"):
        record(run, "smoke")
    with pytest.raises(ValueError, match="made at scale 'laptop', not 'gpu'"):
        record(run, "gpu")
    written = record(run, "laptop", names=["10_krony_pt"])
    names = ["10_error_laptop.csv", "10_error_laptop.png", "10_error_laptop.svg", "10_x_laptop.json"]
    assert sorted(path.name for path in written) == names
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == names


def test_show_record_shows_the_figure_or_says_how_to_make_it(run, plt, capsys, tmp_path):
    assert "--preset laptop --record" in show_record("10_error").data
    save_figure(draw(plt), "10_error", {"rank": [1]})
    save_result("10_x", metrics={"ppl": 2})
    record(run, "laptop")
    assert show_record("10_error").data == (tmp_path / "figures" / "10_error_laptop.png").read_bytes()
    assert "at scale gpu" in show_record("10_error", "gpu").data


def test_without_a_runner_results_go_to_runs_scale(run, monkeypatch, tmp_path):
    monkeypatch.delenv("TNLIB_RESULTS")
    monkeypatch.delenv("TNLIB_SCALE")
    save_result("10_x", metrics={})
    assert (tmp_path / "runs" / "smoke" / "results" / "10_x.json").exists()


def test_a_failed_write_leaves_the_old_file_and_no_remains(run, monkeypatch):
    records.write_atomic(run / "a.txt", "old")
    monkeypatch.setattr(records.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        records.write_atomic(run / "a.txt", "new")
    assert [(path.name, path.read_text()) for path in run.iterdir()] == [("a.txt", "old")]


def test_commit_is_read_in_a_checkout(run, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert records._commit() is None, "a checkout without a commit"
    who = ["-c", "user.name=x", "-c", "user.email=x@x"]
    (tmp_path / "a").write_text("1")
    subprocess.run(["git", "-C", tmp_path, "add", "a"], check=True)
    subprocess.run(["git", "-C", tmp_path, *who, "commit", "-qm", "x"], check=True)
    assert records._commit()["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert records._commit()["dirty"] is True
