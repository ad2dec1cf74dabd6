"""The training benchmark: runs that repeat, methods that learn what they can, a table that says what was measured."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cascade_engine.benchmarks import digit_nets, training, training_report
from cascade_engine.benchmarks.moving_digits import DigitFeatures
from cascade_engine.cli.bench import command
from click.testing import CliRunner

from cascade_engine.errors import InvalidInput

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

SOME = training.find(["InfoNCE", "random", "CoCLR", "CPR", "UberNCE"])
TINY = digit_nets.Budget(queue=128, warm=2, epochs=8, batch=32, lr=1e-2, width=32, dim=16)


def planted(rng, videos=480, cuts=3, classes=6, width=24):
    """Two views of vectors: in rgb what is the video's own drowns the class, flow shows the class plainly."""
    centre = np.random.default_rng(5).standard_normal((classes, width))
    private = np.where(np.arange(width) < 10, 3.0, 0.5)
    label, test = np.arange(videos) % classes, np.arange(120) % classes

    def view(loud, label):
        own = loud * centre[label][:, None] + private * rng.standard_normal((len(label), 1, width))
        return (own + 0.3 * rng.standard_normal((len(label), cuts, width))).astype(np.float32)

    return DigitFeatures(
        varied_rgb=view(0.8, label),
        varied_flow=view(5.0, label),
        train_rgb=view(0.8, label),
        train_flow=view(5.0, label),
        test_rgb=view(0.8, test),
        test_flow=view(5.0, test),
        train_label=label,
        test_label=test,
    )


@pytest.fixture(scope="module")
def data():
    return planted(np.random.default_rng(0))


@pytest.fixture(scope="module")
def results(data):
    torch.set_num_threads(1)
    said = []
    found = training.run(data, TINY, SOME, [0], probe=False, report=said.append)
    assert len(said) == 1 + len(SOME)
    return found


def test_a_run_repeats_bit_for_bit(data, results):
    again = training.run(data, TINY, training.find(["CPR"]), [0], probe=False, report=lambda line: None)
    for name in ("start", "CPR"):
        assert again["seeds"]["0"]["methods"][name] == results["seeds"]["0"]["methods"][name]


def test_precision_is_that_of_the_positives(results):
    found = results["seeds"]["0"]["methods"]
    assert found["UberNCE"]["precision"] == 1.0
    assert "precision" not in found["start"]
    assert found["InfoNCE"]["precision"] is None
    assert abs(found["random"]["precision"] - 1 / 6) < 0.05
    assert found["CoCLR"]["precision"] > 0.9


def test_labels_and_a_good_oracle_teach_what_random_positives_do_not(results):
    found = {name: figures["R@1"] for name, figures in results["seeds"]["0"]["methods"].items()}
    assert found["UberNCE"] > found["random"] + 0.3
    assert found["CoCLR"] > found["random"] + 0.3


def test_a_noise_oracle_mines_at_chance(data):
    budget = replace(TINY, oracle="noise", epochs=1)
    found = training.run(data, budget, training.find(["CoCLR"]), [0], probe=False, report=lambda line: None)
    assert abs(found["seeds"]["0"]["methods"]["CoCLR"]["precision"] - 1 / 6) < 0.05
    assert abs(found["seeds"]["0"]["views"]["precision"]["flow"] - 1 / 6) < 0.05


def test_the_table_and_the_plot_show_every_method(results, tmp_path):
    table = training_report.table(results)
    assert len(table.splitlines()) == 2 + 1 + len(SOME)
    for method in SOME:
        assert f"| {method.name} |" in table
    training_report.draw(results, tmp_path / "plot.svg")
    assert "</svg>" in (tmp_path / "plot.svg").read_text()


def test_paired_differences_are_taken_seed_by_seed():
    rows = {
        str(seed): {"methods": {"CoCLR": {"R@1": base}, "CPR": {"R@1": base + step}}}
        for seed, base, step in ((0, 0.2, 0.02), (1, 0.6, 0.04), (2, 0.4, -0.03))
    }
    line = next(line for line in training_report.table({"seeds": rows}).splitlines() if line.startswith("| CPR"))
    assert "1.0 ± 3.6, above in 2 of 3" in line
    assert "not measured" in training_report.views_table({"seeds": rows})


def test_the_committed_results_render():
    folder = Path(training_report.__file__).parent / "results"
    results = json.loads((folder / "training.json").read_text())
    for name in ("InfoNCE", "CoCLR", "CPR"):
        assert f"| {name} | {len(results['seeds'])} |" in training_report.table(results)


