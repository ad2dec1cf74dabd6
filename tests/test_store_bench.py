"""`cascade bench store` runs, compares answers and reports every format that is installed."""

import json

import pytest
from cascade_engine.cli.bench_store import command
from click.testing import CliRunner

pytest.importorskip("h5py")


def test_a_small_run_reports_readers_and_appends(tmp_path):
    arguments = ["--rows", "40000", "--dim", "8", "--rounds", "1", "--seconds", "0.01", "--folder", str(tmp_path)]
    done = CliRunner().invoke(command, [*arguments, "--json", str(tmp_path / "x.json")])
    assert done.exit_code == 0, done.exception
    found = json.loads((tmp_path / "x.json").read_text())
    assert {"np.memmap", "ours", "zarr", "h5py"} <= {each["name"] for each in found["reading"]}
    appended = [(each["name"], each["batch"]) for each in found["appending"]]
    for name in ("ours, commit", "ours, group", "ours, none", "zarr", "h5py + flush"):
        assert [batch for each, batch in appended if each == name] == [256, 4096, 65536]
    assert "survives power loss" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"], "nothing is left behind"
