"""`cascade train`, `cascade runs` and `cascade mine` on a few real video files."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from cascade_engine.cli.main import main
from click.testing import CliRunner

import cascade_engine as ce
from cascade_engine.errors import CascadeError, InvalidInput
from cascade_engine.training.run import Run

SMALL = [
    *("views=['rgb','residual']", "data.size=24", "data.train_split=train", "clip.frames=4", "clip.size=16"),
    *(
        "model.dim=8",
        "bank.size=8",
        "optim.batch=4",
        "optim.threads=1",
        "output.log_every=1",
        "output.tensorboard=false",
    ),
]
CONFIG = """
name = "first"
[data]
source = "videos.csv"
[[phase]]
name = "residual-0"
train = "residual"
epochs = 1
[[phase]]
name = "rgb-1"
train = "rgb"
oracles = ["residual"]
plan = "residual:50%,rgb:2"
epochs = 3
mine_from = 0.5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight short films of a bar that moves one of two ways, an index of them, and a config."""
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    with (folder / "videos.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for n in range(8):
            with av.open(folder / f"{n}.mp4", "w") as film:
                stream = film.add_stream("mpeg4", rate=10)
                stream.width = stream.height = 32
                noise = rng.integers(0, 60, (32, 32, 3))
                for t in range(8):
                    picture = noise.astype(np.uint8)
                    at = (n + t * (3 if n % 2 else -3)) % 28
                    picture[:, at : at + 4] = 240
                    film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
                film.mux(stream.encode())
            rows.writerow([f"{n}.mp4", "right" if n % 2 else "left", "test" if n > 5 else "train"])
    (folder / "c.toml").write_text(CONFIG)
    return folder


def cascade(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def settings(*more):
    return [word for each in (*SMALL, *more) for word in ("-s", each)]


@pytest.fixture(scope="module")
def trained(folder):
    here = Path.cwd()
    os.chdir(folder)
    try:
        for name in ("first", "second"):
            done = cascade("train", "c.toml", *settings(f"name={name}", f"seed={len(name)}"))
            assert done.exit_code == 0, (done.output, done.exception)
    finally:
        os.chdir(here)
    return done


def test_training_by_a_config_file(folder, trained):
    assert "phase 2 rgb-1: trains rgb from initial, oracle residual of residual-0" in trained.output
    run = Run.open(folder / "runs" / "first")
    assert run.phases == ("residual-0", "rgb-1")
    assert run.cache_path == folder / "cache" / "frames"
    assert len(run.index) == 8
    with ce.FeatureStore.open(run.store_path, phase="rgb-1") as store:
        assert store.rows == 8 * 3
        assert set(store.views) == {"rgb", "residual", "rgb_backbone", "residual_backbone"}
    assert {row["precision"] for row in run.metrics} != {None}


def test_runs_are_listed_and_compared(folder, trained):
    listed = json.loads(cascade("runs", folder / "runs", "--json").output)
    assert [row["phases"] for row in listed] == ["2/2", "2/2"]
    both = folder / "runs" / "first", folder / "runs" / "second"
    told = json.loads(cascade("runs", *both, "--json").output)
    assert {row["setting"] for row in told["settings"]} == {"name", "seed"}
    assert {"figure": "step", str(both[0]): 8, str(both[1]): 8} in told["figures"]
    assert "second" in cascade("runs", folder / "runs").output
    with pytest.raises(InvalidInput, match="runs: expected a folder"):
        main(["runs", str(folder / "none")], standalone_mode=False)


def test_a_store_is_mined_and_trained_from(folder, trained, monkeypatch):
    monkeypatch.chdir(folder)
    store, where = "runs/first/features.zarr", "split == 'train'"
    plan = ("--plan", "residual:10,rgb:2", "--phase", "rgb-1", "--where", where)
    done = cascade("mine", store, *plan, "--to", "p.zarr", "--json")
    assert done.exit_code == 0, done.exception
    assert (json.loads(done.output)["rows"], json.loads(done.output)["mined"]) == (18, 18)
    assert json.loads(cascade("mine", store, *plan, "--to", "p.zarr", "--json").output)["mined"] == 0
    again = cascade("mine", store, *plan, "--to", "p.zarr")
    assert again.stdout.startswith("p.zarr: positives of 18 clips")
    offline = settings("name=offline", "phase.rgb-1.positives=p.zarr")
    done = cascade("train", "c.toml", *offline)
    assert done.exit_code == 0, (done.output, done.exception)
    assert Run.open("runs/offline").metrics[-1]["coverage"] > 0


def test_configs_are_printed_and_read_back(tmp_path):
    printed = cascade("train", "--print-config", "tiny", "-s", "phase.3.top_k=7")
    (tmp_path / "tiny.toml").write_text(printed.output)
    shown = cascade("train", tmp_path / "tiny.toml", "--dry-run", "-s", "name=a [b] [-b]")
    assert shown.exit_code == 0
    assert "a [b] [-b]: " in shown.output
    assert "cpr, k = 7" in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"expected a CONFIG.toml or --preset"),
        (["c.toml", "--preset", "tiny"], "one of the two"),
        (["--preset", "tiny", "-s", "phase.9.lr=1"], r"phase.9.lr: no row '9'"),
        (["--preset", "tiny", "--dry-run", "-s", "name="], "name: expected the name of a folder"),
        (["--preset", "tiny", "--dry-run", "-s", "name=../x"], "name: expected the name of a folder"),
        (["--preset", "tiny", "-s", "phase.².lr=1"], "phase.².lr: no row '²'"),
        (["none.toml"], "no such file"),
        (["c.toml", "--print-config", "tiny"], "--print-config: expected with --set only, got c.toml"),
        (["--print-config", "tiny", "--preset", "cpr"], "--print-config: expected with --set only, got --preset"),
        (["--print-config", "tiny", "--resume"], "--print-config: expected with --set only, got --resume"),
        (["--print-config", "tiny", "--dry-run"], "--print-config: expected with --set only, got --dry-run"),
        (["--preset", "tiny", "-s", "data.source=nowhere"], "nowhere"),
        (["--preset", "tiny", "-s", "data.source=mocap15:x"], "mocap15:N"),
        (["--preset", "tiny", "-s", "data.source=mocap15:²"], "mocap15:N"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CascadeError, match=message):
        main(["train", *arguments], standalone_mode=False)


@pytest.mark.full
def test_ctrl_c_saves_and_exits_with_130(folder):
    arguments = ["train", "c.toml", *settings("name=stopped", "phase.rgb-1.epochs=500", "data.cache=cache2")]
    command = [sys.executable, "-c", "from cascade_engine.cli.main import run; run()", *arguments]
    running = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    for line in running.stderr:
        if line.startswith("rgb-1 epoch 3"):
            running.send_signal(signal.SIGINT)
            break
    errors = running.stderr.read()
    assert running.wait(60) == 130, errors
    assert "interrupted" in errors
    assert list((folder / "runs" / "stopped" / "checkpoints").glob("step-*.pt"))