def test_the_views_worth_is_measured_before_training(results):
    views = results["seeds"]["0"]["views"]
    assert views["precision"]["flow"] == views["precision"]["CoCLR"] > 0.9 > views["precision"]["rgb"]
    assert set(views["precision"]) == {"rgb", "flow", "CoCLR", "CPR", "sum", "zsum", "rrf", "min"}
    assert 1 > views["agreement"] > views["chance"] == 5 / 480
    assert f"{100 * views['precision']['zsum']:.1f}" in training_report.views_table(results)


@pytest.mark.parametrize(("oracle", "warning"), [("noise", "'flow' is close to noise"), ("collapsed", "collapsed")])
def test_a_bad_oracle_is_warned_of(data, oracle, warning):
    found = training.run(data, replace(TINY, oracle=oracle, warm=1), [], [0], probe=False, report=lambda line: None)
    assert any(warning in text for text in found["seeds"]["0"]["views"]["warnings"])
    assert warning in training_report.views_table(found)


def test_runs_with_other_seeds_or_methods_join_and_others_are_refused(results):
    one = {"methods": {"start": {}, "min": {"R@1": 0.5}}}
    both = training_report.joined([{**results, "seeds": {"10": one, "2": one, "0": one}}, results])
    assert list(both["seeds"]) == ["0", "2", "10"]
    assert set(both["seeds"]["0"]["methods"]) == {*results["seeds"]["0"]["methods"], "min"}
    assert set(both["seeds"]["2"]["methods"]) == {"start", "min"}
    with pytest.raises(InvalidInput, match="CPR twice with 0"):
        training_report.joined([results, results])
    with pytest.raises(InvalidInput, match="one budget"):
        training_report.joined([results, {**results, "budget": {}}])


def test_unknown_methods_are_refused():
    assert [method.name for method in training.find(["cpr", "coclr"])] == ["CPR", "CoCLR"]
    assert training.find([]) == training.METHODS
    with pytest.raises(InvalidInput, match="UberNCE"):
        training.find(["nosuch"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training", "--from", "bad.json"], "--from: expected what cascade bench training --json wrote"),
        (["training", "--from", "empty.json"], "--from: expected what cascade bench training --json wrote"),
        (["training", "--from", "good.json", "--epochs", "3"], "--epochs: expected without --from"),
        (["training", "--from", "good.json", "--no-probe"], "--probe: expected without --from"),
        (["training", "--from", "good.json", "--plot", "x.xyz"], r"'x\.xyz' does not end in \.png or \.svg"),
        (["mining", "--quick", "--plot", "x.xyz"], r"'x\.xyz' does not end in \.png or \.svg"),
        (["mining", "--quick", "--json", "none/x.json"], "there is no folder 'none'"),
        (["store", "--large", "100"], "100 is not in the range x>=2048"),
        (["store", "--large", "5000", "--rounds", "2"], "--rounds: expected without --large"),
        (["store", "--seconds", "nan"], "'nan' is not a finite number"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("set -e")
    Path("empty.json").write_text("{}")
    Path("good.json").write_text(json.dumps({"budget": {}, "data": {}, "seeds": {}}))
    done = CliRunner().invoke(command, arguments)
    told = str(done.exception) if isinstance(done.exception, InvalidInput) else done.output
    assert re.search(message, told), (told, done.exception)


def test_the_command_trains_writes_and_shows(tmp_path):
    to, image = tmp_path / "r.json", tmp_path / "r.png"
    sizes = ["--train", "64", "--test", "60", "--queue", "32", "--warm", "1", "--epochs", "1", "--seeds", "1"]
    chosen = ["--method", "CPR", "--json", str(to)]
    done = CliRunner().invoke(command, ["training", "--data", str(tmp_path), *sizes, *chosen], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    results = json.loads(to.read_text())
    assert results["data"] == {"train": 64, "test": 60, "classes": 60}
    assert set(results["seeds"]["0"]["methods"]) == {"start", "CPR"}
    assert 0 <= results["seeds"]["0"]["methods"]["CPR"]["probe"] <= 1
    shown = CliRunner().invoke(command, ["training", "--from", str(to), "--plot", str(image)], catch_exceptions=False)
    assert training_report.table(results) in shown.output
    assert image.read_bytes().startswith(b"\x89PNG")
